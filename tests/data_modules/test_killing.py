"""A real process, killed at any instant, goes on as if nothing had happened: nothing lost, nothing repeated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.data_modules.consumer import Job, chain_of, check_nothing_lost, consume, kill, logged, start, write_sources

KILLS = 20
LONGEST_S = 60.0


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> None:
    """Until something has happened, or the process has ended."""
    deadline = time.monotonic() + LONGEST_S
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "the consumer makes no progress"
        time.sleep(0.001)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_written(job: Job) -> set[Path]:
    """Checkpoints that somebody is writing, or was."""
    return set((job.root / "checkpoints").glob(".step-*.tmp"))


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    write_sources(tmp_path / "sources")
    job = Job(tmp_path / "sources", tmp_path / "killed", steps=120, workers=2, micro_batch=5, ballast=2_000_000)
    plain = replace(job, root=tmp_path / "whole", workers=0, save_every=1000, ballast=0)
    for folder in (job.root, plain.root):
        folder.mkdir()
    consume(plain, "run")
    instants, runs, inside_save = random.Random(20), [], 0
    for number in range(KILLS):
        runs.append(f"run-{number:02d}")
        known = half_written(job)  # left by a kill before
        process = start(job, runs[-1])
        log, rows = job.root / f"{runs[-1]}.jsonl", instants.randrange(8)
        if number % 5 == 0:  # anywhere, from before it has opened anything
            time.sleep(instants.uniform(0.0, 0.2))
        elif number % 5 < 3:  # between steps
            wait_for(process, lambda log=log, rows=rows: lines(log) >= rows)  # type: ignore[misc]
            time.sleep(instants.uniform(0.0, 0.02))
        else:  # while a checkpoint is being written
            wait_for(process, lambda known=known: bool(half_written(job) - known))  # type: ignore[misc]
            time.sleep(instants.uniform(0.0, 0.01))
        assert process.is_alive(), "the job is too short for so many kills"
        kill(process)
        inside_save += bool(half_written(job) - known)
    runs.append("last")
    process = start(job, "last")
    process.join(LONGEST_S)
    assert process.exitcode == 0, (job.root / "last.txt").read_text()
    check_nothing_lost(job, runs, logged(plain.root / "run.jsonl"))
    assert chain_of(job) == chain_of(plain)
    assert inside_save >= 3
