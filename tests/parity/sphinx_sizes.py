"""Builder arguments from a SPHINX or SPHINX-V golden's config.json; what a config does not hold is written here."""

from __future__ import annotations

from typing import Any

PATCH_PX = 14
VIEW_PX = 224
FIVE_VIEWS = ["whole", [0, 0], [0, 1], [1, 0], [1, 1]]
DECODER_FIELDS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
)


def decoder_sizes(args: dict[str, Any], *, vocab_size: int, max_seq_len: int) -> dict[str, Any]:
    """Arguments of `llama_config` from a params.json."""
    sizes = {name: args[name] for name in DECODER_FIELDS if name in args}
    return {**sizes, "vocab_size": vocab_size, "max_seq_len": max_seq_len}


def views_of(canvas_px: int) -> list[Any]:
    """The whole canvas, then its cuts row by row (`llama_ens5`, and `llama_ens10` with three a side)."""
    cuts = range(canvas_px // VIEW_PX)
    return ["whole", *([row, column] for row in cuts for column in cuts if len(cuts) > 1)]


def sphinx_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `build_sphinx`."""
    visual, args = config["visual"], config["model_args"]
    clip, blip, dino = visual["clip"], visual["blip2"], visual["dinov2"]
    canvas = config["image_size"]
    vision = {
        "canvas_px": canvas,
        "view_px": VIEW_PX,
        "patch_px": PATCH_PX,
        "views": views_of(canvas),
        "clip": {
            "width": clip["width"],
            "layers": clip["layers"],
            "heads": clip["width"] // clip["head_width"],
            "mlp_dim": 4 * clip["width"],
            "text": {
                "embed_dim": clip["embed_dim"],
                "context": clip["text_context"],
                "vocab": clip["text_vocab"],
                "width": clip["text_width"],
            },
        },
        "convnext": {
            "input_px": 256,
            "depths": visual["convnext"]["depths"],
            "widths": visual["convnext"]["dims"],
        },
        "dinov2": {"width": dino["width"], "layers": dino["layers"], "heads": dino["heads"]},
        "qformer": {
            "num_queries": 32,
            "width": blip["qf_width"],
            "layers": blip["qf_layers"],
            "heads": blip["qf_heads"],
            "mlp_dim": blip["qf_mlp"],
            "vit": {
                "width": blip["vit_width"],
                "layers": blip["vit_layers"],
                "heads": blip["vit_heads"],
                "mlp_dim": blip["vit_mlp"],
            },
        },
    }
    decoder = decoder_sizes(args, vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"])
    return {"vision": vision, "decoder": decoder}


def sphinx_v_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `build_sphinx_v`."""
    encoders, fixed = config["encoders"], config["fixed"]
    clip, text = encoders["clip"]["vision_cfg"], encoders["clip"]["text_cfg"]
    qformer, vit, dino = encoders["qformer"], encoders["blip_vision"], encoders["dino"]
    vision = {
        "canvas_px": fixed["image_size"],
        "view_px": fixed["view_size"],
        "patch_px": fixed["patch"],
        "views": FIVE_VIEWS,
        "clip": {
            "width": clip["width"],
            "layers": clip["layers"],
            "heads": clip["width"] // clip["head_width"],
            "mlp_dim": 4 * clip["width"],
            "text": {
                "embed_dim": encoders["clip"]["embed_dim"],
                "context": text["context_length"],
                "vocab": text["vocab_size"],
                "width": text["width"],
            },
        },
        "convnext": {
            "input_px": fixed["convnext_input"],
            "depths": encoders["convnext"]["depths"],
            "widths": encoders["convnext"]["dims"],
        },
        "dinov2": {
            "width": dino["embed_dim"],
            "layers": dino["depth"],
            "heads": dino["num_heads"],
            "position_grid": fixed["dino_pos_grid"],
        },
        "qformer": {
            "num_queries": fixed["num_query_tokens"],
            "width": qformer["hidden_size"],
            "layers": qformer["num_hidden_layers"],
            "heads": qformer["num_attention_heads"],
            "mlp_dim": qformer["intermediate_size"],
            "vit": {
                "width": vit["hidden_size"],
                "layers": vit["num_hidden_layers"],
                "heads": vit["num_attention_heads"],
                "mlp_dim": vit["intermediate_size"],
            },
        },
    }
    return {
        "vision": vision,
        "decoder": decoder_sizes(config["llm"], vocab_size=config["vocab_size"], max_seq_len=config["max_seq_len"]),
        "prompt_dim": fixed["vp_embed_dim"],
        "num_slots": fixed["vp_slots"],
    }
