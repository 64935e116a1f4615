"""Monkey's published names (`transformer.*`, `lm_head.weight`) and ours.

One table of rules for the released model (2581 tensors) and for the decoder adapters of the 3090 variant (384 more).
Source: reference/monkey.md, sections 1 to 3, and the manifests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule
from bestiary.variants.monkey.model import MonkeyVision

_BLOCK, _LAYER = "transformer.h.{i}", "decoder.model.layers.{i}"
_VISUAL, _VIT = "transformer.visual", "vision.vit"

MONKEY_RULES = (
    Rule("transformer.wte.weight", ("decoder.model.embed_tokens.weight",)),
    Rule("transformer.ln_f.weight", ("decoder.model.norm.weight",)),
    Rule("lm_head.weight", ("decoder.lm_head.weight",)),
    Rule(f"{_BLOCK}.ln_1.weight", (f"{_LAYER}.input_layernorm.weight",)),
    Rule(f"{_BLOCK}.ln_2.weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    Rule(f"{_BLOCK}.attn.c_attn.{{p}}", tuple(f"{_LAYER}.self_attn.{x}_proj.{{p}}" for x in "qkv")),
    Rule(f"{_BLOCK}.attn.c_proj.weight", (f"{_LAYER}.self_attn.o_proj.weight",)),
    Rule(f"{_BLOCK}.attn.c_attn_lora.{{rest}}", (f"{_LAYER}.self_attn.c_attn_lora.{{rest}}",)),
    Rule(f"{_BLOCK}.attn.c_proj_lora.{{rest}}", (f"{_LAYER}.self_attn.c_proj_lora.{{rest}}",)),
    # The gate is w2 (section 9, fact 10).
    Rule(f"{_BLOCK}.mlp.w1.weight", (f"{_LAYER}.mlp.up_proj.weight",)),
    Rule(f"{_BLOCK}.mlp.w2.weight", (f"{_LAYER}.mlp.gate_proj.weight",)),
    Rule(f"{_BLOCK}.mlp.c_proj.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
    Rule(f"{_BLOCK}.mlp.w1_lora.{{rest}}", (f"{_LAYER}.mlp.w1_lora.{{rest}}",)),
    Rule(f"{_BLOCK}.mlp.w2_lora.{{rest}}", (f"{_LAYER}.mlp.w2_lora.{{rest}}",)),
    Rule(f"{_VISUAL}.conv1.weight", (f"{_VIT}.conv1.weight",)),
    Rule(f"{_VISUAL}.positional_embedding", (f"{_VIT}.positional_embedding",)),
    Rule(f"{_VISUAL}.ln_pre.{{p}}", (f"{_VIT}.ln_pre.{{p}}",)),
    Rule(f"{_VISUAL}.transformer.resblocks.{{i}}.{{rest}}", (f"{_VIT}.blocks.{{i}}.{{rest}}",)),
    Rule(f"{_VISUAL}.attn_pool.{{rest}}", ("vision.resampler.{rest}",)),
    Rule(f"{_VISUAL}.ln_post.{{p}}", ("vision.ln_post.{p}",)),
    Rule(f"{_VISUAL}.proj", ("vision.proj",)),
)
MONKEY = Converter(MONKEY_RULES)
ADAPTER_GLOB = "vision.vit.blocks.*_lora.*"
"""Our names of the windows' adapters: what Qwen-VL's weights lack."""
_NO_ROTATION = 2
"""`Converter` asks for the width of a head, which only rotary rules read; there are none."""
_WINDOW = re.compile(r"transformer\.visual\.transformer\.resblocks\.\d+\.(?:attn\.\w+_lora|mlp_lora)\.(\d+)\..+")


def to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return MONKEY.to_ours(state, head_dim=_NO_ROTATION)


def to_reference(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return MONKEY.to_reference(state, head_dim=_NO_ROTATION)


def manifest(model: MultimodalLM) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return MONKEY.manifest(model, head_dim=_NO_ROTATION)


def load_reference(model: MultimodalLM, state: Mapping[str, torch.Tensor], *, may_lack: Sequence[str] = ()) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`.

    ValueError where the state's adapters are those of another grid of windows.
    """
    check_adapters(model, state)
    return MONKEY.load_reference(model, state, head_dim=_NO_ROTATION, may_lack=may_lack)


def check_adapters(model: MultimodalLM, names: Sequence[str] | Mapping[str, object]) -> None:
    """Raise where published names hold adapters for another number of windows than the model's; none are fine."""
    there = {int(match[1]) for name in names if (match := _WINDOW.fullmatch(name))}
    vision = model.vision
    assert isinstance(vision, MonkeyVision)
    has_adapters = any(_WINDOW.fullmatch(name) for name in manifest(model))
    wanted = vision.num_windows if has_adapters else 0
    if there and len(there) != wanted:
        raise ValueError(
            f"the weights have adapters for {len(there)} windows, but the model's picture of {vision.height_px} x "
            f"{vision.width_px} px has {wanted} with adapters; build it with the grid of the weights, or leave their "
            "adapters out and train new ones"
        )
