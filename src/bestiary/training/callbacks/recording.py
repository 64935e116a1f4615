"""metrics.jsonl, samples.jsonl.zst and status.json, step by step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bestiary.training.flight import FlightStep, SeenSample
from bestiary.training.flops import StepFlops, peak_flops, with_images
from bestiary.training.module import MLLMModule
from bestiary.training.report import StepReport, Totals, gather_objects, metrics_record
from bestiary.training.run_dir import RunDir
from bestiary.training.strategies import is_sharded

HEARTBEAT_S = 10.0
FLUSH_STEPS = 50

Listener = Callable[[StepReport, dict[str, Any]], None]


class StepClock:
    """Seconds of a step and of waiting for its data; evaluations and checkpoints are left out."""

    def __init__(self) -> None:
        self.mark = time.perf_counter()
        self.wait_s = 0.0

    def batch_arrived(self) -> None:
        """The step's data is here."""
        self.wait_s = time.perf_counter() - self.mark

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
        current = time.perf_counter()
        seconds, self.mark = current - self.mark, current
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start


class Recorder(Callback):
    """Writes every step to the run directory (rank 0) and passes the finished record to its listeners.

    The first step of a process carries no times: it includes warming up. fetched: counters of remote data, this
    process's since it began; {} leaves `remote` out of the lines.
    """

    def __init__(
        self,
        run: RunDir,
        clock: StepClock,
        totals: Totals,
        flops: StepFlops,
        *,
        precision: str,
        listeners: list[Listener],
        fetched: Callable[[], Mapping[str, int]],
    ) -> None:
        self.run = run
        self.clock = clock
        self.totals = totals
        self.flops = flops
        self.precision = precision
        self.listeners = listeners
        self.fetched = fetched
        self._peak: float | None = None
        self._sees_images = False
        self._flights: list[tuple[int, tuple[SeenSample, ...]]] = []
        self._steps = 0
        self._beat = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the device can do, once."""
        if trainer.is_global_zero:
            self._peak = peak_flops(pl_module.device, self.precision)
        self.clock.lap()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Data has arrived; the first pictures tell what a picture costs."""
        self.clock.batch_arrived()
        if self._sees_images or not trainer.is_global_zero or is_sharded(trainer.strategy):
            return
        assert isinstance(pl_module, MLLMModule)
        for micro in batch:
            if len(micro.pixels):
                with self.clock.paused():
                    self.flops = with_images(self.flops, pl_module.model, micro.pixels[:1])
                self._sees_images = True
                return

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One line of metrics."""
        report = report_of(pl_module)
        self.totals.add(report)
        self._flights.append((report.step, report.samples))
        if report.step % FLUSH_STEPS == 0:
            self.flush()
        seconds = self.clock.lap()
        if not trainer.is_global_zero:
            return
        record = metrics_record(report, self.totals)
        if self._steps:
            record |= self._times(report, seconds, trainer.world_size)
        self._steps += 1
        remote = self.fetched()
        if remote:
            record["remote"] = dict(remote)
        self.run.metrics.append(record)
        for listener in self.listeners:
            listener(report, record)
        if time.monotonic() - self._beat > HEARTBEAT_S:
            self._beat = time.monotonic()
            self.run.update(step=report.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the flight recorder still holds."""
        self.flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the flight recorder's last lines, if no other rank is needed for it."""
        if trainer.world_size == 1:
            self.flush()

    def flush(self) -> None:
        """Write the flight recorder's lines of all ranks; every rank calls at the same step."""
        gathered = gather_objects(self._flights)
        self._flights = []
        if self._is_writer:
            steps = zip(*gathered, strict=True)
            self.run.samples.append(
                [FlightStep.of(parts[0][0], (s for _, samples in parts for s in samples)) for parts in steps]
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only rank 0 writes."""
        self._is_writer = trainer.is_global_zero

    def _times(self, report: StepReport, seconds: float, world_size: int) -> dict[str, float]:
        assert self._peak is not None
        return {
            "step_s": round(seconds, 6),
            "wait_s": round(self.clock.wait_s, 6),
            "tokens_per_s": round(report.counts["tokens"] / seconds, 3),
            "mfu": round(self.flops.of(report) / seconds / (self._peak * world_size), 6),
        }


def report_of(module: LightningModule) -> StepReport:
    """The report of the step that just ended."""
    assert isinstance(module, MLLMModule) and module.report is not None
    return module.report
