"""train.py and eval.py as a user runs them, on the shipped checkpoint and a little of the embedded data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bestiary.cli import main as bestiary
from bestiary.training.run_dir import RunDir

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TIMES = ("step_s", "wait_s", "tokens_per_s", "mfu")
SHORT = (
    "logger=csv",
    "stage.max_steps=8",
    "stage.checkpoint_every=4",
    "stage.eval_at_start=false",
    "suite.regions.max_samples=2",
)
"""A run that is only to be looked at."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point a run at a small set of its own."""
    root = tmp_path_factory.mktemp("data")
    sizes = "{stage1: 64, stage2: 64, heldout: 12, heldout_tasks: 4}"
    return [
        f"cluster.data_root={root}",
        f"++data.prepare.sizes={sizes}",
        "stage.batch_size=4",
        "suite.regions.max_samples=8",
    ]


def start(*arguments: str, script: str = "train.py") -> subprocess.Popen[str]:
    environment = {**os.environ, "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*arguments: str, script: str = "train.py", code: int = 0) -> str:
    process = start(*arguments, script=script)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output[-3000:]
    return output


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        file = run / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()[0][-3000:]}")


def test_a_killed_run_resumes_bit_for_bit_and_a_stopped_one_says_so(data: list[str], tmp_path: Path) -> None:
    base = ["experiment=sphinxv_stage2", *data, "logger=csv", "stage.max_steps=12", "stage.checkpoint_every=2"]
    finish(*base, f"run_dir={tmp_path}/whole")

    killed = tmp_path / "killed"
    process = start(*base, f"run_dir={killed}")
    wait_for_step(killed, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(f"resume={killed}")
    wait_for_step(killed, 8, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    status = json.loads((killed / "status.json").read_text())
    assert status["state"] == "interrupted" and status["step"] >= 8
    finish(f"resume={killed}")
    assert metrics(killed) == metrics(tmp_path / "whole")
    assert RunDir(killed).samples.read() == RunDir(tmp_path / "whole").samples.read()
    assert json.loads((killed / "status.json").read_text())["state"] == "finished"


def test_a_run_directory_is_complete_and_its_scores_can_be_had_again(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish("experiment=sphinxv_stage2", *data, "stage.max_steps=3", f"run_dir={run}")
    names = [
        "config.yaml",
        "config.resolved.yaml",
        "environment.json",
        "metrics.jsonl",
        "mix.json",
        "samples.jsonl.zst",
        "status.json",
    ]
    assert all((run / name).exists() for name in [*names, "eval/regions/panel.png", "checkpoints/last"])
    report = json.loads((run / "eval/regions/report.json").read_text())
    accuracy = report["metrics"]["accuracy"]
    assert {"value", "n", "control", "by_domain"} <= set(accuracy)
    assert {"natural", "screenshot", "document", "multi_panel"} == set(accuracy["by_domain"])
    again = finish(f"run={run}", "suite=regions", "suite.regions.max_samples=8", script="eval.py")
    assert "accuracy" in again
    assert json.loads((run / "eval/regions/report.json").read_text())["metrics"] == report["metrics"]
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_stage_2_takes_a_stage_1_run_as_parent_and_refuses_the_wrong_ones(data: list[str], tmp_path: Path) -> None:
    first = tmp_path / "first"
    finish("experiment=sphinxv_stage1", *data, "stage.max_steps=2", "logger=csv", f"run_dir={first}")
    second = ["experiment=sphinxv_stage2", *data, "stage.max_steps=2", "logger=csv"]
    finish(*second, f"parent={first}", f"run_dir={tmp_path}/second")
    stage_1 = ["experiment=sphinxv_stage1", *data, "logger=csv", f"run_dir={tmp_path}/x"]
    assert "is of stage sphinxv_stage2" in finish(*stage_1, f"parent={tmp_path}/second", code=1)
    assert not (tmp_path / "x").exists()
    file = next((first / "checkpoints").glob("step-*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in finish(*second, f"parent={first}", f"run_dir={tmp_path}/y", code=1)
    tokenizer = ROOT / "tests/goldens/sphinxv/model/tokenizer.model"
    wrong = finish(*second, f"model.processor.tokenizer={tokenizer}", f"run_dir={tmp_path}/z", code=1)
    assert "token ids" in wrong


@pytest.fixture(scope="session")
def short_run(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps; tests go on with copies of it from step 4."""
    run = tmp_path_factory.mktemp("short") / "run"
    finish("experiment=sphinxv_stage2", *data, *SHORT, f"run_dir={run}")
    return run


def copy_at_step_4(run: Path, to: Path) -> Path:
    """The run as if it had been killed before its last checkpoint."""
    shutil.copytree(run, to, symlinks=True)
    shutil.rmtree(to / "checkpoints" / "step-000008")
    return to


def go_on(data: list[str], run: Path, *overrides: str, code: int = 0) -> str:
    """Resume a short run."""
    return finish("experiment=sphinxv_stage2", *data, *SHORT, f"resume={run}", *overrides, code=code)


def keys_by_step(run: Path) -> dict[int, list[tuple[str, str]]]:
    return {flight.step: [(s.source, s.key) for s in flight.samples] for flight in RunDir(run).samples.read()}


def test_the_mix_is_changed_at_a_resume_only_when_that_is_asked_for(
    data: list[str], short_run: Path, tmp_path: Path
) -> None:
    run = copy_at_step_4(short_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    change = ["data.sources.natural_stage2.weight=3", "~data.sources.multi_panel_stage2"]
    assert "stream.on_change=remix" in go_on(data, run, *change, code=1).splitlines()[-1]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    output = go_on(data, run, *change, "stream.on_change=remix")
    assert "kept     natural_stage2: share 25.00% -> 60.00%" in output and "removed  multi_panel_stage2" in output
    assert "data.sources" not in "".join(line for line in output.splitlines() if "and is now" in line)
    (record,) = RunDir(run).changes.read()
    assert record["step"] == 4 and any("natural_stage2" in line for line in record["lines"])
    mix = json.loads((run / "mix.json").read_text())
    assert (mix["from_step"], mix["to_step"]) == (4, 8) and "multi_panel_stage2" not in mix["sources"]
    assert mix["sources"]["natural_stage2"]["asked"]["weight"] == 3
    assert mix["sources"]["natural_stage2"]["resolved"] == 0.6
    seen = keys_by_step(run)
    assert sorted(seen) == list(range(1, 9)) and [line["step"] for line in metrics(run)] == list(range(1, 9))
    assert all(seen[step] == keys_by_step(short_run)[step] for step in range(1, 5))
    assert "multi_panel_stage2" not in {source for step in range(5, 9) for source, _ in seen[step]}
    natural = [key for step in seen for source, key in seen[step] if source == "natural_stage2"]
    assert len(natural) == len(set(natural)), "an epoch has more samples than these steps draw"


def test_samples_chosen_from_the_record_are_skipped_after_a_resume(
    data: list[str], short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_at_step_4(short_run, tmp_path / "run")
    assert bestiary(["runs", "explain", str(short_run), "--steps", "5:8", "--as-skip-list", "--above", "0"]) == 0
    listed = capsys.readouterr().out
    skipped = [tuple(line.split("\t")) for line in listed.splitlines()][::3]
    (tmp_path / "skip.tsv").write_text("".join(f"{source}\t{key}\n" for source, key in skipped))
    output = go_on(data, run, f"data.skip={tmp_path}/skip.tsv")
    assert "skip list:" in output
    seen = keys_by_step(run)
    assert sorted(seen) == list(range(1, 9)) and all(seen[s] == keys_by_step(short_run)[s] for s in range(1, 5))
    later = {pair for step in range(5, 9) for pair in seen[step]}
    assert skipped and not later & set(skipped)


def test_a_sweep_runs_two_jobs_in_directories_of_their_own_and_one_wandb_group(data: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    finish(
        "-m", "experiment=sphinxv_stage2", *data, "seed=0,1", "stage.max_steps=2", f"hydra.sweep.dir={sweep}"
    )  # fmt: skip
    losses = [metrics(sweep / str(job))[-1]["loss"] for job in (0, 1)]
    assert losses[0] != losses[1]
    assert all(json.loads((sweep / str(job) / "status.json").read_text())["state"] == "finished" for job in (0, 1))


def test_a_run_that_cannot_start_leaves_no_directory_and_a_dry_run_says_why(data: list[str], tmp_path: Path) -> None:
    asked = ["experiment=sphinxv_stage2", *data, *SHORT, f"run_dir={tmp_path / 'run'}"]
    elsewhere = f"data.sources.natural_stage2.path={tmp_path}"
    assert f"{tmp_path} has no source.json" in finish(*asked, elsewhere, code=1)
    save_file({"x": torch.zeros(1)}, tmp_path / "p.safetensors", metadata={"identity": '{"tokenizer": "other"}'})
    assert "made with tokenizer=other" in finish(*asked, f"parent={tmp_path / 'p.safetensors'}", code=1)
    assert "launch with `torchrun" in finish(*asked, "cluster.devices=2", code=1)
    assert not (tmp_path / "run").exists()
    assert "missing on disk: 1\n" in finish(*asked, elsewhere, "dry_run=true", "cluster.devices=2")


def test_a_resume_that_this_machine_refuses_leaves_the_run_as_it_was(short_run: Path, tmp_path: Path) -> None:
    run = copy_at_step_4(short_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    output = finish(f"resume={run}", "cluster.devices=2", "stage.optimizer.lr=0.5", code=1)
    assert "launch with `torchrun" in output.splitlines()[-1]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_the_paper_recipe_is_planned_without_weights() -> None:
    begun = time.monotonic()
    output = finish("experiment=sphinxv_stage1", "scale=paper", "dry_run=true")
    total = next(line for line in output.splitlines() if line.startswith("total"))
    assert "16,46" in total and total.split()[-1].startswith("363,")
    assert "does not exist" in output
    assert time.monotonic() - begun < 60
