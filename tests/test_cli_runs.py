"""`bestiary runs`: lists, and explains the steps of a real run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bestiary.cli import main
from bestiary.training.flight import FlightStep, SeenSample
from bestiary.training.run_dir import RunDir
from data_modules.skiplist import read_skip_list
from tests.training.tiny import TinyData, tiny_row, tiny_stage, train


class Lossy(TinyData):
    """A stream that left samples out."""

    def losses(self, states: object) -> list[str]:
        return ["alpha/alpha-000000.tar: 3 decode"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny" / "one"
    train(path, stage=tiny_stage(max_steps=5, checkpoint_every=3), data=Lossy(weights={"beta": 0.5}))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main(["runs", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_runs_alone_lists(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--root", run.parents[1])
    assert text.split()[:4] == ["finished", "tiny", "5", "steps"]


def test_a_step_is_explained_sample_by_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "explain", run, "--step", 4)
    head, columns, *rows, left, line = text.splitlines()
    metrics = RunDir(run).metrics.read()[3]
    assert head.startswith(f"step 4  loss {metrics['loss']:.4f}  weighted ") and "grad norm" in head and "lr" in head
    assert columns.split() == ["lane", "source", "key", "tokens", "targets", "loss"]
    made = [(lane, example) for lane in range(4) for example in tiny_row(lane, 3)]
    assert [row.split()[:5] for row in rows] == [
        [str(lane), e.source, e.key, str(len(e)), str(e.num_targets)] for lane, e in made
    ]
    assert sum(row.endswith(" *") for row in rows) == 1
    assert (left, line) == ("left out up to step 3:", "  alpha/alpha-000000.tar: 3 decode")


def test_the_samples_losses_make_up_the_loss_of_the_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [json.loads(line) for line in told(capsys, "explain", run, "--steps", "2:4", "--json").splitlines()]
    assert [step["step"] for step in steps] == [2, 3, 4]
    for step in steps:
        total = sum(s["loss"] * s["targets"] for s in step["samples"])
        assert total / sum(s["targets"] for s in step["samples"]) == pytest.approx(step["loss"], rel=1e-3)
        weights = [s["targets"] * (0.5 if s["source"] == "beta" else 1.0) for s in step["samples"]]
        weighted = sum(s["loss"] * w for s, w in zip(step["samples"], weights, strict=True)) / sum(weights)
        assert weighted == pytest.approx(step["weighted_loss"], rel=1e-3)


def test_samples_by_loss_begin_with_the_worst(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = told(capsys, "explain", run, "--step", 5, "--by", "loss", "--json").splitlines()
    samples = json.loads(step)["samples"]
    assert [s["loss"] for s in samples] == sorted((s["loss"] for s in samples), reverse=True)
    assert [s["worst"] for s in samples] == [True] + [False] * 5


def test_a_skip_list_holds_the_samples_above_a_loss_or_of_a_key(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = [json.loads(line) for line in told(capsys, "explain", run, "--steps", ":", "--json").splitlines()]
    losses = sorted(s["loss"] for step in everything for s in step["samples"])
    limit = losses[-4]
    text = told(capsys, "explain", run, "--steps", ":", "--as-skip-list", "--above", limit)
    above = [s for step in everything for s in step["samples"] if s["loss"] > limit]
    assert text.splitlines() == [f"{s['source']}\t{s['key']}" for s in above] and 1 <= len(above) <= 3
    key = above[0]["key"]
    text = told(capsys, "explain", run, "--steps", "1:5", "--as-skip-list", "--key", key)
    assert text == f"{above[0]['source']}\t{key}\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--step", "9"], "step 9 is not in .*, which holds steps 1 to 5"),
        (["--steps", "0:3"], "steps 0:3 are not in .*, which holds steps 1 to 5"),
        (["--steps", "3"], "--steps 3 is not FIRST:LAST"),
        (["--steps", "4:2"], "steps 4:2 run backwards"),
        (["--step", "2", "--as-skip-list"], "needs --above LOSS or --key KEY"),
        (["--step", "2", "--above", "1000"], "no sample of these steps has a loss above 1000"),
        (["--step", "2", "--key", "alpha/x"], "not among the samples of these steps: alpha/x"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    text = told(capsys, "explain", run, *options, code=1)
    assert text.count("\n") == 1 and re.search(problem, text)


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run directory" in told(capsys, "explain", tmp_path, "--step", 1, code=1)
    started = RunDir(tmp_path / "new")
    started.start(config="", resolved="")
    assert "has recorded no step yet" in told(capsys, "explain", tmp_path / "new", "--step", 1, code=1)


def test_a_benchmark_without_accuracy_is_listed_with_its_first_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path / "one").start(config="", resolved="")
    for name, metrics in (("regions", {"f1": 0.1, "accuracy": 0.5}), ("captions", {"cider": 1.25}), ("empty", {})):
        report = tmp_path / "one" / "eval" / name / "report.json"
        report.parent.mkdir(parents=True)
        values = {metric: {"value": value} for metric, value in metrics.items()}
        report.write_text(json.dumps({"metrics": values}))
    assert told(capsys, "--root", tmp_path).split("  ")[-3:] == ["captions cider 1.250", "empty", "regions 0.500\n"]


def test_a_damaged_file_does_not_hide_the_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "empty": "",
        "torn": '{"state": "run',
        "none": "{}",
        "list": "[]",
        "null": '{"state": "failed", "step": null}',
    }
    for number, (name, text) in enumerate(bad.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(text)
        os.utime(tmp_path / name / "status.json", (number, number))
    RunDir(tmp_path / "whole").start(config="", resolved="", stage="one")
    lines = told(capsys, "--root", tmp_path).splitlines()
    for line, name in zip(lines, bad, strict=False):
        assert line.startswith(f"unreadable   {tmp_path / name / 'status.json'} is damaged (")
    assert len(lines) == 6 and lines[5].split()[:4] == ["running", "one", "0", "steps"]


@pytest.mark.parametrize("text", ["", '{"metrics": {"accu', "{}", "[]", '{"metrics": null}', '{"metrics": {"f1": {}}}'])
def test_a_damaged_report_is_named_in_the_line_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    RunDir(tmp_path / "one").start(config="", resolved="")
    for name, content in (("bad", text), ("good", '{"metrics": {"accuracy": {"value": 0.5}}}')):
        (tmp_path / "one" / "eval" / name).mkdir()
        (tmp_path / "one" / "eval" / name / "report.json").write_text(content)
    (line,) = told(capsys, "--root", tmp_path).splitlines()
    bad = tmp_path / "one" / "eval" / "bad" / "report.json"
    assert f"  bad unreadable: {bad} (" in line and line.endswith("  good 0.500")


def test_a_damaged_status_of_the_run_that_is_explained_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text("")
    text = told(capsys, "explain", tmp_path / "run", "--step", 9, code=1)
    assert text.startswith(f"error: {tmp_path / 'run' / 'status.json'} is damaged (") and text.count("\n") == 1


def test_a_skip_list_names_the_samples_it_was_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [("a", "part-0/trail "), ("a", " lead"), ("a b", "x"), ("#c", "k"), ("{d", "k"), (" e", "k"), ("f\tg", "k")]
    names += [("a", f"one{end}two") for end in ("\n", "\r", "\t", "\x85", "\u2028")]
    run = RunDir(tmp_path)
    run.start(config="", resolved="")
    run.samples.append([FlightStep.of(1, [SeenSample(0, *name, 3, 2, 9.5) for name in names])])
    text = told(capsys, "explain", tmp_path, "--step", 1, "--as-skip-list", "--above", 1)
    (tmp_path / "skip.tsv").write_text(text, encoding="utf-8")
    listed = read_skip_list(tmp_path / "skip.tsv")
    assert {(source, key) for source, keys in listed.items() for key in keys} == set(names)
    assert text.splitlines()[0] == "a\tpart-0/trail "


def test_a_key_whose_loss_is_low_is_not_called_absent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = json.loads(told(capsys, "explain", run, "--step", 2, "--json"))["samples"][0]["key"]
    text = told(capsys, "explain", run, "--step", 2, "--key", key, "--above", 1000, code=1)
    assert text == "error: no sample of these steps has a loss above 1000\n"


def test_a_reader_that_goes_away_ends_it_quietly(run: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    program = (
        f"import sys; from bestiary.cli import main; sys.exit(main(['runs', 'explain', {str(run)!r}, '--steps', ':']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=ours, stderr=subprocess.PIPE, check=False)
    os.close(ours)
    assert (ended.returncode, ended.stderr) == (1, b"")
