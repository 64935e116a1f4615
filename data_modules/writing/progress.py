"""The progress of a writer on a terminal, or as plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from data_modules.writing.engine import Watch
from data_modules.writing.plan import Progress

EVERY_S = 10.0
"""Between two plain lines."""


@contextmanager
def shown(stream: IO[str]) -> Iterator[Watch]:
    """A watch that draws a bar on a terminal and prints a line now and then elsewhere."""
    if stream.isatty():
        with _bar(stream) as watch:
            yield watch
    else:
        yield _Lines(stream)


def line(progress: Progress, seconds: float, done_before: Progress) -> str:
    """Counts, speed and the time that is left, from what this attempt did."""
    rate = (progress.bytes - done_before.bytes) / 1e6 / max(seconds, 1e-9)
    parts = [f"{progress.records:,} records", f"{progress.rejected:,} rejected", f"{rate:,.1f} MB/s"]
    if progress.share is not None:
        advance = progress.share - (done_before.share or 0.0)
        left = (1.0 - progress.share) / advance * seconds if advance > 0 else None
        parts.insert(0, f"{progress.share:4.0%}")
        parts.append(f"{_clock(left)} left" if left is not None else "")
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class _Lines:
    """A line at the first batch of this attempt and every EVERY_S seconds."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._start = self._last = time.monotonic()
        self._before: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before, self._start = progress, now
            if progress.records:
                self._stream.write(f"going on after {progress.records:,} records\n")
        elif now - self._last >= EVERY_S:
            self._last = now
            self._stream.write(line(progress, now - self._start, self._before) + "\n")
            self._stream.flush()


@contextmanager
def _bar(stream: IO[str]) -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), TextColumn("{task.description}"), console=Console(file=stream)) as bar:
        task = bar.add_task("opening the annotations", total=None)
        start, before = time.monotonic(), None

        def watch(progress: Progress) -> None:
            nonlocal start, before
            if before is None:
                start, before = time.monotonic(), progress
                return
            text = line(progress, time.monotonic() - start, before)
            bar.update(task, completed=progress.share, total=None if progress.share is None else 1.0, description=text)

        yield watch
