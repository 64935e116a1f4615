"""config.json of a published Ovis folder: read into the arguments of our model, and written for a model of ours.

The file nests `llm_config` (the decoder's own config.json) and `visual_tokenizer_config` with its `backbone_config`.
What it leaves out is told by the tensors. Source: reference/ovis.md, sections 1.7, 1.8 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from bestiary.mllm import MultimodalLM
from bestiary.variants.ovis.formatters import version_named
from bestiary.variants.ovis.geometry import GRID_MARKS
from bestiary.variants.ovis.model import FAMILIES, decoder_config
from bestiary.variants.ovis.visual_tokenizer import BACKBONES, HALF, S2_VIEWS, OvisVision
from bestiary.variants.parts import depth, size
from bestiary.vision.encoders import CLIP_MEAN, CLIP_STD

Shapes = Mapping[str, Sequence[int]]
Config = Mapping[str, Any]

EMBEDDING, HEAD, TABLE = "llm.model.embed_tokens.weight", "visual_tokenizer.head.0.weight", "vte.weight"
_LAYER, _VIT = "llm.model.layers", "visual_tokenizer.backbone.vision_model"
VERSION = "ovis_version"
"""Our word beside the published ones, see `version_of`."""
FORMATTERS = {
    "QwenConversationFormatter": "qwen",
    "Llama3ConversationFormatter": "llama3",
    "GemmaConversationFormatter": "gemma",
}
"""conversation_formatter_class (section 1.7) -> our name of the format."""
DECODER_WORDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "use_sliding_window",
    "sliding_window", "max_window_layers", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
"""Words of a decoder's config.json that say how it computes."""
BACKBONE_WORDS = {
    "image_px": "image_size",
    "patch_px": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
}
"""Arguments of our backbones, and what their config.json calls them."""


def completed(config: Config, shapes: Shapes) -> dict[str, Any]:
    """config.json with what it leaves out read off the tensors; {} works, heads (which no shape shows) apart."""
    told, vision = dict(config), dict(config.get("visual_tokenizer_config") or {})
    kind = "clip" if f"{_VIT}.embeddings.class_embedding" in shapes else "siglip"
    vision = {"model_type": f"{kind}_visual_tokenizer", **vision}
    _check_kind(vision["model_type"])
    if TABLE in shapes:
        rows = size(shapes, TABLE, 2)[0]
        vision = {"vocab_size": rows, **vision}
        if vision["vocab_size"] != rows:
            raise ValueError(
                f"config.json says {vision['vocab_size']} visual words (visual_tokenizer_config.vocab_size) but "
                f"{TABLE} has {rows} rows; is it the config.json of these weights?"
            )
    if f"{_VIT}.embeddings.patch_embedding.weight" in shapes:
        vision["backbone_config"] = _backbone_told(shapes) | dict(vision.get("backbone_config") or {})
    width = vision.get("backbone_config", {}).get("hidden_size")
    if "hidden_stride" not in vision and HEAD in shapes and width:
        vision |= _stride_told(size(shapes, HEAD, 2)[1] / width)
    if "use_indicators" not in vision and TABLE in shapes and HEAD in shapes:
        marks = size(shapes, TABLE, 2)[0] - size(shapes, HEAD, 2)[0]
        vision |= {} if marks == GRID_MARKS else {"use_indicators": marks > 0}
    decoder = dict(config.get("llm_config") or {})
    told["llm_config"] = (_decoder_told(shapes, decoder) if EMBEDDING in shapes else {}) | decoder
    return told | {"visual_tokenizer_config": vision}


def vision_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `build_ovis(vision=)` from a completed config.json."""
    vision = config["visual_tokenizer_config"]
    backbone, kind = vision["backbone_config"], _check_kind(vision["model_type"])
    marks = num_marks(vision)
    views = S2_VIEWS if vision.get("hd_booster") else 1
    if vision.get("hd_booster") not in (None, "s2wrapper", "s2wrapper-adaptive"):
        raise ValueError(f"config.json says hd_booster {vision['hd_booster']!r}; there are s2wrapper and -adaptive")
    # A class token that is not dropped is a visual token; SigLIP has none. Clip of 1.0 has a stride nothing reads.
    sizes = {ours: backbone[theirs] for ours, theirs in BACKBONE_WORDS.items() if theirs in backbone}
    tokenize = vision.get("tokenize_function", "softmax")
    keeps = kind == "clip" and not vision.get("drop_cls_token", False) and marks != GRID_MARKS
    return {
        "backbone": {"kind": kind, **sizes},
        "vocab_size": vision["vocab_size"],
        "num_marks": marks,
        "num_views": views,
        "stride": 1 if version_of(config) == "1.0" else int(vision.get("hidden_stride", 1)),
        "keep_class": keeps,
        "tokenize": tokenize,
        **({"tau": float(vision.get("tau", 1.0))} if tokenize == "gumbel_argmax" else {}),  # else read by nothing
    }


def decoder_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `build_ovis(decoder=)` from a completed config.json."""
    told = _plain_rope(config["llm_config"])
    family = told.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json says llm_config.model_type {family!r}; Ovis has {', '.join(FAMILIES)}")
    known = type(decoder_config(family=family))()
    words = [name for name in DECODER_WORDS if told.get(name) is not None]
    # transformers reads rope_theta and rope_scaling into one attribute; words of another family mean nothing here.
    return {"family": family} | {n: told[n] for n in words if n.startswith("rope_") or hasattr(known, n)}


