"""Shares that change with the step, or shares of tokens: every lane draws the source that is owed most.

A lane keeps one credit per source. A sample of amount a (1, its tokens, or its target tokens) adds share * a to every
credit and takes ONE * a from its own source, so credits always sum to 0. With amounts up to A, no credit falls below
-A * ONE: the source drawn had the largest credit, which is not negative. Above, the mean of the m largest credits can
pass the mean of the m + 1 largest by at most A / (m + 1), so no credit passes A * (1 + 1/2 + ... + 1/S). A source whose
share has gone to 0 is not drawn again; what it is still owed then stays with it.

Lanes start at different phases, or all of them would draw a rare source in the same step: lane c as if it had already
made c / (N * smallest share) draws of amount 1. Sources too rare for that, or absent at step 0, start evenly spread
over one draw. The amount of a lane's first sample gives its phase the scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_modules.lanes import Permutation, hash_ints
from data_modules.shares import ONE, Shares

_RARE = ONE >> 10
"""Sources with a smaller share are spread directly: virtual draws would be thousands."""


class Credits:
    """The rule for one mix."""

    def __init__(self, shares: Shares, num_lanes: int) -> None:
        self._shares = shares
        self._fixed = shares.at(0) if shares.is_fixed else None
        self._last: tuple[int, tuple[int, ...]] = (0, shares.at(0))
        self._phases = _phases(shares.at(0), num_lanes)
        self.unit = shares.unit

    def at(self, step: int) -> tuple[int, ...]:
        """Shares at a step."""
        if self._fixed is not None:
            return self._fixed
        last = self._last
        if last[0] == step:
            return last[1]
        shares = self._shares.at(step)
        self._last = (step, shares)
        return shares

    def lane(self, lane: int, mix: Sequence[int]) -> CreditCursor:
        """The cursor of a lane; ValueError where `mix` is not one of its states."""
        if not mix:
            return CreditCursor(self, list(self._phases[lane]), is_new=True)
        if len(mix) != len(self._phases[lane]) - 1:
            raise ValueError(f"{len(mix)} credits, this mixture has {len(self._phases[lane]) - 1}")
        return CreditCursor(self, [*mix, -sum(mix)], is_new=False)


class CreditCursor:
    """One lane's credits. is_new: nothing was drawn yet, credits are those of samples of amount 1."""

    def __init__(self, credits: Credits, owed: list[int], *, is_new: bool) -> None:
        self._credits = credits
        self._owed = owed
        self._is_new = is_new
        self._shares: tuple[int, ...] = ()
        self._unit = credits.unit

    def choose(self, step: int) -> int:
        """The source that is owed most among those with a share in this step."""
        self._shares = shares = self._credits.at(step)
        return _most_owed(self._owed, shares)

    def count(self, source: int, tokens: int, targets: int) -> None:
        """A sample of the chosen source was drawn."""
        amount = 1 if self._unit == "samples" else tokens if self._unit == "tokens" else targets
        if self._is_new:
            self._owed = [owed * max(amount, 1) for owed in self._owed]
            self._is_new = False
        owed = [had + share * amount for had, share in zip(self._owed, self._shares, strict=True)]
        owed[source] -= ONE * amount
        self._owed = owed

    def state(self) -> list[int]:
        """All credits but the last, which is minus their sum."""
        return [] if self._is_new else self._owed[:-1]


def _most_owed(owed: Sequence[int], shares: Sequence[int]) -> int:
    """Of equals the one with the largest share, then the first."""
    source = owed.index(max(owed))
    if shares[source] and owed.count(owed[source]) == 1:
        return source
    present = [number for number, share in enumerate(shares) if share]
    return max(present, key=lambda number: (owed[number], shares[number], -number))


def _phases(shares: Sequence[int], num_lanes: int) -> list[list[int]]:
    """Credits of each lane before its first draw, for samples of amount 1; each lane's sum to 0."""
    common = shares.index(max(shares))
    usual = [share if share >= _RARE else 0 for share in shares]
    usual[common] += ONE - sum(usual)
    smallest = num_lanes * min(share for share in usual if share)
    owed = [0] * len(shares)
    phases, drawn = [], 0
    for lane in range(num_lanes):
        while drawn < (2 * lane * ONE + smallest) // (2 * smallest):
            source = _most_owed(owed, usual)
            owed = [had + share for had, share in zip(owed, usual, strict=True)]
            owed[source] -= ONE
            drawn += 1
        phases.append(list(owed))
    rare = [source for source, share in enumerate(usual) if not share]
    for source in rare:
        order = Permutation(num_lanes, hash_ints(source, num_lanes))
        middle = (len(rare) - 1) * ONE // (2 * len(rare))  # so that all of them together are owed about half a sample
        for lane in range(num_lanes):
            late = ONE - middle - (2 * order[lane] + 1) * ONE // (2 * num_lanes)
            phases[lane][source] -= late
            phases[lane][common] += late
    return phases
