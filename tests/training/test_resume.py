"""A run that was stopped and resumed writes what an uninterrupted one writes, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bestiary.config import Cluster
from bestiary.training.fit import fit
from bestiary.training.module import MLLMModule
from bestiary.training.resuming import open_run, resume_path
from bestiary.training.run_dir import TIME_FIELDS, RunDir
from tests.training.tiny import DOMAINS, SOURCES, TinyData, tiny_model, tiny_stage, train

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in RunDir(path).metrics.read()]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert RunDir(one).samples.read() == RunDir(other).samples.read()
    for name in ("model", "optimizer"):
        first, second = (load_file(p / f"checkpoints/last/{name}.safetensors") for p in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


class Dies(TinyData):
    """A stream that breaks at one step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step_of(self, step: int, rank: int = 0, world: int = 1) -> Any:
        if step == self.at:
            raise OSError("the disk is gone")
        return super().step_of(step, rank, world)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_broke_goes_on_as_if_it_had_not(tmp_path: Path, at: int) -> None:
    stage = tiny_stage(max_steps=9, checkpoint_every=3)
    train(tmp_path / "whole", stage=stage)
    with pytest.raises(OSError, match="disk is gone"):
        train(tmp_path / "broken", stage=stage, data=Dies(at))
    assert RunDir(tmp_path / "broken").status.state == "failed"
    summary, _ = train(tmp_path / "broken", stage=stage, resume=True)
    assert summary.state == "finished"
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


def test_an_error_in_words_is_what_is_raised_and_kept(tmp_path: Path) -> None:
    def in_words(error: BaseException) -> BaseException | None:
        return ValueError("buy a disk") if isinstance(error, OSError) else None

    with pytest.raises(ValueError, match="buy a disk"):
        train(tmp_path, data=Dies(1), in_words=in_words)
    assert RunDir(tmp_path).status.error == "ValueError: buy a disk"


def test_a_finished_run_resumed_only_scores(tmp_path: Path) -> None:
    train(tmp_path)
    before = lines(tmp_path)
    asked: list[int] = []

    def evaluate(step: int) -> dict[str, Any]:
        asked.append(step)
        return {"metrics": {"a": 1.0}}

    summary, _ = train(tmp_path, resume=True, evaluate=evaluate)
    assert asked == [6] and summary.metrics == {"a": 1.0} and lines(tmp_path) == before


def test_another_stream_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=2))
    with pytest.raises(ValueError, match="the stream changed"):
        train(tmp_path, resume=True, data=TinyData(version=2))


def test_another_stage_is_refused(tmp_path: Path) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=2))
    with pytest.raises(ValueError, match="is a run of stage tiny, not of next; use it as parent="):
        train(tmp_path, resume=True, stage=tiny_stage(name="next"))


def test_changed_settings_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = "stage: {lr: 1, x: 2, checkpoint_every: 0}\ncluster: {devices: 1}\n"
    open_run(tmp_path, resume=False, stage="s", config="a: 1\n", resolved=before)[0].unlock()
    after = "stage: {lr: 3, x: 2, checkpoint_every: 5}\ncluster: {devices: 2}\n"
    open_run(tmp_path, resume=True, stage="s", config="a: 2\n", resolved=after)
    assert "stage.lr was 1 and is now 3" in caplog.text
    assert "devices" not in caplog.text and "checkpoint_every" not in caplog.text
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"


@pytest.mark.parametrize(("freeze", "kept"), [("head.*", "asked: 1\n"), ("encoder.*", "asked: 2\n")])
def test_options_that_are_refused_before_the_first_step_are_put_back(tmp_path: Path, freeze: str, kept: str) -> None:
    train(tmp_path, stage=tiny_stage(max_steps=2))
    stage = tiny_stage(freeze=[freeze])
    run, checkpoint = open_run(tmp_path, resume=True, stage="tiny", config="asked: 2\n", resolved="became: 2\n")
    with pytest.raises((ValueError, OSError), match=r"freeze rules|disk is gone"), run.unless_refused():
        module = MLLMModule(tiny_model(), stage, seed=3, sources=SOURCES, domains=DOMAINS)
        fit(module, Dies(3), run=run, cluster=Cluster(threads=1), checkpoint=checkpoint)
    assert (tmp_path / "config.yaml").read_text() == kept
    assert (tmp_path / "config.resolved.yaml").read_text() == kept.replace("asked", "became")
    assert run.status.state == "failed" and run.status.error
    run.unlock()


def test_auto_takes_the_unfinished_run_that_was_alive_last(tmp_path: Path) -> None:
    for name, state, beat in (("a", "failed", "1"), ("b", "interrupted", "2"), ("c", "finished", "3")):
        run = RunDir(tmp_path / "sweep" / name)
        run.start(config="", resolved="", stage="tiny")
        run.unlock()
        status = json.loads((run.path / "status.json").read_text()) | {"state": state, "heartbeat": beat}
        (run.path / "status.json").write_text(json.dumps(status))
    assert resume_path("auto", tmp_path, "tiny") == tmp_path / "sweep" / "b"
    assert resume_path("auto", tmp_path, "other") is None
    assert resume_path(None, tmp_path, "tiny") is None
    with pytest.raises(ValueError, match="is not a run directory"):
        resume_path(str(tmp_path / "nothing"), tmp_path, "tiny")


def start(path: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "tests.training.killed", str(path), *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def wait_for_step(path: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(RunDir(path).metrics.read()) < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended too early"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert start(path, "--sleep", "0").wait(timeout=180) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 13, 26])
def test_a_killed_run_resumes_to_the_same_bits(uninterrupted: Path, tmp_path: Path, at: int) -> None:
    process = start(tmp_path / "run")
    wait_for_step(tmp_path / "run", at, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunDir(tmp_path / "run").status.state == "running"
    assert start(tmp_path / "run", "--resume", "--sleep", "0").wait(timeout=180) == 0
    status = RunDir(tmp_path / "run").status
    assert (status.state, status.step, status.restarts) == ("finished", 40, 1)
    assert_equal_runs(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_resumable_checkpoint(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path / "run")
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    run = RunDir(tmp_path / "run")
    assert run.status.state == "interrupted"
    assert run.status.step == len(run.metrics.read()) < 40
    assert (run.checkpoints / "last").resolve().name == f"step-{run.status.step:06d}"
    assert start(tmp_path / "run", "--resume", "--sleep", "0").wait(timeout=180) == 0
    assert_equal_runs(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--sleep", "30")
    deadline = time.monotonic() + 60
    while not RunDir(tmp_path / "run").exists and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(8)  # Lightning has set itself up and waits for data
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(timeout=10) == -signal.SIGINT
    assert RunDir(tmp_path / "run").status.state == "interrupted"
