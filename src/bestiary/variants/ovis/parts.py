"""Public weights of Ovis' single parts, for training from scratch: any published decoder, a CLIP or SigLIP encoder.

What the published code takes from Hugging Face before stage 1 (reference/ovis.md, sections 1.2, 2 and 5), in
transformers' own names. LLaMA and CLIP are parts of SPHINX, too, so an import for Ovis says so (`--for ovis`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from bestiary.language.decoder import Decoder
from bestiary.variants.conversion import Converter, Rule
from bestiary.variants.ovis.config_json import BACKBONE_WORDS, decoder_arguments
from bestiary.variants.ovis.model import decoder_config
from bestiary.variants.ovis.visual_tokenizer import BACKBONES
from bestiary.variants.parts import ANY_HEADS, Part, Shapes, depth, size

_BACKBONE = "vision.backbone"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT = r"text_model\..+|text_projection\..+|visual_projection\.weight|logit_scale|logit_bias"
_IDS = r"(?:vision_model\.)?embeddings\.position_ids"


def _decoder(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    if lost := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise ValueError(f"config.json does not say {lost[0]} of the decoder; fetch it again")
    decoder = Decoder(decoder_config(**_arguments(config)), attention="sdpa")
    if config.get("tie_word_embeddings") and "decoder.lm_head.weight" not in shapes:
        decoder.lm_head = nn.Identity()  # the embedding under another name, and so not in the files
    return decoder


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_arguments({"llm_config": config})


def _decoder_settings(config: Mapping[str, Any]) -> list[str]:
    return [f"model.build.decoder.{key}={_word(value)}" for key, value in _arguments(config).items()]


def _backbone(shapes: Shapes, config: Mapping[str, Any], *, kind: str) -> nn.Module:
    width, _, _, patch_px = size(shapes, f"{_BACKBONE}.embeddings.patch_embedding.weight", 4)
    places = size(shapes, f"{_BACKBONE}.embeddings.position_embedding.weight", 2)[0]
    module: nn.Module = BACKBONES[kind](
        image_px=math.isqrt(places - (kind == "clip")) * patch_px,
        patch_px=patch_px,
        width=width,
        layers=depth(shapes, f"{_BACKBONE}.encoder.layers"),
        heads=ANY_HEADS,
        mlp_dim=size(shapes, f"{_BACKBONE}.encoder.layers.0.mlp.fc1.weight", 2)[0],
    )
    return module


def _backbone_settings(config: Mapping[str, Any], *, kind: str) -> list[str]:
    vision = config.get("vision_config") or config
    told = {"kind": kind} | {ours: vision[theirs] for ours, theirs in BACKBONE_WORDS.items() if theirs in vision}
    return [f"model.build.vision.backbone.{key}={_word(value)}" for key, value in told.items()]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decoder_part(name: str, kind: str) -> Part:
    return Part(
        name,
        "decoder",
        ("", "model.embed_tokens.weight"),
        Converter((Rule("{rest}", ("decoder.{rest}",)),)),
        _decoder,
        types=(kind,),
        dropped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        settings=_decoder_settings,
        embedding="model.embed_tokens.weight",
        model="ovis",
        allows_spare_ids=True,
    )


def _backbone_part(name: str, kind: str, prefix: str, sign: str) -> Part:
    return Part(
        name,
        _BACKBONE,
        (prefix, sign),
        Converter((Rule("{rest}", (f"{_BACKBONE}.{{rest}}",)),)),
        partial(_backbone, kind=kind),
        types=(kind, f"{kind}_vision_model"),
        dropped=f"{_TEXT}|{_IDS}",
        settings=partial(_backbone_settings, kind=kind),
        model="ovis",
    )


OVIS_PARTS = (
    _decoder_part("Qwen2", "qwen2"),
    _decoder_part("LLaMA", "llama"),
    _decoder_part("Gemma 2", "gemma2"),
    *(_backbone_part("CLIP", "clip", prefix, "embeddings.class_embedding") for prefix in ("vision_model.", "")),
    *(
        _backbone_part("SigLIP", "siglip", prefix, "embeddings.position_embedding.weight")
        for prefix in ("vision_model.", "")
    ),
)
