"""Sizes of a SPHINX, read off the names and shapes of published tensors.

So a checkpoint of any size is checked, also one that nobody has written a yaml for: the model is built on the meta
device from these sizes, and its published names and shapes are what the checkpoint is compared with.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.saved_weights import check_identity
from bestiary.variants.hf_folder import read_object
from bestiary.variants.parts import ANY_HEADS, Shapes, depth
from bestiary.variants.sphinx.model import View, views_identity

CLIP, CONVNEXT, DINOV2, QFORMER = "llma.clip", "llma.openclip_convnext_xxl", "llma.dinov2_vitg14", "llma.qformer"
EMBEDDING = "llma.tok_embeddings.weight"
DECODER_KEYS = ("n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling")
WHOLE_NUMBERS = ("n_heads", "n_kv_heads", "multiple_of")


def decoder_sizes(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `llama_config`: the config's where it speaks, else what the tensors tell."""
    vocab, dim = shape_of(shapes, EMBEDDING)
    layers = depth(shapes, "llma.layers")
    for key, found in (("dim", dim), ("n_layers", layers), ("vocab_size", vocab)):
        told = config.get(key)
        if told not in (None, -1, found):  # Meta writes -1 for "ask the tokenizer"
            raise ValueError(f"the config says {key}={told} but the tensors have {found}; is it the config of others?")
    config_says = {key: config[key] for key in DECODER_KEYS if config.get(key) is not None}
    for key, value in config_says.items():
        if not isinstance(value, int | float) or value <= 0 or (key in WHOLE_NUMBERS and value != int(value)):
            raise ValueError(f"the config says {key}={value!r}, which is no size; fetch it again")
    queries, keys = (shape_of(shapes, f"llma.layers.0.attention.{name}.weight")[0] for name in ("wq", "wk"))
    heads = int(config_says.get("n_heads") or max(ANY_HEADS, queries // max(1, keys)))
    head_dim(dim, heads)
    tensors_say: dict[str, Any] = {"n_heads": heads, "n_kv_heads": max(1, heads * keys // max(1, queries))}
    if "multiple_of" not in config_says:  # a factor and a step that round up to the very width
        hidden = shape_of(shapes, "llma.layers.0.feed_forward.w1.weight")[0]
        config_says |= {"multiple_of": hidden, "ffn_dim_multiplier": (hidden - 0.5) / max(1, int(8 * dim / 3))}
    size = {"dim": dim, "n_layers": layers, "vocab_size": vocab, "max_seq_len": 4096}
    return {**tensors_say, **config_says, **size}


def head_dim(dim: int, heads: int) -> int:
    """Width of an attention head; raises when the heads do not divide the width evenly."""
    if heads < 1 or dim % heads or (dim // heads) % 2:
        raise ValueError(f"a width of {dim} does not divide into {heads} heads of an even width; is the config right?")
    return dim // heads


CUTS = {"llama_ens": 1, "llama_ens5": 2, "llama_ens10": 3, "llama_ens5_vp": 2}
"""llama_type -> quarters or ninths of the picture along a side."""


def views_of(cuts: int) -> list[View]:
    """The whole picture, then its cuts row by row (LLaMA2-Accessory @ 3777c43, llama_ens5.py: encode_image)."""
    return ["whole", *([row, column] for row in range(cuts) for column in range(cuts) if cuts > 1)]


def check_views(folder: Path, views: Sequence[View]) -> None:
    """Raise where meta.json beside published weights names a model that cuts pictures in another way."""
    told = read_object(folder / "meta.json").get("llama_type") if (folder / "meta.json").is_file() else None
    if told in CUTS:
        check_identity(views_identity(views_of(CUTS[told])), views_identity(views), where=f"{folder} ({told})")


def vision_sizes(shapes: Shapes, cuts: int) -> dict[str, Any]:
    """Arguments of `SphinxVision` as far as shapes tell; heads and the pixels of ConvNeXt's input are stand-ins."""
    positions = shape_of(shapes, f"{CLIP}.visual.positional_embedding")[0]
    patch_px = shape_of(shapes, f"{CLIP}.visual.conv1.weight")[-1]
    view_px = math.isqrt(positions - 1) * patch_px
    return {
        "canvas_px": cuts * view_px,
        "view_px": view_px,
        "patch_px": patch_px,
        "views": views_of(cuts),
        "clip": _clip(shapes),
        "convnext": _convnext(shapes),
        "dinov2": _dinov2(shapes),
        "qformer": _qformer(shapes),
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    blocks = f"{CLIP}.visual.transformer.resblocks"
    context, text_width = shape_of(shapes, f"{CLIP}.positional_embedding")
    return {
        "width": shape_of(shapes, f"{CLIP}.visual.class_embedding")[0],
        "layers": depth(shapes, blocks),
        "heads": ANY_HEADS,
        "mlp_dim": shape_of(shapes, f"{blocks}.0.mlp.c_fc.weight")[0],
        "text": {
            "embed_dim": shape_of(shapes, f"{CLIP}.text_projection")[1],
            "context": context,
            "vocab": shape_of(shapes, f"{CLIP}.token_embedding.weight")[0],
            "width": text_width,
        },
    }


def _convnext(shapes: Shapes) -> dict[str, Any]:
    stages = range(depth(shapes, f"{CONVNEXT}.stages"))
    stem_px = shape_of(shapes, f"{CONVNEXT}.stem.0.weight")[-1]
    return {
        "depths": [depth(shapes, f"{CONVNEXT}.stages.{stage}.blocks") for stage in stages],
        "widths": [shape_of(shapes, f"{CONVNEXT}.stages.{stage}.blocks.0.gamma")[0] for stage in stages],
        "stem_px": stem_px,
        "input_px": stem_px * 2 ** (len(stages) - 1),
    }


def _dinov2(shapes: Shapes) -> dict[str, Any]:
    return {
        "width": shape_of(shapes, f"{DINOV2}.cls_token")[-1],
        "layers": depth(shapes, f"{DINOV2}.blocks"),
        "heads": ANY_HEADS,
        "position_grid": math.isqrt(shape_of(shapes, f"{DINOV2}.pos_embed")[1] - 1),
        "swiglu": f"{DINOV2}.blocks.0.mlp.w12.weight" in shapes,
    }


def _qformer(shapes: Shapes) -> dict[str, Any]:
    layers, vit = f"{QFORMER}.qformer.encoder.layer", f"{QFORMER}.vision_model"
    _, queries, width = shape_of(shapes, f"{QFORMER}.query_tokens")
    num_layers = depth(shapes, layers)
    crossing = [n for n in range(num_layers) if f"{layers}.{n}.crossattention.attention.query.weight" in shapes]
    return {
        "num_queries": queries,
        "width": width,
        "layers": num_layers,
        "heads": ANY_HEADS,
        "mlp_dim": shape_of(shapes, f"{layers}.0.intermediate_query.dense.weight")[0],
        "cross_every": crossing[1] if len(crossing) > 1 else num_layers,
        "vit": {
            "width": shape_of(shapes, f"{vit}.embeddings.class_embedding")[-1],
            "layers": depth(shapes, f"{vit}.encoder.layers"),
            "heads": ANY_HEADS,
            "mlp_dim": shape_of(shapes, f"{vit}.encoder.layers.0.mlp.fc1.weight")[0],
        },
    }


def shape_of(shapes: Shapes, name: str) -> Sequence[int]:
    """The shape of a tensor that tells a size of the model; raises when it is missing."""
    try:
        return shapes[name]
    except KeyError:
        near = ", ".join(difflib.get_close_matches(name, list(shapes), n=2, cutoff=0.4)) or "none"
        raise ValueError(f"{name}, which tells a size of the model, is missing; nearest there: {near}") from None
