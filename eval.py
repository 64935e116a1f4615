"""Scores a run on benchmarks: its newest complete checkpoint, its own held-out data.

python eval.py run=<run directory> suite=regions
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.compose import at_home, build, entry_point, load_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bestiary.config import Evaluation

ROOT = Path(__file__).resolve().parent


def main(asked: Evaluation, config: DictConfig) -> None:
    """Loads, asks, scores; results go to <run>/eval/<benchmark>/."""
    from bestiary.evaluation.suite import run_suite
    from bestiary.training import assembly
    from data_modules.samples import Samples

    [folder] = map(Path, filter(None, at_home([asked.run], ROOT)))
    assembly.talk()
    run = load_run(folder)
    if run.data.prepare:
        build(run.data.prepare)
    pieces = assembly.load_pieces(run, folder, accelerator=asked.accelerator, threads=asked.threads)
    benchmarks = {name: build(node) for name, node in asked.suite.items()}
    samples = Samples(assembly.source_arguments(run)[1])
    found = run_suite(benchmarks, pieces.model, pieces.processor, samples, folder / "eval")
    assembly.show(found["text"])


if __name__ == "__main__":
    entry_point(main, config_path=ROOT / "conf", name="eval")
