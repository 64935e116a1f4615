"""SPHINX's published names (2349 tensors with the prefix `llma.`) and ours.

Sources: LLaMA2-Accessory commit 3777c43; open_clip, timm, DINOv2 and transformers for the names inside the encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bestiary.language.llama_names import _BLOCK, _TOP
from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule
from bestiary.variants.sphinx.consolidated import read_published
from bestiary.variants.sphinx.model import SphinxVision
from bestiary.variants.sphinx.sizes import check_views


def _same(theirs: str, ours: str) -> Rule:
    return Rule(theirs, (ours,))


def _clip_rules() -> tuple[Rule, ...]:
    theirs, ours = "llma.clip", "vision.clip.tower"
    block, layer = f"{theirs}.visual.transformer.resblocks.{{i}}", f"{ours}.encoder.layers.{{i}}"
    return (
        _same(f"{theirs}.visual.class_embedding", f"{ours}.embeddings.class_embedding"),
        _same(f"{theirs}.visual.positional_embedding", f"{ours}.embeddings.position_embedding.weight"),
        _same(f"{theirs}.visual.conv1.weight", f"{ours}.embeddings.patch_embedding.weight"),
        _same(f"{theirs}.visual.ln_pre.{{p}}", f"{ours}.pre_layrnorm.{{p}}"),
        _same(f"{theirs}.visual.ln_post.{{p}}", f"{ours}.post_layernorm.{{p}}"),
        Rule(f"{block}.attn.in_proj_{{p}}", tuple(f"{layer}.self_attn.{x}_proj.{{p}}" for x in "qkv")),
        _same(f"{block}.attn.out_proj.{{p}}", f"{layer}.self_attn.out_proj.{{p}}"),
        _same(f"{block}.ln_1.{{p}}", f"{layer}.layer_norm1.{{p}}"),
        _same(f"{block}.ln_2.{{p}}", f"{layer}.layer_norm2.{{p}}"),
        _same(f"{block}.mlp.c_fc.{{p}}", f"{layer}.mlp.fc1.{{p}}"),
        _same(f"{block}.mlp.c_proj.{{p}}", f"{layer}.mlp.fc2.{{p}}"),
        _same(f"{theirs}.visual.proj", "vision.clip.unused.visual_proj"),
        _same(f"{theirs}.positional_embedding", "vision.clip.unused.positional_embedding"),
        _same(f"{theirs}.text_projection", "vision.clip.unused.text_projection"),
        _same(f"{theirs}.logit_scale", "vision.clip.unused.logit_scale"),
        _same(f"{theirs}.token_embedding.weight", "vision.clip.unused.token_embedding_weight"),
        _same(f"{theirs}.ln_final.{{p}}", "vision.clip.unused.ln_final_{p}"),
    )


def _convnext_rules() -> tuple[Rule, ...]:
    theirs, ours = "llma.openclip_convnext_xxl", "vision.convnext.tower"
    stage, our_stage = f"{theirs}.stages.{{i}}", f"{ours}.encoder.stages.{{i}}"
    block, layer = f"{stage}.blocks.{{j}}", f"{our_stage}.layers.{{j}}"
    return (
        _same(f"{theirs}.stem.0.{{p}}", f"{ours}.embeddings.patch_embeddings.{{p}}"),
        _same(f"{theirs}.stem.1.{{p}}", f"{ours}.embeddings.layernorm.{{p}}"),
        _same(f"{stage}.downsample.{{j}}.{{p}}", f"{our_stage}.downsampling_layer.{{j}}.{{p}}"),
        _same(f"{block}.gamma", f"{layer}.layer_scale_parameter"),
        _same(f"{block}.conv_dw.{{p}}", f"{layer}.dwconv.{{p}}"),
        _same(f"{block}.norm.{{p}}", f"{layer}.layernorm.{{p}}"),
        _same(f"{block}.mlp.fc1.{{p}}", f"{layer}.pwconv1.{{p}}"),
        _same(f"{block}.mlp.fc2.{{p}}", f"{layer}.pwconv2.{{p}}"),
        _same(f"{theirs}.head.norm.{{p}}", f"{ours}.layernorm.{{p}}"),
    )


def _dinov2_rules() -> tuple[Rule, ...]:
    theirs, ours = "llma.dinov2_vitg14", "vision.dinov2.tower"
    block, layer = f"{theirs}.blocks.{{i}}", f"{ours}.encoder.layer.{{i}}"
    return (
        _same(f"{theirs}.cls_token", f"{ours}.embeddings.cls_token"),
        _same(f"{theirs}.mask_token", f"{ours}.embeddings.mask_token"),
        _same(f"{theirs}.pos_embed", f"{ours}.embeddings.position_embeddings"),
        _same(f"{theirs}.patch_embed.proj.{{p}}", f"{ours}.embeddings.patch_embeddings.projection.{{p}}"),
        Rule(f"{block}.attn.qkv.{{p}}", tuple(f"{layer}.attention.{x}_proj.{{p}}" for x in "qkv")),
        _same(f"{block}.attn.proj.{{p}}", f"{layer}.attention.o_proj.{{p}}"),
        Rule(f"{block}.mlp.w12.{{p}}", (f"{layer}.mlp.gate_proj.{{p}}", f"{layer}.mlp.up_proj.{{p}}")),
        _same(f"{block}.mlp.w3.{{p}}", f"{layer}.mlp.down_proj.{{p}}"),
        _same(f"{block}.mlp.fc{{j}}.{{p}}", f"{layer}.mlp.fc{{j}}.{{p}}"),
        _same(f"{block}.ls{{j}}.gamma", f"{layer}.layer_scale{{j}}.lambda1"),
        _same(f"{block}.norm{{j}}.{{p}}", f"{layer}.norm{{j}}.{{p}}"),
        _same(f"{theirs}.norm.{{p}}", f"{ours}.layernorm.{{p}}"),
    )


def _decoder_rules() -> tuple[Rule, ...]:
    top = (_same(f"llma.{theirs}", f"decoder.{ours}") for theirs, ours in _TOP.items())
    blocks = (
        Rule(f"llma.layers.{{i}}.{theirs}", (f"decoder.model.layers.{{i}}.{ours}",), rotary=ours in ROTARY)
        for theirs, ours in _BLOCK.items()
    )
    return (*top, *blocks)


ROTARY = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
"""Projections whose rows are reordered: Meta rotates neighbours, transformers halves."""

SPHINX_RULES = (
    *_decoder_rules(),
    *_clip_rules(),
    *_convnext_rules(),
    *_dinov2_rules(),
    _same("llma.qformer.{rest}", "vision.qformer.{rest}"),
    _same("llma.qformer_proj.{i}.{p}", "vision.qformer_proj.{i}.{p}"),
    _same("llma.visual_proj.{i}.{p}", "vision.visual_proj.{i}.{p}"),
    _same("llma.start_img", "vision.start"),
    _same("llma.end_img", "vision.end"),
)

SPHINX = Converter(SPHINX_RULES)


def head_dim(model: MultimodalLM) -> int:
    """Width of one attention head of the decoder."""
    config = model.decoder.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def to_ours(
    state: Mapping[str, torch.Tensor], model: MultimodalLM, *, names: Converter = SPHINX
) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return names.to_ours(state, head_dim=head_dim(model))


def to_reference(
    state: Mapping[str, torch.Tensor], model: MultimodalLM, *, names: Converter = SPHINX
) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return names.to_reference(state, head_dim=head_dim(model))


def manifest(model: MultimodalLM, *, names: Converter = SPHINX) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return names.manifest(model, head_dim=head_dim(model))


def load_reference(
    model: MultimodalLM,
    state: Mapping[str, torch.Tensor],
    *,
    may_lack: Sequence[str] = (),
    names: Converter = SPHINX,
) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`."""
    return names.load_reference(model, state, head_dim=head_dim(model), may_lack=may_lack)


def load_published(
    model: MultimodalLM, folder: str | Path, *, may_lack: Sequence[str] = (), names: Converter = SPHINX
) -> Report:
    """Put a published checkpoint folder (consolidated.RR-of-NN.model.pth) into the model, strictly.

    SPHINX's own folder starts SPHINX-V with `may_lack=["regions.*"]`.
    """
    if isinstance(model.vision, SphinxVision):
        check_views(Path(folder), model.vision.views)
    return names.load_reference(
        model,
        read_published(folder),
        head_dim=head_dim(model),
        may_lack=may_lack,
        origin=f"the published checkpoint {folder}",
    )
