"""Checkpoints are complete or absent, and what is wrong with one is said in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bestiary.saved_weights import CheckpointError, open_weights
from bestiary.training import checkpoints
from bestiary.training.checkpoints import TrainState, newest, read, rng_states, set_rng_states
from bestiary.training.report import Totals


def put(root: Path, step: int, *, keep: int = 0, value: float = 1.0) -> Path:
    state = TrainState(
        step=step,
        stage="one",
        seed=5,
        totals=Totals(samples=3, samples_by_source={"a": 3}),
        lanes={1: b"\x00\xff", 0: b"zero"},
        fingerprint={"n": 2},
        identity={"tokenizer": "abc"},
    )
    weight = torch.full((2, 3), value)
    return checkpoints.write(
        root,
        state,
        model={"a.weight": weight, "b.weight": weight, "c": torch.arange(3)},
        optimizer={"exp_avg/a.weight": torch.ones(2, 3)},
        rng={"0/torch": torch.get_rng_state()},
        keep=keep,
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    checkpoint = read(put(tmp_path, 7))
    assert checkpoint.state.lanes == {0: b"zero", 1: b"\x00\xff"}
    assert checkpoint.state.totals == Totals(samples=3, samples_by_source={"a": 3})
    assert checkpoint.state.identity == {"tokenizer": "abc"}
    weights = checkpoint.model()
    assert set(weights) == {"a.weight", "b.weight", "c"} and torch.equal(weights["b.weight"], weights["a.weight"])
    assert torch.equal(checkpoint.optimizer()["exp_avg/a.weight"], torch.ones(2, 3))
    assert checkpoint.rng(0) is not None and checkpoint.rng(1) is None


def test_last_points_to_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=2)
    assert checkpoints.steps(tmp_path) == [2, 3]
    assert os.readlink(tmp_path / "last") == "step-000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-000002", "step-000003"]


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    put(tmp_path, 4, value=1.0)
    assert read(put(tmp_path, 4, value=2.0)).model()["a.weight"][0, 0] == 2.0


def test_an_interrupted_write_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", dies)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2)
    found = newest(tmp_path)
    assert found is not None and found.state.step == 1
    put(tmp_path, 3)
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "rng.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_damage_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    {"truncated": lambda: path.write_bytes(content[:-1]), "altered": lambda: path.write_bytes(content),
     "gone": path.unlink}[damage]()  # fmt: skip
    said = {"truncated": "the manifest says", "altered": "sha256", "gone": "not there"}[damage]
    with pytest.raises(CheckpointError, match=said) as error:
        read(tmp_path / "step-000002")
    assert name in str(error.value) and "\n" not in str(error.value)
    found = newest(tmp_path)
    assert found is not None and found.state.step == 1


def test_a_manifest_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    (folder / "MANIFEST.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(folder)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        read(folder)
    assert newest(tmp_path) is None and newest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("tied", {"b": 3}), ("tied", {"b": "gone"}), ("identity", []), ("step", "2"), ("absent", None), ("format", 9)],
)
def test_a_state_that_was_made_by_hand_is_one_line_whatever_its_hashes_say(
    tmp_path: Path, key: str, value: object
) -> None:
    folder = put(tmp_path, 1)
    told = json.loads((folder / "state.json").read_text())
    _sealed_again(folder, json.dumps({**told, key: value}))
    with pytest.raises(CheckpointError, match="take another checkpoint") as error:
        open_weights(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 1}', '{"format": 1, "lanes": {"a": 1}, "totals": 3}'])
def test_a_state_that_is_no_state_is_one_line_for_every_reader(tmp_path: Path, text: str) -> None:
    folder = put(tmp_path, 1)
    _sealed_again(folder, text)
    for reads in (open_weights, read):
        with pytest.raises(CheckpointError, match=r"state\.json") as error:
            reads(folder)
        assert "\n" not in str(error.value)
    assert newest(tmp_path) is None


def _sealed_again(folder: Path, state: str) -> None:
    (folder / "MANIFEST.json").unlink()
    (folder / "state.json").write_text(state)
    checkpoints.seal(folder, 1)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((folder / "MANIFEST.json").read_text())["files"]) == {
        p.name for p in folder.iterdir() if p.name != "MANIFEST.json"
    }


def test_random_generators_come_back() -> None:
    import random

    import numpy as np

    states = rng_states()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_rng_states(states)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
