"""At the published size Monkey's names and shapes map one to one to the manifests; built on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.monkey.model import build_monkey
from bestiary.variants.monkey.weights import manifest
from tests.parity.cases import cases, has, read_json


def _published(folder: Path, **changes: Any) -> MultimodalLM:
    """A model of the sizes that a manifest's shapes tell; heads, windows and patches are those of the paper."""
    shapes = read_json(folder / "full_manifest.json")
    lora = "transformer.visual.transformer.resblocks.0.attn.in_proj_lora."
    block = "transformer.visual.transformer.resblocks.{}.ln_1.weight"
    num_windows = sum(name.startswith(lora) for name in shapes) // 3
    width, hidden = shapes["transformer.visual.ln_pre.weight"][0], shapes["transformer.ln_f.weight"][0]
    vision = {
        "image_px": [448, 448 * num_windows],
        "window_px": 448,
        "patch_px": shapes["transformer.visual.conv1.weight"][-1],
        "width": width,
        "layers": sum(block.format(i) in shapes for i in range(1000)),
        "heads": 16,
        "num_queries": shapes["transformer.visual.attn_pool.query"][0],
        "adapters": {
            "attention_rank": shapes[f"{lora}0.lora_a.weight"][0],
            "mlp_rank": shapes[f"{lora}0.lora_a.weight".replace("attn.in_proj_lora", "mlp_lora")][0],
        },
    }
    decoder = {
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.h.0.mlp.w1.weight"][0],
        "num_hidden_layers": sum(f"transformer.h.{i}.ln_1.weight" in shapes for i in range(1000)),
        "num_attention_heads": hidden // 128,
        "vocab_size": shapes["lm_head.weight"][0],
        "max_position_embeddings": 8192,
    }
    with torch.device("meta"):
        return build_monkey(vision=vision, decoder=decoder, **changes)


FULL = pytest.mark.parametrize("folder", cases("monkey", has("full_manifest.json")))
EXTRA = "full_manifest_llm_lora_extra.json"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in read_json(path).items()}


@pytest.mark.slow
@FULL
def test_names_and_shapes_of_the_published_model_are_ours(folder: Path) -> None:
    model, shapes = _published(folder), _shapes(folder / "full_manifest.json")
    assert manifest(model) == shapes
    queries = shapes["transformer.visual.attn_pool.query"][0]
    assert model.layout["image_rows"] == model.layout["num_views"] * queries


@pytest.mark.slow
@pytest.mark.parametrize("folder", cases("monkey", has("full_manifest.json", EXTRA)))
def test_names_and_shapes_of_the_3090_variant_are_ours(folder: Path) -> None:
    model = _published(folder, decoder_lora={})
    assert manifest(model) == _shapes(folder / "full_manifest.json") | _shapes(folder / EXTRA)
