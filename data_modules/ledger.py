"""What was left out, and the budget of damage.

Planning runs ahead of decoding where threads decode, so losses are found early and counted late: the counts in the
state after row t are exactly those of rows up to t, whoever made the rows and however far ahead they were planned.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bestiary.schema import SampleError, SampleTooLongError
from data_modules.lanes import LaneState
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
        self._asked_for = _asked_for(rules)
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
        damage = {
            (shard, reason): count
            for (source, shard, reason), count in self.losses.items()
            if source == loss.source and reason not in self._asked_for
        }
        told = _too_much(damage, f"{loss.drawn} draws of lane {self._lane}", self._rules, self._sources[loss.source])
        return StreamError(
            f"source {self._names[loss.source]!r}: {told}; last: {loss.error}; "
            "write the shard again or raise the budget"
        )


def check_damage(
    names: Sequence[str], sources: Sequence[ShardSet], rules: Policies, states: Sequence[LaneState]
) -> None:
    """StreamError where all lanes together have left out more of a source than the budget allows.

    A lane stops alone only at what is too much for it, or many lanes would stop at what is little for all of them.
    """
    asked_for = _asked_for(rules)
    for source, (name, shards) in enumerate(zip(names, sources, strict=True)):
        damage: Counter[tuple[int, int]] = Counter()
        for state in states:
            for (of, shard, reason), count in state.losses.items():
                if of == source and reason not in asked_for:
                    damage[shard, reason] += count
        drawn = sum(state.places[source].taken + state.places[source].left_out for state in states)
        if damage.total() > rules.bad_budget * max(drawn, BUDGET_WINDOW):
            told = _too_much(damage, f"{drawn} draws of all lanes", rules, shards)
            raise StreamError(f"source {name!r}: {told}; write the shard again, or resume with a larger budget")


def _asked_for(rules: Policies) -> set[int]:
    """What is counted, but not held against a source: what was to be cut and cannot be is no part of it."""
    return {Reason.SKIPPED, *([Reason.TOO_LONG] if rules.too_long == "skip" else [])}


def _too_much(damage: Mapping[tuple[int, int], int], drawn: str, rules: Policies, shards: ShardSet) -> str:
    (shard, kind), worst = max(damage.items(), key=lambda item: item[1])
    return (
        f"{sum(damage.values())} damaged samples after {drawn}, more than data.bad_budget={rules.bad_budget} allows; "
        f"worst is {shards.where(shard)} ({worst} x {Reason(kind).name.lower()})"
    )
