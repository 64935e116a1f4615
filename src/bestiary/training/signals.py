"""Ctrl-C and SIGTERM as wishes: the step in progress ends, a checkpoint is written, then the run stops.

A second signal stops at once. Nothing is saved inside a handler (half-updated weights), and forked data workers, which
inherit the handlers, leave them without effect.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Counts the signals that ask this process to stop.

    on_second: called before a second signal ends the process (it may write status.json, nothing more).
    """

    def __init__(self, on_second: Callable[[], None] = lambda: None) -> None:
        self.on_second = on_second
        self.seen = {number: 0 for number in STOP_SIGNALS}
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        """Install the handlers; the ones there before come back at exit."""
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals (again: Lightning puts its own SIGTERM handler in place when a fit begins)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def counts(self) -> tuple[int, int]:
        """(SIGINTs, SIGTERMs) so far."""
        return self.seen[signal.SIGINT], self.seen[signal.SIGTERM]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        name = signal.Signals(number)
        is_second = any(self.seen.values())
        self.seen[name] += 1
        if not is_second:
            log.warning("%s: finishing this step and saving a checkpoint; once more stops at once", name.name)
            return
        self.on_second()
        signal.signal(number, signal.SIG_DFL)
        os.kill(self._pid, number)


def exit_code(stop_signals: tuple[int, int]) -> int:
    """128 + the signal's number, as shells report it: 143 after SIGTERM, 130 after SIGINT, 0 without."""
    interrupts, terminates = stop_signals
    if terminates:
        return 128 + signal.SIGTERM
    return 128 + signal.SIGINT if interrupts else 0
