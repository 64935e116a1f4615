"""Counting a run: what was described, what waits for a summary, what was refused and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256

KEPT_PROBLEMS = 100_000
"""Refusals that are kept one by one; later ones are counted only."""


class BudgetError(ValueError):
    """More refused pictures than allowed; one line that names the last one."""


@dataclass
class Tally:
    """allowed: refused pictures up to which a run goes on.

    described: by this run. cached: found done. silent: about which no expert said anything that the filters kept.
    pending: without a summary as yet.
    """

    allowed: int
    described: int = 0
    cached: int = 0
    silent: int = 0
    pending: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, reason, problem) of each refused picture."""
    last_postponed: str = ""
    _identity: int = 0

    @property
    def seen(self) -> int:
        """Pictures of any kind."""
        return self.described + self.cached + self.silent + self.pending + self.refused

    @property
    def refused(self) -> int:
        """Pictures refused for any reason."""
        return self.reasons.total()

    @property
    def identity(self) -> str:
        """A hash of all keys, pictures and answers, whatever their order: equal ones make equal shards."""
        return f"{self._identity:064x}"

    def describe(self, key: str, digest: str, answer: str, *, is_cached: bool) -> None:
        """A picture is done."""
        self.cached += is_cached
        self.described += not is_cached
        self.note(key, digest, answer)

    def note(self, key: str, digest: str, answer: str) -> None:
        """Add a finished picture to the identity."""
        part = sha256("\0".join((key, digest, answer)).encode()).digest()
        self._identity = (self._identity + int.from_bytes(part)) % 2**256

    def postpone(self, name: str, problem: str) -> None:
        """A picture has no summary as yet."""
        self.pending += 1
        self.last_postponed = f"{name}: {problem}"

    def refuse(self, name: str, reason: str, problem: str) -> None:
        """A picture cannot be described; BudgetError once there are too many."""
        self.reasons[reason] += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append((name, reason, problem))
        if self.refused > self.allowed:
            told = problem if name in problem else f"{name}: {problem}"
            raise BudgetError(
                f"{self.refused} of {self.seen} pictures could not be described, {self.allowed} are allowed "
                f"(--bad-budget); the last: {told}"
            )
