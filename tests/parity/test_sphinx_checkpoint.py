"""Published checkpoint folders in tensor-parallel shards: put together they are the case's weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bestiary.variants.sphinx.consolidated import FILE_NAME, read_published
from tests.parity.cases import ROOT, cases


def _is_case(folder: Path) -> bool:
    return any(FILE_NAME.fullmatch(path.name) for path in folder.glob("*.pth"))


@pytest.mark.parametrize("folder", cases("sphinx", _is_case))
def test_merged_shards_are_the_weights_of_their_case(folder: Path) -> None:
    merged = read_published(folder)
    twins = [load_file(path) for path in sorted((ROOT / "sphinx").rglob("weights.safetensors"))]
    assert any(
        twin.keys() == merged.keys() and all(torch.equal(merged[name], twin[name]) for name in twin) for twin in twins
    )
