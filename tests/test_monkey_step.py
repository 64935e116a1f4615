"""The benchmark of Monkey's training step: its README tells what was found."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.monkey_step.__main__ import LAUNCHED, OURS, TOGETHER_KEPT, plot, table

FOLDER = Path(__file__).parents[1] / "experiments/monkey_step"


def test_the_readme_tells_the_results_and_ours_takes_half_of_the_launched_loop_at_most(tmp_path: Path) -> None:
    found = json.loads((FOLDER / "results.json").read_text())
    assert table(found) in (FOLDER / "README.md").read_text()
    assert found["ways"][OURS]["ratio"] == 1 and found["ways"][LAUNCHED]["ratio"] >= 2
    assert found["ways"][TOGETHER_KEPT]["ratio"] > 1
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000
