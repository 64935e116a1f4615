"""What the reading of remote files has cost so far, for a log."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Counters:
    """Since this process began: spans found in the cache and fetched, bytes fetched, tries repeated, files evicted.

    corrupt: cached files that were not what had been written, and were fetched again.
    """

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    evictions: int = 0
    corrupt: int = 0


@dataclass(slots=True)
class Tally:
    """Counters that several threads raise."""

    counters: Counters = field(default_factory=Counters)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: int = 1) -> None:
        """Raise one counter."""
        with self._lock:
            setattr(self.counters, name, getattr(self.counters, name) + amount)

    def copy(self) -> Counters:
        """The counters of this moment."""
        with self._lock:
            return Counters(**asdict(self.counters))
