"""A progress bar on a terminal, plain lines elsewhere; both say the step's own loss, fill and the smoothed speed."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bestiary.training.report import StepReport

log = logging.getLogger(__name__)

SMOOTHING = 0.95
LINE_EVERY_S = 10.0


class ProgressView:
    """Shows the run's progress; on a terminal as a bar, else as a log line every `LINE_EVERY_S` seconds.

    start: steps done before this process (a resumed run's bar starts there).
    """

    def __init__(self, *, name: str, start: int, max_steps: int, console: Console | None = None) -> None:
        self.name = name
        self.max_steps = max_steps
        self.console = console or Console(stderr=True)
        self._speed: float | None = None
        self._line = float("-inf")
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=max_steps, completed=start, numbers="")

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: StepReport, record: dict[str, Any]) -> None:
        """Take in one step."""
        speed = record.get("tokens_per_s")
        if speed is not None:
            self._speed = _smooth(self._speed, speed)
        numbers = self.numbers(report)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, numbers=numbers)
            return
        current = time.monotonic()
        if current - self._line >= LINE_EVERY_S or report.step == self.max_steps:
            self._line = current
            log.info("%s %d/%d %s", self.name, report.step, self.max_steps, numbers)

    def numbers(self, report: StepReport) -> str:
        """Loss, tokens a second and fill as one short text."""
        speed = f"{self._speed:,.0f} tok/s" if self._speed is not None else "- tok/s"
        return f"loss {report.loss:.4f}  {speed}  fill {report.fill:.0%}"


def _smooth(old: float | None, new: float) -> float:
    """Exponential average."""
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
