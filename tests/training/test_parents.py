"""A parent is taken or refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.training.parents import export_weights, load_parent
from tests.training.tiny import tiny_model, tiny_stage, train

IDENTITY = {"tokenizer_sha256": "aaa"}
CHILD = tiny_stage(name="child", parents=["tiny"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "run"
    train(path, stage=tiny_stage(max_steps=2), identity=IDENTITY)
    return path


@pytest.mark.parametrize(
    "below", [".", "checkpoints/last", "checkpoints/step-000002", "checkpoints/last/model.safetensors"]
)
def test_a_run_a_checkpoint_and_a_file_are_taken(trained: Path, below: str) -> None:
    model = tiny_model(seed=9)
    parent = load_parent(model, trained / below, stage=CHILD, identity=IDENTITY)
    assert (parent.stage, parent.step, parent.identity) == ("tiny", 2, IDENTITY)
    saved = load_file(trained / "checkpoints/last/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_wrong_stage_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="is of stage tiny, but stage child starts from other"):
        load_parent(tiny_model(), trained, stage=tiny_stage(name="child", parents=["other"]), identity={})


def test_a_stage_without_parents_refuses_one(trained: Path) -> None:
    with pytest.raises(ValueError, match="starts without a parent"):
        load_parent(tiny_model(), trained, stage=tiny_stage(parents=[]), identity={})


def test_another_tokenizer_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_sha256=aaa, this run has tokenizer_sha256=bbb"):
        load_parent(tiny_model(), trained, stage=CHILD, identity={"tokenizer_sha256": "bbb"})


def test_another_size_is_refused_before_anything_changes(trained: Path) -> None:
    model = tiny_model(width=4)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"has shape \(.*the model has"):
        load_parent(model, trained, stage=CHILD, identity={})
    assert torch.equal(model.head.weight, before)


def test_other_names_are_refused_with_the_nearest(trained: Path, tmp_path: Path) -> None:
    tensors = load_file(trained / "checkpoints/last/model.safetensors")
    tensors["haed.weight"] = tensors.pop("head.weight")
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"stage": "tiny"})
    with pytest.raises(ValueError, match=r"lacks 1 .*head.weight, nearest haed.weight.*holds 1 .*haed.weight, nearest"):
        load_parent(tiny_model(), tmp_path / "odd.safetensors", stage=CHILD, identity={})


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"does not exist|neither a run directory"):
        load_parent(tiny_model(), tmp_path / name, stage=CHILD, identity={})


def test_a_truncated_file_is_one_line(trained: Path, tmp_path: Path) -> None:
    whole = (trained / "checkpoints/last/model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a complete safetensors file") as error:
        load_parent(tiny_model(), tmp_path / "cut.safetensors", stage=CHILD, identity={})
    assert "\n" not in str(error.value)


def test_exported_weights_may_leave_parts_out(tmp_path: Path) -> None:
    source, model = tiny_model(seed=1), tiny_model(seed=2)
    export_weights(source, tmp_path / "w.safetensors", stage="tiny", identity=IDENTITY, leave_out=["encoder.*"])
    kept = model.encoder[0].weight.clone()
    parent = load_parent(model, tmp_path / "w.safetensors", stage=CHILD, identity=IDENTITY)
    assert parent.absent == {"encoder.0.weight", "encoder.0.bias"}
    assert torch.equal(model.encoder[0].weight, kept) and torch.equal(model.head.weight, source.head.weight)


def test_a_file_that_does_not_say_its_stage_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(tiny_model().state_dict(), tmp_path / "bare.safetensors")
    load_parent(tiny_model(), tmp_path / "bare.safetensors", stage=CHILD, identity=IDENTITY)
    assert "does not say which stage" in caplog.text
