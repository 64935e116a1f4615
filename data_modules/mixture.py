"""Which source a lane draws from next: the one that is furthest behind its share.

Integers only, so the order is the same on every machine. Lane c starts as if it had already made c / (N * smallest
share) draws: without this phase all lanes would draw the rare source in the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ONE = 1 << 40
"""The integer that stands for the whole."""


class Mixture:
    """Shares of the sources, and every lane's warm start.

    weights: name -> share, on any scale; one draw is one sample.
    """

    def __init__(self, weights: Mapping[str, float], num_lanes: int) -> None:
        bad = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
        if bad or not weights:
            raise ValueError(f"weights of sources must be positive numbers, these are not: {bad or 'no source at all'}")
        total = sum(weights.values())
        shares = [max(1, round(weight / total * ONE)) for weight in weights.values()]
        shares[shares.index(max(shares))] += ONE - sum(shares)
        self.shares: tuple[int, ...] = tuple(shares)
        self._starts = self._warm_starts(num_lanes)

    def start(self, lane: int) -> list[int]:
        """Virtual draws of each source before a lane's first real one."""
        return list(self._starts[lane])

    def choose(self, draws: Sequence[int]) -> int:
        """The source with the largest deficit after `draws` (virtual ones included); the first of equals."""
        if len(draws) == 1:
            return 0
        total = sum(draws) + 1
        deficits = [share * total - count * ONE for share, count in zip(self.shares, draws, strict=True)]
        return deficits.index(max(deficits))

    def _warm_starts(self, num_lanes: int) -> list[tuple[int, ...]]:
        draws = [0] * len(self.shares)
        starts: list[tuple[int, ...]] = []
        for lane in range(num_lanes):
            whole = num_lanes * min(self.shares)
            wanted = (2 * lane * ONE + whole) // (2 * whole)  # to the nearest: shares are rounded themselves
            while sum(draws) < wanted:
                draws[self.choose(draws)] += 1
            starts.append(tuple(draws))
        return starts
