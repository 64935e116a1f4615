"""Exports give back what an import read, in any layout, and fill a trained run's own values in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bestiary.training.parents import export_weights as save_run
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.weights.exporting import export_weights
from bestiary.weights.importing import Asked, import_weights
from tests.variants.sphinx_tiny import DECODER
from tests.weights import making

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "shards"),
    [
        ("llama", 1),
        ("llama", 2),
        ("sphinx_v", 2),
        *(pytest.param(kind, n, marks=SLOW) for kind, n in (("sphinx", 1), ("sphinx", 2), ("sphinx_v", 1))),
    ],
)
def test_a_round_trip_gives_the_files_back(tmp_path: Path, kind: str, shards: int) -> None:
    state = making.llama() if kind == "llama" else making.sphinx(with_regions=kind == "sphinx_v")
    state = {name: state[name] for name in sorted(state, key=lambda name: name[::-1])}  # an order of no model
    state["llma.norm.weight"] = state["llma.norm.weight"].double()
    folder = making.publish(tmp_path / "in", state, shards=shards)
    import_weights([folder], tmp_path / "out", Asked())
    export_weights(tmp_path / "out", tmp_path / "back")
    making.assert_same_folders(folder, tmp_path / "back")


def test_metas_layout_keeps_its_names_and_its_table(tmp_path: Path) -> None:
    state = making.llama() | {"llma.rope.freqs": torch.rand(2)}
    folder = making.publish(tmp_path / "in", state, layout="meta")
    assert import_weights([folder], tmp_path / "out", Asked()).fit.unexpected == ("llma.rope.freqs",)
    export_weights(tmp_path / "out", tmp_path / "back")
    making.assert_same_folders(folder, tmp_path / "back")


def test_another_layout_and_number_of_shards_is_that_layouts_own_folder(tmp_path: Path) -> None:
    meta = making.publish(tmp_path / "meta", making.llama(), layout="meta")
    import_weights([meta], tmp_path / "out", Asked())
    export_weights(tmp_path / "out", tmp_path / "one", layout="consolidated", num_shards=1)
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    assert told["vocab_size"] == 50 and json.loads((tmp_path / "one" / "meta.json").read_text())
    expected = making.publish(tmp_path / "expected", making.llama(), shards=1)
    for folder in (expected, tmp_path / "one"):
        for path in folder.glob("*.json"):
            path.unlink()
    making.assert_same_folders(expected, tmp_path / "one")


def test_trained_weights_go_back_in_the_published_dtype_with_what_they_left_out(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in making.sphinx().items()}
    import_weights([making.publish(tmp_path / "in", state, llama_type="llama_ens")], tmp_path / "base", Asked())
    model = build_sphinx(vision=making.WITH_TEXT, decoder=DECODER)
    with torch.no_grad():
        model.decoder.lm_head.weight.fill_(0.5)
    save_run(model, tmp_path / "run.safetensors", stage="s", identity={}, leave_out=["vision.clip.*"])
    with pytest.raises(ValueError, match="--like"):
        export_weights(tmp_path / "run.safetensors", tmp_path / "back")
    done = export_weights(tmp_path / "run.safetensors", tmp_path / "back", like=tmp_path / "base", num_shards=1)
    assert done.filled and done.cast
    back = torch.load(tmp_path / "back" / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    assert list(back) == list(state) and {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert bool((back["llma.output.weight"] == 0.5).all())
    assert torch.equal(back["llma.clip.visual.conv1.weight"], state["llma.clip.visual.conv1.weight"])


def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    import_weights([making.publish(tmp_path / "in", making.llama())], tmp_path / "llama", Asked())
    import_weights([making.publish(tmp_path / "in2", making.sphinx())], tmp_path / "sphinx", Asked())
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot be cut into 7 equal shards along dimension"):
        export_weights(tmp_path / "llama", tmp_path / "back", num_shards=7)
    with pytest.raises(ValueError, match="--shards 0"):
        export_weights(tmp_path / "llama", tmp_path / "back", num_shards=0)
    with pytest.raises(ValueError, match="LLaMA alone"):
        export_weights(tmp_path / "sphinx", tmp_path / "back", layout="meta")
    with pytest.raises(ValueError, match="is it the import this model began as"):
        export_weights(tmp_path / "sphinx", tmp_path / "back", like=tmp_path / "llama")
    with pytest.raises(ValueError, match="does not exist"):
        export_weights(tmp_path / "none", tmp_path / "back", like=tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="bytes, the manifest says"):
        export_weights(tmp_path / "llama", tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == there
