"""A new layout of ranks and workers at every resume, and the rows stay those of one process."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data_modules.consumer import Job, chain_of, check_nothing_lost, consume, kill, logged, start, write_sources
from tests.data_modules.test_killing import LONGEST_S, lines, wait_for

LAYOUTS = [(1, 0), (2, 1), (4, 2), (3, 3), (4, 0), (2, 3), (1, 2), (3, 1)]
"""(ranks, workers of each)."""


def whole(job: Job) -> Job:
    """The same job without an interruption, done."""
    plain = replace(job, root=job.root.parent / "whole", ranks=1, workers=0, save_every=1000, ballast=0)
    for folder in (plain.root, job.root):
        folder.mkdir()
    consume(plain, "run")
    return plain


def test_a_few_resumes_on_other_layouts_continue_equal(tmp_path: Path) -> None:
    write_sources(tmp_path / "sources")
    job = Job(tmp_path / "sources", tmp_path / "parts", steps=8, save_every=2)
    plain = whole(job)
    for number, (ranks, workers) in enumerate([(1, 0), (2, 0), (4, 0), (3, 1)]):
        consume(replace(job, ranks=ranks, workers=workers, steps=2 * number + 2), f"run-{number}")
    check_nothing_lost(job, [f"run-{number}" for number in range(4)], logged(plain.root / "run.jsonl"))
    assert chain_of(job) == chain_of(plain)


@pytest.mark.slow
def test_a_kill_and_a_new_layout_at_every_resume_continue_equal(tmp_path: Path) -> None:
    write_sources(tmp_path / "sources")
    job = Job(tmp_path / "sources", tmp_path / "parts", steps=80, ballast=1_000_000)
    plain = whole(job)
    runs, instants = [], random.Random(4)
    for number, (ranks, workers) in enumerate(LAYOUTS):
        runs.append(f"run-{number}")
        process = start(replace(job, ranks=ranks, workers=workers, micro_batch=instants.randrange(4)), runs[-1])
        if number + 1 == len(LAYOUTS):
            process.join(LONGEST_S)
            assert process.exitcode == 0, (job.root / f"{runs[-1]}.txt").read_text()
            break
        log, rows = job.root / f"{runs[-1]}.jsonl", instants.randrange(4, 9)
        wait_for(process, lambda log=log, rows=rows: lines(log) >= rows)  # type: ignore[misc]
        assert process.is_alive(), "the job is too short for so many kills"
        kill(process)
    check_nothing_lost(job, runs, logged(plain.root / "run.jsonl"))
    assert chain_of(job) == chain_of(plain)
