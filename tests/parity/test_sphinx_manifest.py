"""At the published size, names and shapes map one to one to the manifests; built on the meta device in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.variants.sphinx.consolidated import shard_dim
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.sphinx.weights import manifest
from tests.parity.cases import cases, read_json
from tests.parity.paper_sizes import paper_vision
from tests.parity.sphinx_sizes import decoder_sizes


def _manifests(folder: Path) -> list[dict[str, Any]]:
    parsed = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [m for m in parsed if isinstance(m, dict) and {"params", "llama_type", "image_size"} <= m.keys()]


@pytest.mark.parametrize("folder", cases("sphinx", lambda folder: bool(_manifests(folder))))
def test_names_and_shapes_of_the_published_model_are_ours(folder: Path) -> None:
    for golden in _manifests(folder):
        args = golden["model_args"]
        decoder = decoder_sizes(args, vocab_size=args["vocab_size"], max_seq_len=4096)
        with torch.device("meta"):
            model = build_sphinx(vision=paper_vision(golden["image_size"]), decoder=decoder)
        assert manifest(model) == {name: tuple(shape) for name, shape in golden["params"].items()}
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        assert sum(n for n, _ in sizes) == golden["summary"]["n_params_total"]
        assert sum(n for n, trains in sizes if trains) == golden["summary"]["n_params_trainable"]
        assert model.vision is not None
        assert model.vision.image_rows == golden["image_words"]


@pytest.mark.parametrize("folder", cases("sphinx", lambda folder: bool(_manifests(folder))))
def test_shards_are_cut_where_the_manifest_says(folder: Path) -> None:
    for golden in _manifests(folder):
        cuts = {name: dim for name in golden["params"] if (dim := shard_dim(name)) is not None}
        assert cuts == golden["mp_shard_dim"]
