"""Scores a run on benchmarks, its own suite or another: its newest complete checkpoint, its own held-out data.

python eval.py run=<run directory>
python eval.py run=<run directory> suite=<one of conf/suite>
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.compose import at_home, build, entry_point, load_run
from bestiary.quick_imports import quick_imports

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bestiary.config import Evaluation

ROOT = Path(__file__).resolve().parent


def main(asked: Evaluation, config: DictConfig) -> None:
    """Loads, asks, scores; results go to <run>/eval/<benchmark>/."""
    with quick_imports():
        from bestiary.evaluation.suite import run_suite, sources_of
        from bestiary.training import assembly
        from data_modules.heldout import Samples

    [folder] = map(Path, filter(None, at_home([asked.run], ROOT)))
    assembly.talk()
    run = load_run(folder)
    suite = asked.suite or run.suite
    if not suite:
        raise ValueError(f"{folder} has no benchmarks of its own; give suite=<one of conf/suite>")
    if run.data.prepare:
        build(run.data.prepare)
    every = {key: value for key, value in asdict(asked.every).items() if value is not None}
    benchmarks = {name: build({**node, **every}) for name, node in suite.items()}
    run.data.heldout |= asked.data.heldout
    heldout = assembly.source_arguments(run)[1]
    read = {source for name, benchmark in benchmarks.items() for source in sources_of(name, benchmark, heldout)}
    samples = Samples({name: source for name, source in heldout.items() if name in read})
    pieces = assembly.load_pieces(run, folder, accelerator=asked.accelerator, threads=asked.threads)
    found = run_suite(benchmarks, pieces.model, pieces.processor, samples, folder / "eval")
    assembly.show(found["text"])


if __name__ == "__main__":
    entry_point(main, config_path=ROOT / "conf", name="eval")
