"""A parent is taken or refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.training.parents import export_weights, load_first_weights, load_parent
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


def test_training_may_begin_from_fewer_views_but_not_from_more(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "seen.safetensors"
    export_weights(tiny_model(), file, stage="tiny", identity={"views": "whole 0,0"})
    for views, is_taken in (("whole 0,0", True), ("whole 0,0 0,1", True), ("whole", False)):
        for load in (
            lambda ours: load_parent(tiny_model(), file, stage=CHILD, identity=ours),
            lambda ours: load_first_weights(tiny_model(), [str(file)], ours),
        ):
            if is_taken:
                load({"views": views})
                continue
            with pytest.raises(ValueError, match=r"views=whole 0,0, this run has views=whole; .* cut in another way"):
                load({"views": views})


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


GROWN = tiny_stage(name="child", parents=["tiny"], parent_may_lack=["head.*"])


def test_a_parent_of_another_model_may_lack_what_the_stage_names(tmp_path: Path) -> None:
    source, model = tiny_model(seed=1), tiny_model(seed=2)
    save_file(_without(source, "head."), tmp_path / "w.safetensors", metadata={"stage": "tiny"})
    with pytest.raises(ValueError, match=r"lacks 2 of the model's tensors \(head"):
        load_parent(model, tmp_path / "w.safetensors", stage=CHILD, identity={})
    drawn = model.head.weight.clone()
    load_parent(model, tmp_path / "w.safetensors", stage=GROWN, identity={})
    assert torch.equal(model.head.weight, drawn) and torch.equal(model.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match="parent_may_lack: glob 'haed"):
        odd = tiny_stage(name="child", parents=["tiny"], parent_may_lack=["haed.*"])
        load_parent(model, tmp_path / "w.safetensors", stage=odd, identity={})


def test_a_parent_that_holds_a_part_of_what_it_may_lack_is_refused(tmp_path: Path) -> None:
    save_file(_without(tiny_model(), "head.bias"), tmp_path / "w.safetensors", metadata={"stage": "tiny"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(head.bias"):
        load_parent(tiny_model(), tmp_path / "w.safetensors", stage=GROWN, identity={})


def test_what_a_parent_lacks_comes_from_first_weights_alone(tmp_path: Path) -> None:
    source, other, model = tiny_model(seed=1), tiny_model(seed=3), tiny_model(seed=2)
    save_file(_without(source, "head."), tmp_path / "w.safetensors", metadata={"stage": "tiny"})
    save_file(other.state_dict() | {"regions.x": torch.zeros(2)}, tmp_path / "first.safetensors")
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "of_no_use.safetensors")
    files = [str(tmp_path / "of_no_use.safetensors"), str(tmp_path / "first.safetensors")]
    load_parent(model, tmp_path / "w.safetensors", stage=GROWN, identity={}, weights=files, unused=["regions.*"])
    assert torch.equal(model.head.weight, other.head.weight) and torch.equal(model.norm.weight, source.norm.weight)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"lacks 2 tensors \(head.bias ...\), .* nowhere does not exist; .*=\[\]"):
        load_parent(model, tmp_path / "w.safetensors", stage=GROWN, identity={}, weights=["nowhere"])
    assert torch.equal(model.head.weight, before)


def test_first_weights_may_hold_unused_names_only_where_they_are_named(tmp_path: Path) -> None:
    save_file({"regions.x": torch.zeros(2), "norm.bias": torch.ones(8)}, tmp_path / "first.safetensors")
    files, model = [str(tmp_path / "first.safetensors")], tiny_model()
    with pytest.raises(ValueError, match=r"holds 1 that the model has not \(regions.x"):
        load_first_weights(model, files, {})
    assert load_first_weights(model, files, {}, unused=["regions.*"]) == {"norm.bias"}
    assert torch.equal(model.norm.bias, torch.ones(8))


def _without(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}
