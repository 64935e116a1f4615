"""Scores the model during and after training with whatever function the program hands in.

The function takes the number of completed steps and returns a mapping:
`metrics` {name: number or None}, `panels` {benchmark: path of a PNG}, `tables` {benchmark: (column names, rows)},
where a PIL image may stand in any cell. The last two may be left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bestiary.training.callbacks.recording import StepClock, report_of
from bestiary.training.module import MLLMModule
from bestiary.training.run_dir import RunDir
from bestiary.training.stages import set_train_mode
from bestiary.training.strategies import is_sharded

log = logging.getLogger(__name__)

Evaluate = Callable[[int], Mapping[str, Any]]


class Evaluating(Callback):
    """Calls `evaluate` every `every` steps (0 = never), after the last step, and before the first if `at_start`.

    It runs on rank 0, or on every rank where parameters are sharded; the others wait.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        run: RunDir,
        clock: StepClock,
        *,
        every: int,
        max_steps: int,
        at_start: bool = False,
        on_result: Callable[[int, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.run = run
        self.clock = clock
        self.every = every
        self.max_steps = max_steps
        self.at_start = at_start
        self.on_result = on_result
        self.results: dict[str, Any] = {}
        self.table = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what the run starts from."""
        assert isinstance(pl_module, MLLMModule)
        if self.at_start and pl_module.step == 0:
            with self.clock.paused():
                self.run_now(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if it is time."""
        report = report_of(pl_module)
        is_due = self.every > 0 and report.step % self.every == 0
        if not any(report.stop_signals) and (is_due or report.step == self.max_steps):
            with self.clock.paused():
                self.run_now(trainer, pl_module, report.step)

    def run_now(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Evaluate, log, and put the model back into its training mode."""
        assert isinstance(module, MLLMModule)
        if trainer.is_global_zero or is_sharded(trainer.strategy):
            module.model.eval()
            found = self.evaluate(step)
            set_train_mode(module.model)
            if trainer.is_global_zero:
                self.record(step, found)
        trainer.strategy.barrier("evaluation")

    def record(self, step: int, found: Mapping[str, Any]) -> None:
        """Write one evaluation's scores to the run directory and the log."""
        self.results, self.table = dict(found["metrics"]), str(found.get("text", ""))
        self.run.evaluations.append({"step": step, "metrics": self.results})
        for name, value in self.results.items():
            if "/" not in name or name.count("/") == 1:
                log.info("step %d: %s = %s", step, name, "-" if value is None else f"{value:.4f}")
        if self.on_result is not None:
            self.on_result(step, found)
