"""Looking at checkpoints: the variant, its size and the share that maps; nothing is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bestiary.cli import main
from bestiary.weights.importing import Asked, import_weights
from bestiary.weights.inspecting import inspect
from tests.weights import making


@pytest.mark.parametrize(
    ("with_regions", "llama_type", "variant"),
    [
        (True, "llama_ens5_vp", "sphinx_v"),
        pytest.param(False, "llama_ens", "sphinx", marks=pytest.mark.slow),
        pytest.param(False, "llama_ens10", "ten views", marks=pytest.mark.slow),
    ],
)
def test_published_imported_and_listed_are_described_alike(
    tmp_path: Path, with_regions: bool, llama_type: str, variant: str
) -> None:
    state = making.sphinx(with_regions)
    folder = making.publish(tmp_path / "in", state, llama_type=llama_type)
    import_weights([folder], tmp_path / "out", Asked())
    manifest = tmp_path / "manifest.json"
    listed = {"llama_type": llama_type, "params": {name: list(tensor.shape) for name, tensor in state.items()}}
    manifest.write_text(json.dumps(listed))
    for path in (folder, tmp_path / "out", manifest):
        lines = dict(inspect(path).lines)
        assert variant in lines["variant"]
        assert lines["size"] == f"{len(state):,} tensors, {sum(t.numel() for t in state.values()):,} parameters"
        assert lines["mapped"].startswith(f"100 % of {len(state):,} names")


def test_a_share_is_never_rounded_up_to_all(tmp_path: Path) -> None:
    state = making.llama() | {"llma.odd": torch.ones(1)}
    found = inspect(making.publish(tmp_path / "in", state))
    lines = dict(found.lines)
    assert lines["mapped"].startswith("95.45 % of 22 names: 17 matched, 4 converted, 0 missing, 1 unexpected")
    assert lines["unexpected"] == "first llma.odd"
    assert found.lost == 1


def test_less_than_all_is_an_error_and_tables_that_a_model_computes_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in (("llma.odd", 1), ("llma.rope.freqs", 0)):
        folder = making.publish(tmp_path / name, making.llama() | {name: torch.ones(1)})
        assert main(["weights", "inspect", str(folder)]) == code
        told = capsys.readouterr()
        assert "95.45 % of 22 names" in told.out
        assert told.err == (f"error: {folder}: 1 names are missing, unexpected or of another shape or cut\n" * code)


def test_a_delta_is_told_by_its_names(tmp_path: Path) -> None:
    delta = {"llma.layers.0.attention.wq.weight": torch.ones(16, 16).half()}
    lines = dict(inspect(making.publish(tmp_path / "in", delta, layout="delta")).lines)
    assert lines["layout"].startswith("delta, 2 shards") and lines["dtype"] == "float16"
    assert lines["mapped"].startswith("100 % of 1 names: 0 matched, 1 converted")


@pytest.mark.parametrize("text", ["{}", "[]", '{"a": "b"}', '{"params": 3}', "{"])
def test_a_file_that_is_no_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        inspect(path)
