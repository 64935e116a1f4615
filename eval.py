"""Scores a run on benchmarks, its own suite or another: its newest complete checkpoint, its own held-out data.

python eval.py run=<run directory>
python eval.py run=<run directory> suite=<one of conf/suite>
python eval.py run=<imported folder> suite=<one of conf/suite>
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.compose import at_home, build, entry_point
from bestiary.quick_imports import quick_imports

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bestiary.config import Evaluation

ROOT = Path(__file__).resolve().parent


def main(asked: Evaluation, config: DictConfig) -> None:
    """Loads, asks, scores; results go to <run>/eval/<benchmark>/, of a file of weights to eval/ beside it."""
    with quick_imports():
        from bestiary.evaluation.suite import run_suite, sources_of
        from bestiary.training import assembly
        from data_modules.heldout import Samples

    [path] = map(Path, filter(None, at_home([asked.run], ROOT)))
    assembly.talk()
    run = assembly.evaluated_run(asked, path)
    suite = asked.suite or run.suite
    if not suite:
        raise ValueError(f"{path} has no benchmarks of its own; give suite=<one of conf/suite>")
    if run.data.prepare:
        build(run.data.prepare)
    every = {key: value for key, value in asdict(asked.every).items() if value is not None}
    benchmarks = {name: build({**node, **every}) for name, node in suite.items()}
    heldout = assembly.source_arguments(run)[1]
    read = {source for name, benchmark in benchmarks.items() for source in sources_of(name, benchmark, heldout)}
    chosen = {name: source for name, source in heldout.items() if name in read}
    samples = Samples(chosen, **assembly.cache_arguments(run))
    pieces = assembly.load_pieces(asked, run, path)
    results = (path if path.is_dir() else path.parent) / "eval"
    assembly.show(run_suite(benchmarks, pieces.model, pieces.processor, samples, results)["text"])


if __name__ == "__main__":
    entry_point(main, config_path=ROOT / "conf", name="eval")
