"""SPHINX-V 13B on the meta device: names and shapes map one to one to the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bestiary.variants.sphinx.consolidated import shard_dim
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.weights import manifest
from tests.parity.cases import cases, has, read_json
from tests.parity.paper_sizes import PAPER_DECODER, paper_vision


@pytest.mark.parametrize("folder", cases("sphinxv", has("sphinxv_13b_params.json")))
def test_names_and_shapes_of_the_published_model_are_ours(folder: Path) -> None:
    golden = read_json(folder / "sphinxv_13b_params.json")
    with torch.device("meta"):
        model = build_sphinx_v(vision=paper_vision(), decoder=PAPER_DECODER)
    ours = manifest(model)
    assert ours == {name: tuple(shape) for name, shape in golden.items()}
    split = folder / "model_parallel_split_dim.json"
    if split.is_file():
        assert {name: dim for name in golden if (dim := shard_dim(name)) is not None} == read_json(split)
    assert sum(p.numel() for p in model.parameters()) == 16_465_009_537  # sphinx_v report 1.5