def require_heads(config: Config) -> None:
    """Raise where config.json leaves out what no tensor shows: into how many heads the rows are cut."""
    eyes = (config.get("visual_tokenizer_config") or {}).get("backbone_config")
    parts = {"llm_config": config.get("llm_config"), "visual_tokenizer_config.backbone_config": eyes}
    for name, part in parts.items():
        if "num_attention_heads" not in (part or {}):
            raise ValueError(
                f"config.json does not say {name}.num_attention_heads, which no tensor shows; fetch it again"
            )


def num_marks(vision: Config) -> int:
    """Marks of a visual_tokenizer_config: begin and end, none, or those of the grid."""
    return 2 * bool(vision["use_indicators"]) if "use_indicators" in vision else GRID_MARKS


def version_of(config: Config) -> str:
    """The version a completed config.json is of; CLIP is 1.0's backbone, SigLIP 1.5's, five marks are 1.6's.

    A model of ours that this would misread (a CLIP trained as 1.5) says its version in a word of its own.
    """
    if VERSION in config:
        version_named(config[VERSION])
        return str(config[VERSION])
    vision = config["visual_tokenizer_config"]
    if num_marks(vision) == GRID_MARKS:
        return "1.6"
    return "1.0" if _check_kind(vision["model_type"]) == "clip" else "1.5"


def model_node(config: Config) -> dict[str, Any]:
    """What conf/model would say of the model; the tokenizer is the one beside the weights."""
    package = "bestiary.variants.ovis"
    processor = {"_target_": f"{package}.processor.OvisProcessor", "version": version_of(config), "tokenizer": "."}
    formatter = config.get("conversation_formatter_class")
    if formatter is not None and formatter not in FORMATTERS:
        raise ValueError(
            f"config.json says conversation_formatter_class {formatter!r}; of Ovis 1.0 to 1.6 there are "
            + ", ".join(FORMATTERS)
        )
    decoder = decoder_arguments(config)
    processor["chat_format"] = FORMATTERS[formatter] if formatter else _format_of(decoder["family"])
    adaptive = config["visual_tokenizer_config"].get("hd_booster") == "s2wrapper-adaptive"
    build = {"vision": vision_arguments(config), "decoder": decoder}
    return {
        "name": "ovis",
        "build": {"_target_": f"{package}.model.build_ovis", **build},
        "processor": {**processor, **({"adaptive": True} if adaptive else {})},
        "module": {"_target_": f"{package}.module.OvisModule"},
    }


def config_of(
    model: MultimodalLM, *, chat_format: str, version: str, adaptive: bool, max_length: int
) -> dict[str, Any]:
    """config.json of a model of ours, in the words of the published one."""
    vision = model.vision
    assert isinstance(vision, OvisVision)
    decoder = decoder_words(model.decoder.config)
    formatter = next(name for name, ours in FORMATTERS.items() if ours == chat_format)
    told: dict[str, Any] = {
        "architectures": ["Ovis"],
        "model_type": "ovis",
        "conversation_formatter_class": formatter,
        "hidden_size": decoder["hidden_size"],
        "multimodal_max_length": max_length,
        "llm_config": decoder,
        "visual_tokenizer_config": _vision_words(vision, version=version, adaptive=adaptive),
    }
    return told if version_of(told) == version else {**told, VERSION: version}


