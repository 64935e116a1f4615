"""What was left out, and the budget of damage.

Planning runs ahead of decoding where threads decode, so losses are found early and counted late: the counts in the
state after row t are exactly those of rows up to t, whoever made the rows and however far ahead they were planned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bestiary.schema import SampleError, SampleTooLongError
from data_modules.records import Reason
from data_modules.shards import ShardSet
from data_modules.sources import StreamError

log = logging.getLogger(__name__)

BUDGET_WINDOW = 1000
"""The share of damaged samples is taken of at least so many: three samples are no statistic."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One sample that is left out. drawn: samples the lane had drawn of its source by then. error: None = skip list."""

    source: int
    index: int
    reason: Reason
    drawn: int
    error: SampleError | None = None


class Policies(Protocol):
    """The rules a ledger looks at."""

    @property
    def too_long(self) -> str: ...  # noqa: D102

    @property
    def bad_budget(self) -> float: ...  # noqa: D102


class Ledger:
    """The losses of one lane: (source, shard, reason) -> samples, and whether the run may go on.

    losses: the lane state's own dict; it is changed in place. reported: (source, sample) that were logged already, by
    any lane of this process: a damaged sample is one line, however many epochs meet it.
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[ShardSet],
        rules: Policies,
        lane: int,
        losses: dict[tuple[int, int, int], int],
        reported: set[tuple[int, int]],
    ) -> None:
        self._names, self._sources, self._rules, self._lane = names, sources, rules, lane
        self.losses = losses
        self._reported = reported
        # What somebody asked for is counted, but not held against the source. What was to be cut and cannot be is.
        self._asked_for = {Reason.SKIPPED, *([Reason.TOO_LONG] if rules.too_long == "skip" else [])}
        self._foreseen = [self._damage(source) for source in range(len(names))]

    def foresee(self, loss: Loss) -> bool:
        """Note a loss that planning found and that will be counted later; False when it is sure to stop the run."""
        if isinstance(loss.error, SampleTooLongError) and self._rules.too_long == "error":
            return False
        if self._reason(loss) in self._asked_for:
            return True
        self._foreseen[loss.source] += 1
        return self._foreseen[loss.source] <= self._allowed(loss.drawn)

    def count(self, loss: Loss, *, foreseen: bool) -> None:
        """Count a loss; StreamError where a policy or the budget of damage forbids it."""
        name, reason = self._names[loss.source], self._reason(loss)
        if isinstance(loss.error, SampleTooLongError) and self._rules.too_long == "error":
            raise StreamError(f"source {name!r}: {loss.error}") from loss.error
        spot = (loss.source, self._sources[loss.source].locate(loss.index)[0], int(reason))
        self.losses[spot] = self.losses.get(spot, 0) + 1
        if reason in self._asked_for:
            return
        if not foreseen:
            self._foreseen[loss.source] += 1
        if (loss.source, loss.index) not in self._reported:
            self._reported.add((loss.source, loss.index))
            shard = self._sources[loss.source].shards[spot[1]].file
            log.warning("source %s, %s: left out (%s): %s", name, shard, reason.name.lower(), loss.error)
        if self._damage(loss.source) > self._allowed(loss.drawn):
            raise self._overdrawn(loss) from loss.error

    def _allowed(self, drawn: int) -> float:
        return self._rules.bad_budget * max(drawn, BUDGET_WINDOW)

    def _damage(self, source: int) -> int:
        return sum(n for (of, _, reason), n in self.losses.items() if of == source and reason not in self._asked_for)

    @staticmethod
    def _reason(loss: Loss) -> Reason:
        return Reason.TOO_LONG if isinstance(loss.error, SampleTooLongError) else loss.reason

    def _overdrawn(self, loss: Loss) -> StreamError:
        shards = self._sources[loss.source]
        damage = {
            (shard, reason): count
            for (source, shard, reason), count in self.losses.items()
            if source == loss.source and reason not in self._asked_for
        }
        (shard, kind), worst = max(damage.items(), key=lambda item: item[1])
        path = shards.where(shard)
        return StreamError(
            f"source {self._names[loss.source]!r}: {sum(damage.values())} damaged samples after {loss.drawn} draws of "
            f"lane {self._lane}, more than data.bad_budget={self._rules.bad_budget} allows; worst is {path} "
            f"({worst} x {Reason(kind).name.lower()}); last: {loss.error}; write the shard again or raise the budget"
        )
