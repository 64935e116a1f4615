"""Monkey's published names (`transformer.*`, `lm_head.weight`) and ours.

One table of rules for the released model (2581 tensors) and for the decoder adapters of the 3090 variant (384 more).
Source: reference/monkey.md, sections 1 to 3, and the manifests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bestiary.language.tuning import BuiltInAdapters
from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule
from bestiary.variants.hf_folder import HfFolder, read_object
from bestiary.variants.hf_layout import NO_ROTATION
from bestiary.variants.monkey import config_json
from bestiary.variants.monkey.decoder import BESIDE
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
DERIVED = re.compile(r"transformer\.(?:h\.\d+\.attn\.)?(?:rotary_emb\.inv_freq|masked_bias|logn_tensor)")
"""Tables that some files may carry along and every model computes by itself."""


def to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return MONKEY.to_ours(state, head_dim=NO_ROTATION)


def to_reference(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return MONKEY.to_reference(state, head_dim=NO_ROTATION)


def manifest(model: MultimodalLM) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return MONKEY.manifest(model, head_dim=NO_ROTATION)


def load_reference(model: MultimodalLM, state: Mapping[str, torch.Tensor], *, may_lack: Sequence[str] = ()) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`.

    ValueError where the state's adapters are those of another grid of windows.
    """
    check_adapters(model, state)
    return MONKEY.load_reference(model, state, head_dim=NO_ROTATION, may_lack=may_lack)


def built_in_adapters(names: Iterable[str]) -> BuiltInAdapters | None:
    """The decoder's adapters among our names, see `decoder.add_decoder_adapters`; None without any.

    The windows' adapters are not among them: one layer serves all windows, and each has another adapter.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for name in names:
        for owner, adapter, layers in BESIDE:
            if name.startswith("decoder.") and name.endswith(f".{owner}.{adapter}.lora_a.weight"):
                module = name.removesuffix(".lora_a.weight")
                stem = module.removesuffix(adapter)
                found |= {f"{stem}{layer}.weight": (module, n, len(layers)) for n, layer in enumerate(layers)}
    return BuiltInAdapters("decoder_lora", found) if found else None


def load_published(model: MultimodalLM, folder: str | Path, *, may_lack: Sequence[str] = ()) -> Report:
    """Put a published Hugging Face folder into the model, strictly; its config.json must tell of the same model."""
    opened = HfFolder(Path(folder))
    check_config(model, Path(folder))
    state = {name: opened.whole(name) for name in opened.shapes if not DERIVED.fullmatch(name)}
    return load_reference(model, state, may_lack=may_lack)


def check_config(model: MultimodalLM, folder: Path) -> None:
    """Raise where config.json beside weights tells of another Monkey, also in what no tensor shows (heads, grid ...).

    Qwen-VL's tells nothing of windows.
    """
    if not (folder / "config.json").is_file():
        return
    raw = read_object(folder / "config.json")
    config_json.require_heads(raw)
    told = config_json.completed(raw, manifest(model))
    own = config_json.completed(config_json.config_of(model, image_start_id=0), manifest(model))
    ours, theirs = (_flat(config_json.build_arguments(told, {})) for told in (own, told))
    for word, value in theirs.items():
        is_of_monkey = word in ("vision.image_px", "vision.window_px") or word.startswith("vision.adapters")
        if ours.get(word) != value and not (is_of_monkey and config_json.is_qwen_vl(raw)):
            raise ValueError(
                f"{folder / 'config.json'} says {word} {value} but the model has {ours.get(word)}; name the model and "
                "scale that these weights are of, or the model.yaml that an import writes"
            )


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `build_monkey` by dotted names."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}.{word}".rstrip("."): told for word, told in inner.items()}
    return found


def check_adapters(model: MultimodalLM, names: Sequence[str] | Mapping[str, object]) -> None:
    """Raise where published names hold adapters for another number of windows than the model's; none are fine."""
    there = config_json.window_numbers(names)
    vision = model.vision
    assert isinstance(vision, MonkeyVision)
    if there and len(there) != vision.num_adapters:
        raise ValueError(
            f"the weights have adapters for {len(there)} windows, but the model's picture of {vision.height_px} x "
            f"{vision.width_px} px has {vision.num_adapters} with adapters; build it with the grid of the weights, or "
            "leave their adapters out and train new ones"
        )
