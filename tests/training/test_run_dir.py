"""The run directory is true at every moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bestiary.training.run_dir import JsonLines, RunDir, git_commit


def test_a_new_run_has_its_files_and_says_it_runs(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.start(config="a: 1\n", resolved="a: 1\nb: 2\n", stage="one")
    assert (run.path / "config.yaml").read_text() == "a: 1\n"
    assert (run.path / "config.resolved.yaml").read_text() == "a: 1\nb: 2\n"
    assert json.loads((run.path / "environment.json").read_text())["versions"]["torch"]
    assert run.status.state == "running" and run.status.stage == "one" and run.status.heartbeat


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunDir(tmp_path).start(config="", resolved="")
    with pytest.raises(ValueError, match=r"already holds a run .*resume="):
        RunDir(tmp_path).start(config="", resolved="")


def test_a_run_has_one_trainer_at_a_time(tmp_path: Path) -> None:
    first = RunDir(tmp_path)
    first.start(config="", resolved="")
    other = f"from bestiary.training.run_dir import RunDir as R; r = R({str(tmp_path)!r}); print(r.is_locked); r.lock()"

    def ask() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)

    refused = ask()
    assert refused.stdout == "True\n" and "trained by another process" in refused.stderr
    first.unlock()
    assert ask().returncode == 0


def test_reopening_counts_restarts_and_keeps_the_earlier_environment(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.start(config="", resolved="")
    run.update(state="failed", error="no")
    run.reopen(0)
    assert (run.status.restarts, run.status.state, run.status.error) == (1, "running", None)
    assert len(json.loads((tmp_path / "environment.json").read_text())["earlier"]) == 1


def test_a_log_is_cut_back_and_a_half_written_line_dropped(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    for step in range(1, 5):
        log.append({"step": step, "loss": 1 / 3 * step})
    whole = log.path.read_text().splitlines()
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.cut_after(3)
    assert log.path.read_text().splitlines() == whole[:3]


def test_a_log_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonLines(tmp_path / "m.jsonl").append({"step": 1, "loss": float("nan")})


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"\0" * 60, "Expecting value"), (b"\xff{}", "can't decode"), (b"[7]", "it has no step"), (b"{}", "no step")],
)
def test_a_damaged_line_is_named_with_its_byte(tmp_path: Path, line: bytes, problem: str) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    for step in range(1, 5):
        log.append({"step": step})
    start = log.path.stat().st_size
    log.path.write_bytes(log.path.read_bytes() + line + b"\n")
    for act in (log.read, lambda: log.cut_after(4)):
        with pytest.raises(ValueError, match=rf"m\.jsonl: the line at byte {start} is damaged \(.*{problem}") as caught:
            act()
        assert "\n" not in str(caught.value) and "delete that line" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"state": "run', "Unterminated string"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "Expected `object`"),
        (b"{}", "it has no state and no step"),
        (b'{"state": "running", "step": null}', r"Expected `int`, got `null` - at `\$\.step`"),
        (b'{"state": "asleep", "step": 1}', "'asleep'"),
    ],
)
def test_a_damaged_status_is_one_line_with_file_and_remedy(tmp_path: Path, text: bytes, problem: str) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "status.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"/status\.json is damaged \(.*{problem}.*\); write ") as caught:
        _ = run.status
    before, _, after = str(caught.value).partition("; write ")
    assert "\n" not in before + after
    (tmp_path / "status.json").write_text(after.partition(" into it")[0])  # what it says is enough
    run.reopen(0)
    assert (run.status.state, run.status.restarts) == ("running", 1)


@pytest.mark.parametrize("text", ["", '{"time": ', "{}", "[]", "null", '{"earlier": null}'])
def test_a_damaged_environment_is_named_before_anything_changes(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.start(config="", resolved="")
    run.metrics.append({"step": 1})
    before = run.status
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(ValueError, match=r"/environment\.json is damaged \(.+\); move it away") as caught:
        run.reopen(0)
    assert "\n" not in str(caught.value) and run.status == before and run.metrics.read() == [{"step": 1}]


def test_a_folder_outside_any_repository_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
