"""Trains one stage of one variant: compose -> typed Run -> build -> fit and score.

python train.py experiment=sphinxv_stage2
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.compose import build, entry_point, sweep_dir
from bestiary.quick_imports import quick_imports

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bestiary.config import Run

ROOT = Path(__file__).resolve().parent


def main(run: Run, config: DictConfig) -> int:
    """One run; returns the exit code. Heavy imports wait in here until the configuration is known to be good."""
    with quick_imports():
        from bestiary.evaluation.suite import checked, run_suite
        from bestiary.saved_run import build_pieces
        from bestiary.training import assembly
        from bestiary.training.fit import fit
        from data_modules.datamodule import StreamDataModule
        from data_modules.heldout import Samples, missing
        from data_modules.stream import worker_died
    assembly.make_ready(run, ROOT)
    sources, heldout = assembly.source_arguments(run)
    stream = partial(StreamDataModule, sources=sources, **assembly.stream_arguments(run))
    if run.dry_run:
        return assembly.show_plan(run, missing(sources, heldout), stream)
    pieces = build_pieces(run)
    data = stream(processor=pieces.processor)
    assembly.show(data.resolved_table(run.stage.max_steps))
    samples = Samples(heldout, **assembly.cache_arguments(run))
    benchmarks = checked({name: build(node) for name, node in run.suite.items()}, samples)
    path, resume = assembly.choose_run_dir(run, sweep_dir=sweep_dir())
    directory, checkpoint, parent = assembly.start(run, pieces, path=path, resume=resume, config=config, data=data)

    def evaluate(_step: int) -> dict[str, Any]:
        return run_suite(benchmarks, pieces.model, pieces.processor, samples, directory.path / "eval")

    with directory.unless_refused():
        module = build(run.model.module, model=pieces.model, stage=run.stage, **assembly.module_arguments(run, data))
        summary = fit(module, data, run=directory, cluster=run.cluster, logger=run.logger, checkpoint=checkpoint,
                      parent=parent, identity=pieces.identity, evaluate=evaluate if samples else None,
                      config=asdict(run), tuning=run.tuning, base=pieces.base, in_words=worker_died)  # fmt: skip
    return assembly.show_summary(summary)


if __name__ == "__main__":
    entry_point(main, config_path=ROOT / "conf")
