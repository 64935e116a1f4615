"""Checkpoints at the stage's rhythm, at the end, and when a signal asks the run to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bestiary.training import checkpoints, zero_state
from bestiary.training.callbacks.recording import Recorder, StepClock, report_of
from bestiary.training.checkpoints import Checkpoint, TrainState
from bestiary.training.model_state import load_optimizer_tensors, model_tensors, optimizer_tensors
from bestiary.training.module import MLLMModule
from bestiary.training.report import gather_objects
from bestiary.training.run_dir import RunDir
from bestiary.training.signals import StopRequests
from bestiary.training.strategies import zero_optimizer

_MODULE = "module."
"""What the module keeps of a rank lies beside the rank's generators under this prefix."""


class Saving(Callback):
    """Restores a checkpoint's optimiser at the start and writes checkpoints at step boundaries.

    state: the facts every checkpoint repeats (stage, seed, fingerprint, identity, config); step, totals and lanes are
    filled in when one is written. base: plain names that are left out and listed as absent. left_out: lanes'
    states to one line for each kind of sample that was skipped or damaged up to them. check_damage: raises where that
    is too much.
    """

    def __init__(
        self,
        run: RunDir,
        clock: StepClock,
        recorder: Recorder,
        state: TrainState,
        requests: StopRequests,
        *,
        every: int,
        keep: int,
        max_steps: int,
        resumed: Checkpoint | None = None,
        base: Collection[str] = (),
        left_out: Callable[[Sequence[bytes]], list[str]] = lambda states: [],
        check_damage: Callable[[Sequence[bytes]], None] = lambda states: None,
    ) -> None:
        self.run = run
        self.clock = clock
        self.recorder = recorder
        self.state = state
        self.requests = requests
        self.every = every
        self.keep = keep
        self.max_steps = max_steps
        self.resumed = resumed
        self.base = frozenset(base)
        self.left_out = left_out
        self.check_damage = check_damage
        self._lines: list[str] | None = None
        self.last: Path | None = resumed.path if resumed else None
        self.stopped_by: tuple[int, int] = (0, 0)
        self.lanes: list[bytes] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimiser and generators as they were; the signals are ours from here on."""
        assert isinstance(pl_module, MLLMModule)
        self.requests.install()
        pl_module.stop_signals = self.requests.counts
        if self.resumed is not None:
            self._restore(trainer, pl_module, self.resumed)
        self.run.begun()

    def _restore(self, trainer: Trainer, pl_module: MLLMModule, resumed: Checkpoint) -> None:
        tensors = resumed.optimizer()
        zero = zero_optimizer(trainer.strategy)
        load_optimizer_tensors(pl_module.model, _optimizer(trainer), tensors, zero=zero)
        if zero is not None:
            zero_state.set_weights(pl_module.model, resumed.model())
        rng = resumed.rng(trainer.global_rank)
        if rng is not None:
            checkpoints.set_rng_states(rng)
            own = {name.removeprefix(_MODULE): value for name, value in rng.items() if name.startswith(_MODULE)}
            pl_module.set_rank_state(own)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if it is time, and stop if a signal asks for it."""
        assert isinstance(pl_module, MLLMModule)
        report = report_of(pl_module)
        is_due = self.every > 0 and report.step % self.every == 0
        must_stop = any(report.stop_signals)
        if is_due or must_stop or report.step >= self.max_steps:
            with self.clock.paused():
                self.save(trainer, pl_module)
        if must_stop:
            self.stopped_by = report.stop_signals
            trainer.should_stop = True

    def save(self, trainer: Trainer, module: MLLMModule) -> None:
        """Gather from all ranks and write on rank 0."""
        self.recorder.flush()
        keep, zero = trainer.is_global_zero, zero_optimizer(trainer.strategy)
        report = report_of(module)
        model = model_tensors(module.model, keep=keep, zero=zero, leave_out=self.base)
        optimizer = optimizer_tensors(module.model, _optimizer(trainer), keep=keep, zero=zero)
        lanes = {lane: state for part in gather_objects(report.states) for lane, state in part.items()}
        own = {f"{_MODULE}{name}": value for name, value in module.rank_state().items()}
        rng = _numbered(gather_objects(checkpoints.rng_states() | own))
        self.lanes = [lanes[lane] for lane in sorted(lanes)]
        if keep:
            self._record_left_out(report.step)
            absent = sorted(self.base)
            state = replace(self.state, step=report.step, totals=self.recorder.totals, lanes=lanes, absent=absent)
            self.last = checkpoints.write(
                self.run.checkpoints, state, model=model, optimizer=optimizer, rng=rng, keep=self.keep
            )
            self.run.update(step=report.step)
        trainer.strategy.barrier("checkpoint")
        self.check_damage(self.lanes)  # the same on all ranks; with a larger budget the run goes on from here

    def _record_left_out(self, step: int) -> None:
        """Into the run directory, where it is not what the checkpoint before said."""
        if self._lines is None:
            said = self.run.left_out.read()
            self._lines = said[-1]["lines"] if said else []
        lines = self.left_out(self.lanes)
        if lines != self._lines:
            self.run.left_out.append({"step": step, "lines": lines})
            self._lines = lines


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimiser that holds the moments (DeepSpeed wraps ours)."""
    optimizer: Any = trainer.strategy.optimizers[0]
    while not isinstance(optimizer, torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _numbered(states: list[dict[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
    """Every rank's generator states under `<rank>/<name>`."""
    return {f"{rank}/{name}": value for rank, part in enumerate(states) for name, value in part.items()}
