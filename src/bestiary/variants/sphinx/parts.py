"""Public weights of SPHINX's single parts, for training from scratch: decoder and encoders under our names.

What the published code loads one by one before stage 1 (LLaMA2-Accessory commit 3777c43, llama_ens.py: LLaMA-2, BLIP-2,
CLIP ViT-L-14, ConvNeXt-XXL, DINOv2 ViT-g/14), in the layouts in which those are published: transformers' own, timm's,
open_clip's and torch.hub's. The names inside are theirs, read off their released files and code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig

from bestiary.language.decoder import Decoder
from bestiary.variants.conversion import Converter, Rule
from bestiary.variants.parts import ANY_HEADS, Part, depth, size
from bestiary.vision.encoders import ClipTower, ConvNextTower, Dinov2Tower, QFormerTower

Shapes = Mapping[str, Sequence[int]]

_CLIP, _CONVNEXT, _DINOV2, _QFORMER = (f"vision.{part}" for part in ("clip", "convnext", "dinov2", "qformer"))


def _same(theirs: str, ours: str) -> Rule:
    return Rule(theirs, (ours,))


LLAMA_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _llama(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    if lost := [key for key in LLAMA_SIZES[:-1] if not isinstance(config.get(key), int)]:
        raise ValueError(f"config.json does not say {lost[0]} of the LLaMA decoder; fetch it again")
    return Decoder(LlamaConfig(**{key: config[key] for key in LLAMA_SIZES if config.get(key)}), attention="sdpa")


def _llama_settings(config: Mapping[str, Any]) -> list[str]:
    rope = config.get("rope_parameters") or {}
    told = {
        "dim": config.get("hidden_size"),
        "n_layers": config.get("num_hidden_layers"),
        "n_heads": config.get("num_attention_heads"),
        "n_kv_heads": config.get("num_key_value_heads"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("rms_norm_eps"),
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta"),
    }
    if config.get("hidden_act", "silu") != "silu" or config.get("attention_bias"):
        raise ValueError("config.json tells of another activation or of biases, which no LLaMA decoder of ours has")
    return [f"model.build.decoder.{key}={value}" for key, value in told.items() if value is not None]


def _clip(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    tower = f"{_CLIP}.tower"
    width, _, _, patch_px = size(shapes, f"{tower}.embeddings.patch_embedding.weight", 4)
    positions = size(shapes, f"{tower}.embeddings.position_embedding.weight", 2)[0]
    return ClipTower(
        view_px=math.isqrt(positions - 1) * patch_px,
        patch_px=patch_px,
        width=width,
        layers=depth(shapes, f"{tower}.encoder.layers"),
        heads=ANY_HEADS,
        mlp_dim=size(shapes, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2)[0],
    )


def _clip_settings(config: Mapping[str, Any]) -> list[str]:
    vision = config.get("vision_config") or config
    heads = vision.get("num_attention_heads")
    told = {"heads": heads, "activation": vision.get("hidden_act", "quick_gelu")}
    return [f"model.build.vision.clip.{key}={value}" for key, value in told.items() if value is not None]


def _convnext(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    tower = f"{_CONVNEXT}.tower"
    stages = range(depth(shapes, f"{tower}.encoder.stages"))
    stem_px = size(shapes, f"{tower}.embeddings.patch_embeddings.weight", 4)[-1]
    last = f"{tower}.encoder.stages.{{}}.layers.0.layer_scale_parameter"
    return ConvNextTower(
        depths=[depth(shapes, f"{tower}.encoder.stages.{stage}.layers") for stage in stages],
        widths=[size(shapes, last.format(stage), 1)[0] for stage in stages],
        stem_px=stem_px,
        input_px=stem_px * 2 ** (len(stages) - 1),
    )


def _dinov2(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    tower = f"{_DINOV2}.tower"
    width, _, _, patch_px = size(shapes, f"{tower}.embeddings.patch_embeddings.projection.weight", 4)
    grid = math.isqrt(size(shapes, f"{tower}.embeddings.position_embeddings", 3)[1] - 1)
    swiglu = f"{tower}.encoder.layer.0.mlp.down_proj.weight" in shapes
    hidden = f"{tower}.encoder.layer.0.mlp.fc1.weight"
    return Dinov2Tower(
        view_px=grid * patch_px,
        patch_px=patch_px,
        width=width,
        layers=depth(shapes, f"{tower}.encoder.layer"),
        heads=ANY_HEADS,
        position_grid=grid,
        swiglu=swiglu,
        **({} if swiglu else {"mlp_ratio": size(shapes, hidden, 2)[0] // width}),
    )


def _qformer(shapes: Shapes, config: Mapping[str, Any]) -> nn.Module:
    layers, vit = f"{_QFORMER}.qformer.encoder.layer", f"{_QFORMER}.vision_model"
    _, queries, width = size(shapes, f"{_QFORMER}.query_tokens", 3)
    vit_width, _, _, patch_px = size(shapes, f"{vit}.embeddings.patch_embedding.weight", 4)
    positions = size(shapes, f"{vit}.embeddings.position_embedding", 3)[1]
    count = depth(shapes, layers)
    crossing = [n for n in range(count) if f"{layers}.{n}.crossattention.attention.query.weight" in shapes]
    return QFormerTower(
        view_px=math.isqrt(positions - 1) * patch_px,
        patch_px=patch_px,
        num_queries=queries,
        width=width,
        layers=count,
        heads=ANY_HEADS,
        mlp_dim=size(shapes, f"{layers}.0.intermediate_query.dense.weight", 2)[0],
        cross_every=crossing[1] if len(crossing) > 1 else count,
        vit={
            "width": vit_width,
            "layers": depth(shapes, f"{vit}.encoder.layers"),
            "heads": ANY_HEADS,
            "mlp_dim": size(shapes, f"{vit}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        },
    )


def _from_sphinx(rules: Sequence[Rule], theirs: str) -> Converter:
    """The rules of one encoder as published inside SPHINX, without the prefix it has there."""
    inside = [rule for rule in rules if rule.theirs.startswith(f"{theirs}.")]
    return Converter(tuple(Rule(rule.theirs.removeprefix(f"{theirs}."), rule.ours) for rule in inside))


def _dinov2_rules() -> Converter:
    layer, ours = "encoder.layer.{i}", f"{_DINOV2}.tower.encoder.layer.{{i}}"
    attention = {"attention.query": "q", "attention.key": "k", "attention.value": "v", "output.dense": "o"}
    return Converter(
        (
            *(
                _same(f"{layer}.attention.{theirs}.{{p}}", f"{ours}.attention.{x}_proj.{{p}}")
                for theirs, x in attention.items()
            ),
            Rule(f"{layer}.mlp.weights_in.{{p}}", (f"{ours}.mlp.gate_proj.{{p}}", f"{ours}.mlp.up_proj.{{p}}")),
            _same(f"{layer}.mlp.weights_out.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
            _same("{rest}", f"{_DINOV2}.tower.{{rest}}"),
        )
    )


def sphinx_parts(rules: Sequence[Rule]) -> tuple[Part, ...]:
    """All layouts of all parts; rules: SPHINX's, whose encoders carry timm's and torch.hub's names."""
    clip = Converter((_same("{rest}", f"{_CLIP}.tower.{{rest}}"),))
    text = (
        r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale"
        r"|(?:vision_model\.)?embeddings\.position_ids"
    )
    open_text = (
        r"(?:transformer|token_embedding|ln_final|text|visual\.head)\..+|positional_embedding|text_projection"
        r"|logit_scale|logit_bias"
    )
    return (
        Part(
            "LLaMA",
            "decoder",
            ("", "model.embed_tokens.weight"),
            Converter((_same("{rest}", "decoder.{rest}"),)),
            _llama,
            types=("llama",),
            dropped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
            settings=_llama_settings,
            embedding="model.embed_tokens.weight",
        ),
        *(
            Part(
                "CLIP",
                _CLIP,
                (prefix, "embeddings.class_embedding"),
                clip,
                _clip,
                types=("clip", "clip_vision_model"),
                dropped=text,
                settings=_clip_settings,
            )
            for prefix in ("vision_model.", "")
        ),
        *(
            Part(
                "ConvNeXt",
                _CONVNEXT,
                (prefix, "embeddings.patch_embeddings.weight"),
                Converter((_same("{rest}", f"{_CONVNEXT}.tower.{{rest}}"),)),
                _convnext,
                types=("convnext",),
                dropped=r"classifier\..+",
            )
            for prefix in ("convnext.", "")
        ),
        *(
            Part(
                "ConvNeXt",
                _CONVNEXT,
                (prefix, "stem.0.weight"),
                _from_sphinx(rules, "llma.openclip_convnext_xxl"),
                _convnext,
                dropped=rf"{open_text}|(?:visual\.trunk\.)?head\.fc\..+",
            )
            for prefix in ("visual.trunk.", "")
        ),
        *(
            Part(
                "DINOv2",
                _DINOV2,
                (prefix, "embeddings.position_embeddings"),
                _dinov2_rules(),
                _dinov2,
                types=("dinov2",),
                dropped=r"classifier\..+",
            )
            for prefix in ("dinov2.", "")
        ),
        Part("DINOv2", _DINOV2, ("", "pos_embed"), _from_sphinx(rules, "llma.dinov2_vitg14"), _dinov2),
        Part(
            "BLIP-2",
            _QFORMER,
            ("", "query_tokens"),
            Converter((_same("{rest}", f"{_QFORMER}.{{rest}}"),)),
            _qformer,
            types=("blip-2", "blip_2"),
            dropped=r"language_model\..+|language_projection\..+|(?:vision_model|qformer)\.embeddings\.position_ids",
        ),
    )
