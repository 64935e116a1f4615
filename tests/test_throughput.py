"""The benchmark suite at a tiny size, without the other projects' loaders: contenders agree, tables come out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.throughput.bound import best_fill
from experiments.throughput.fill import best_fit_decreasing, mixes
from experiments.throughput.measure import ratios
from experiments.throughput.ours import canvas_of
from experiments.throughput.reference_transform import MEAN, STD, prepare
from experiments.throughput.workload import picture

ROOT = Path(__file__).parents[1]


def test_a_ratio_is_taken_inside_rounds_and_disturbed_rounds_are_left_out() -> None:
    times = {"floor": [1.0, 1.0, 2.0], "ours": [2.0, 1.5, 9.0], "peer": [4.0, 6.0, 9.0]}
    table = ratios(times, "ours", "floor")
    assert table["peer"] == {"ms": 5.0, "ratio": 3.0, "low": 2.0, "high": 4.0, "rounds": 2.0}


def test_both_ways_to_prepare_a_picture_give_the_same_pixels() -> None:
    data = picture(3)
    theirs = (prepare(data) * STD + MEAN) * 255
    apart = np.abs(canvas_of(data, 448).astype(np.float32) - theirs.numpy())
    assert apart.max() <= 2.01
    assert apart.mean() < 0.01


@pytest.mark.parametrize(
    ("lengths", "budget", "fill"),
    [
        ([57] * 40, 100, 0.57),  # one a row
        ([60, 40] * 20, 100, 1.0),
        ([51, 51, 49, 49, 33, 33, 33] * 10, 100, (2 * 51 + 2 * 49 + 99) / 300),
        ([70, 25] * 20, 100, 0.95),
        ([45] * 40, 100, 0.9),
    ],
)
def test_no_packing_passes_the_bound_and_the_best_reaches_it(lengths: list[int], budget: int, fill: float) -> None:
    assert best_fill(np.array(lengths), budget, unit=1) == pytest.approx(fill, rel=1e-6)


@pytest.mark.slow
def test_a_bound_of_rounded_lengths_or_of_a_search_cut_short_is_only_wider() -> None:
    for name, lengths in mixes(120).items():
        tight = best_fill(lengths, 2048, unit=8)
        assert best_fit_decreasing(lengths, 2048) <= tight, name
        assert tight <= best_fill(lengths, 2048, unit=32) + 1e-9, name
        assert tight <= best_fill(lengths, 2048, unit=8, rounds=3) + 1e-9, name


@pytest.mark.slow
def test_every_task_runs_and_the_contenders_deliver_the_same(tmp_path: Path) -> None:
    sizes = ["--num", "8", "--num-index", "5000", "--rounds", "1"]
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    tasks = ["read", "prepare", "start", "resume", "fill"]  # large photographs go the way of `prepare`
    command = [sys.executable, "-m", "experiments.throughput", *tasks, *sizes, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == set(tasks)
    assert set(found["read"]) == {"floor", "ours", "ours, 8 lanes", "ours, not copied", "loose files"}
    assert all(line["ratio"] >= 0.985 for line in found["fill"])
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    assert "| references |" in done.stdout