def decoder_words(config: PretrainedConfig) -> dict[str, Any]:
    """A decoder's configuration in the words of its config.json, rope_theta as published files have it."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    told = {name: getattr(config, name, None) for name in DECODER_WORDS}
    told |= {"rope_theta": rope.get("rope_theta")}
    if rope.get("rope_type", "default") != "default":
        told["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"model_type": config.model_type} | {name: value for name, value in told.items() if value is not None}


def preprocessor_of(vision: OvisVision) -> dict[str, Any]:
    """preprocessor_config.json for the canvases a model takes (section 1.2: resize, rescale, normalise, no crop)."""
    is_clip = vision.backbone.config.model_type.startswith("clip")
    side = vision.canvas_px
    mean, std = (CLIP_MEAN, CLIP_STD) if is_clip else (HALF, HALF)
    sizes: dict[str, Any] = {"size": {"height": side, "width": side}}
    if is_clip:
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": False}
    return {
        **sizes,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "image_processor_type": "CLIPImageProcessor" if is_clip else "SiglipImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def _vision_words(vision: OvisVision, *, version: str, adaptive: bool) -> dict[str, Any]:
    backbone = vision.backbone.config
    kind = "clip" if backbone.model_type.startswith("clip") else "siglip"
    told = {
        "model_type": f"{kind}_visual_tokenizer",
        "vocab_size": vision.table.num_embeddings,
        "tokenize_function": vision.tokenize,
        "tau": vision.tau,
        "hidden_stride": vision.stride,
        "drop_cls_token": not vision.keep_class,
        "backbone_config": {
            "model_type": f"{kind}_vision_model",
            **{theirs: getattr(backbone, theirs) for theirs in BACKBONE_WORDS.values()},
            "layer_norm_eps": backbone.layer_norm_eps,
        },
    }
    if version != "1.6":
        told["use_indicators"] = vision.num_marks > 0
    if vision.num_views > 1:
        told["hd_booster"] = "s2wrapper-adaptive" if adaptive else "s2wrapper"
    return told


def _plain_rope(told: Config) -> dict[str, Any]:
    """A decoder's words, with the rope_parameters of transformers 5 as the rope_theta and rope_scaling of before."""
    rope = dict(told.get("rope_parameters") or {})
    apart: dict[str, Any] = {"rope_theta": rope.pop("rope_theta", None)}
    if rope.get("rope_type", "default") != "default":
        apart["rope_scaling"] = rope
    return {**apart, **{name: value for name, value in told.items() if value is not None}}


def _check_kind(model_type: str) -> str:
    kind = model_type.partition("_")[0]
    if kind not in BACKBONES:
        raise ValueError(
            f"config.json says visual_tokenizer_config.model_type {model_type!r}; of Ovis 1.0 to 1.6 there are "
            + ", ".join(f"{name}_visual_tokenizer" for name in BACKBONES)
        )
    return kind


def _format_of(family: str) -> str:
    return {"qwen2": "qwen", "llama": "llama3", "gemma2": "gemma"}[family]


def _backbone_told(shapes: Shapes) -> dict[str, Any]:
    width, _, patch, _ = size(shapes, f"{_VIT}.embeddings.patch_embedding.weight", 4)
    places = size(shapes, f"{_VIT}.embeddings.position_embedding.weight", 2)[0]
    has_class = f"{_VIT}.embeddings.class_embedding" in shapes
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(places - has_class),
        "num_hidden_layers": depth(shapes, f"{_VIT}.encoder.layers"),
        "intermediate_size": size(shapes, f"{_VIT}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_attention_heads": 1,
    }


def _stride_told(features: float) -> dict[str, Any]:
    """Stride and views from how many times the backbone's width the head reads: stride^2, or twice it with views."""
    views = 2 if not math.sqrt(features).is_integer() else 1
    return {"hidden_stride": math.isqrt(int(features / views)), "hd_booster": "s2wrapper" if views == 2 else None}


def _decoder_told(shapes: Shapes, told: Config) -> dict[str, Any]:
    first = f"{_LAYER}.0"
    vocab, dim = size(shapes, EMBEDDING, 2)
    queries = size(shapes, f"{first}.self_attn.q_proj.weight", 2)[0]
    keys = size(shapes, f"{first}.self_attn.k_proj.weight", 2)[0]
    is_gemma = f"{first}.pre_feedforward_layernorm.weight" in shapes
    is_qwen = f"{first}.self_attn.q_proj.bias" in shapes
    found = {
        "model_type": "gemma2" if is_gemma else "qwen2" if is_qwen else "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": size(shapes, f"{first}.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": depth(shapes, _LAYER),
    }
    if "num_attention_heads" not in told:  # then any will do that gives these rows
        head = math.gcd(queries, keys)
        found |= {"head_dim": head, "num_attention_heads": queries // head, "num_key_value_heads": keys // head}
    return found
