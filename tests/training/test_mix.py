"""A run says what mix it was asked for, what it got, and what a resume changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bestiary.config import Data, Source
from bestiary.training.assembly import asked_shares
from bestiary.training.mix import mean_shares, notes_of
from bestiary.training.resuming import accept_stream, open_run
from bestiary.training.run_dir import RunDir
from tests.training.tiny import SOURCES, TinyData, tiny_stage, train

STAGE = tiny_stage(max_steps=6, checkpoint_every=2)


def mix(path: Path) -> Any:
    return json.loads((path / "mix.json").read_text())


def test_asked_resolved_and_achieved_shares_stand_side_by_side(tmp_path: Path) -> None:
    config = {"data": {"unit": "tokens", "sources": {"alpha": {"weight": 2.0, "count": None, "schedule": []}}}}
    train(tmp_path, stage=STAGE, config=config)
    record, last = mix(tmp_path), RunDir(tmp_path).metrics.read()[-1]
    assert (record["from_step"], record["to_step"], record["unit"]) == (0, 6, "tokens")
    assert record["sources"]["alpha"]["asked"] == {"weight": 2.0} and record["sources"]["beta"]["asked"] == {
        "weight": 1.0
    }
    for name in SOURCES:
        assert record["sources"][name]["resolved"] == 0.5
        achieved = record["sources"][name]["achieved"]
        assert achieved == {unit: last[f"mix_{unit}"][name] for unit in ("samples", "tokens", "targets")}


def test_a_change_of_the_stream_is_written_down_and_shares_are_counted_from_it(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=4, checkpoint_every=2))
    remixed = TinyData(version=2, on_change="remix")
    train(tmp_path, stage=STAGE, resume=True, data=remixed)
    (change,) = RunDir(tmp_path).changes.read()
    assert (change["step"], change["lines"]) == (4, ["version 1 -> 2"])
    assert notes_of(RunDir(tmp_path)) == "step 4:\nversion 1 -> 2"
    assert mix(tmp_path)["from_step"] == 4
    steps = [flight for flight in RunDir(tmp_path).samples.steps(5, 6)]
    sources = [s.source for flight in steps for s in flight.samples]
    share = sources.count("alpha") / len(sources)
    assert mix(tmp_path)["sources"]["alpha"]["achieved"]["samples"] == pytest.approx(share, abs=1e-6)


def test_a_change_that_was_lost_with_its_steps_is_not_told_twice(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=4, checkpoint_every=2))

    class Dies(TinyData):
        def step_of(self, step: int, rank: int = 0, world: int = 1) -> Any:
            if step == 5:
                raise OSError("gone")
            return super().step_of(step, rank, world)

    with pytest.raises(OSError, match="gone"):
        train(tmp_path, stage=STAGE, resume=True, data=Dies(version=2, on_change="remix"))
    assert [record["step"] for record in RunDir(tmp_path).changes.read()] == [4]
    train(tmp_path, stage=STAGE, resume=True, data=TinyData(version=3, on_change="remix"))
    assert [record["lines"] for record in RunDir(tmp_path).changes.read()] == [["version 1 -> 3"]]


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=4, checkpoint_every=2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    data = TinyData(version=2)

    def accept(checkpoint: Any) -> None:
        data.load_states(checkpoint.state.lanes, checkpoint.state.fingerprint)

    with pytest.raises(ValueError, match="the stream changed"):
        open_run(tmp_path, resume=True, stage="tiny", config="", resolved="became: 2\n", accept=accept)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def go_on(path: Path, data: TinyData) -> None:
    """Opens the run to go on, as train.py does, and dies before the first step."""
    run, _ = open_run(
        path,
        resume=True,
        stage="tiny",
        config=f"version: {data.version}\n",
        resolved="became: 2\n",
        accept=lambda checkpoint: accept_stream(RunDir(path), checkpoint, data),
    )
    run.unlock()


def test_a_change_whose_run_was_killed_before_its_next_checkpoint_is_made_again(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=4, checkpoint_every=2))
    go_on(tmp_path, TinyData(version=2, on_change="remix"))
    for _ in range(2):  # the same change again, and only the same
        with pytest.raises(ValueError, match="the stream changed"):
            go_on(tmp_path, TinyData(version=3))
        again = TinyData(version=2)
        go_on(tmp_path, again)
        assert again.on_change == "remix"
        (change,) = RunDir(tmp_path).changes.read()
        assert (change["step"], change["on_change"], change["lines"]) == (4, "remix", ["version 1 -> 2"])
    train(tmp_path, stage=STAGE, resume=True, data=again)
    assert [record["lines"] for record in RunDir(tmp_path).changes.read()] == [["version 1 -> 2"]]
    with pytest.raises(ValueError, match="the stream changed"):  # the new stream is the run's own now
        go_on(tmp_path, TinyData(version=1))


def test_settings_of_the_stream_are_left_to_the_stream_to_explain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = "stage: {lr: 1}\ndata: {sources: {a: {weight: 1}}}\nstream: {on_change: refuse}\n"
    after = "stage: {lr: 1}\ndata: {sources: {a: {weight: 2}}}\nstream: {on_change: remix}\n"
    open_run(tmp_path, resume=False, stage="s", config="", resolved=before)[0].unlock()
    open_run(tmp_path, resume=True, stage="s", config="", resolved=after)
    assert "and is now" not in caplog.text


def test_shares_that_move_are_averaged_over_the_steps_done() -> None:
    def asked(step: int) -> dict[str, float]:
        return {"a": min(step, 10) / 10, "b": 1 - min(step, 10) / 10}

    assert mean_shares(asked, 0, 0) == {"a": 0.0, "b": 1.0}
    assert mean_shares(asked, 0, 11)["a"] == pytest.approx(0.5)
    assert mean_shares(asked, 20, 10**6) == {"a": 1.0, "b": 0.0}


def test_a_plan_tells_shares_without_the_data() -> None:
    def told(temperature: float = 1.0, **sources: dict[str, Any]) -> list[str]:
        made = {name: Source(path="p", domain="d", **given) for name, given in sources.items()}
        return list(asked_shares(Data(sources=made, max_tokens=1, temperature=temperature)).values())

    assert told(a={}, b={"weight": 3.0}, c={"weight": 0.0}) == ["25.00%", "75.00%"]
    assert told(a={"count": 100}, b={"count": 300}) == ["25.00%", "75.00%"]
    assert told(2.0, a={"weight": 1.0}, b={"weight": 4.0}) == ["33.33%", "66.67%"]
    assert told(a={"repeat": 2}, b={"repeat": 0.5}) == ["2 passes", "0.5 passes"]
    assert told(a={"max_epochs": 1.5}, b={}) == ["weight 1, at most 1.5 passes", "weight 1"]
    assert told(a={"schedule": [(0, 1.0), (100, 3.0)]}, b={}) == ["weight 1 at 0 -> 3 at 100", "weight 1"]
