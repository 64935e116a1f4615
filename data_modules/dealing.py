"""Fixed shares of samples: which lane draws which source in round k.

All lanes together. Let x be how often a source was drawn before a round, over all lanes. Its draw number j (from 1) is
released in the first round that ends with share * draws > j - 1, and must be made in the first that ends with
share * draws >= j; both are known in advance. These are unit jobs with release rounds and deadlines on N machines. Of
the jobs of one source, at most floor(share * b * N) - ceil(share * a * N) have to be made in rounds a + 1 .. b, of all
sources together at most (b - a) * N; so by Hall's theorem all can be done in time, and earliest deadline first does it.
Hence floor(share * draws) <= x <= ceil(share * draws) after every round. (The idea is that of Tijdeman 1980, "The
chairman assignment problem", taken N draws at a time.)

Every single lane. The N draws of a round go down a binary tree of lanes: each node hands its draws to its left and its
right half so that both get what they are owed of every source; the source that is owed most goes first. A node
remembers, per source, how far its left half is off. In equal halves this is orienting edges between the sources that
have an odd draw left, towards the one that is behind; it keeps a node within about a sample. What a node is off counts
half in each of its children, so all levels together stay within about twice that.

A lane's state is the round, one bit a source (whether x is above the floor), and what the nodes above the lane
remember: three bytes a level with five sources. Lanes of one process share the work of the last rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from data_modules.shares import ONE

KEPT = 1 << 13
"""Splits of nodes that a process keeps for lanes some rounds behind the first one, up to a kilobyte each."""
_WIDTH_BITS = 6

Items = tuple[tuple[int, int], ...]
"""(source, draws of it), each source once, rising."""


@dataclass(slots=True)
class _Round:
    """The draws of one round. lags: share * draws - x * ONE of each source after it, between -ONE and ONE."""

    items: Items
    lags: tuple[int, ...]

    def above(self) -> int:
        """Bits of the sources that are above the floor of their share."""
        return sum(1 << source for source, lag in enumerate(self.lags) if lag < 0)


@dataclass(slots=True)
class _Split:
    """What a node handed to its halves in a round, and how far its left half is off afterwards, in 1 / node.whole."""

    left: Items
    right: Items
    off: tuple[int, ...]
    packed: int = -1

    def remembered(self) -> int:
        """`off` as one integer."""
        if self.packed < 0:
            self.packed = _pack(self.off)
        return self.packed


class Dealing:
    """The rule for one mix. shares: positive integers that sum to ONE."""

    def __init__(self, shares: Sequence[int], num_lanes: int) -> None:
        if sum(shares) != ONE or min(shares) < 1:
            raise ValueError(f"shares {list(shares)} are not positive integers that sum to {ONE}")
        self.shares = tuple(shares)
        self.num_lanes = num_lanes
        self.rounds: dict[int, _Round] = {}
        self.splits: dict[int, _Split] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "rounds": {}, "splits": {}}  # a worker fills its own

    def lane(self, lane: int, mix: Sequence[int]) -> DealtCursor:
        """The cursor of a lane; ValueError where `mix` is not one of its states."""
        path = _path(lane, self.num_lanes)
        number, above, *packed = mix or (0, 0, *(0 for _ in path))
        if len(packed) != len(path) or number < 0 or above >> len(self.shares):
            raise ValueError(f"{len(packed)} levels, this mixture has {len(path)}")
        drawn = number * self.num_lanes
        lags = tuple(
            (share * drawn & ONE - 1) - ((above >> source & 1) << 40) for source, share in enumerate(self.shares)
        )
        splits = [_Split((), (), _unpack(one, len(self.shares)), one) for one in packed]
        return DealtCursor(self, path, number, _Round((), lags), splits)

    def round(self, number: int, lags: tuple[int, ...]) -> _Round:
        """The draws of a round, kept for the other lanes. lags: those after the round before."""
        num_lanes = left = self.num_lanes
        draws, after, released = [], [], []
        for source, share in enumerate(self.shares):
            lag = lags[source] + share * num_lanes
            due = lag >> 40 if lag > 0 else 0
            lag -= due << 40
            if lag > 0:
                released.append(((ONE - 1 - lag) // share, source))  # whole draws before its deadline
            draws.append(due)
            after.append(lag)
            left -= due
        if left:
            released.sort()
            for _, source in released[:left]:
                draws[source] += 1
                after[source] -= ONE
        if len(self.rounds) >= KEPT // 8:
            _forget(self.rounds)
        items = tuple([(source, count) for source, count in enumerate(draws) if count])
        self.rounds[number] = made = _Round(items, tuple(after))
        return made

    def split(self, key: int, node: _Node, items: Items, off: tuple[int, ...]) -> _Split:
        """What a node does with its draws of a round, kept for its other lanes under `key`."""
        if len(self.splits) >= KEPT:
            _forget(self.splits)
        self.splits[key] = made = node.split(items, off, key)
        return made


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of the tree of lanes.

    number: heap order, root 1. size, left: lanes below it, and in its left half. part / whole: left / size, reduced.
    """

    number: int
    size: int
    left: int
    part: int
    whole: int

    def split(self, items: Items, off: tuple[int, ...], salt: int) -> _Split:
        """Hand `items` (of `size` draws) to both halves. salt: decides between equals."""
        part, whole = self.part, self.whole
        taken = self._of_two(items, off, salt) if len(items) == 2 else self._of_many(items, off, salt)
        new, left, right = list(off), [], []
        for (source, count), have in zip(items, taken, strict=True):
            new[source] += whole * have - part * count
            if have:
                left.append((source, have))
            if have < count:
                right.append((source, count - have))
        return _Split(tuple(left), tuple(right), tuple(new))

    def _of_two(self, items: Items, off: tuple[int, ...], salt: int) -> tuple[int, int]:
        """How many of each the left half takes, so that both sources are off by the same."""
        (first, first_count), (second, second_count) = items
        wanted = 2 * (self.part * first_count - off[first]) + off[first] + off[second] + self.whole
        have = (wanted - (salt * 40503 >> 7 & 1)) // (2 * self.whole)
        have = min(max(have, 0, self.left - second_count), first_count, self.left)
        return have, self.left - have

    def _of_many(self, items: Items, off: tuple[int, ...], salt: int) -> list[int]:
        """How many of each the left half takes: whole samples owed, then to the largest rest."""
        part, whole = self.part, self.whole
        wanted = [part * count - off[source] for source, count in items]
        taken = [min(max(want // whole, 0), count) for want, (_, count) in zip(wanted, items, strict=True)]
        missing = self.left - sum(taken)
        while missing:
            step = 1 if missing > 0 else -1
            order = sorted(
                [
                    (step * (whole * taken[place] - wanted[place]), (source * 40503 ^ salt * 30011) & 0xFFFF, place)
                    for place, (source, count) in enumerate(items)
                    if (taken[place] < count if step > 0 else taken[place] > 0)
                ]
            )
            for _, _, place in order[: abs(missing)]:
                taken[place] += step
            missing = self.left - sum(taken)
        return taken


class DealtCursor:
    """One lane's place in the rounds. last: the round before `number`."""

    def __init__(
        self, dealing: Dealing, path: Sequence[tuple[_Node, bool]], number: int, last: _Round, splits: list[_Split]
    ) -> None:
        self._dealing = dealing
        self._path = path
        self._number = number
        self._last = last
        self._splits = splits
        self._next: tuple[int, _Round, list[_Split]] | None = None

    def choose(self, step: int) -> int:
        """The source of this lane's draw; the step does not matter."""
        if self._next is not None:
            return self._next[0]
        dealing, number = self._dealing, self._number
        drawn = dealing.rounds.get(number) or dealing.round(number, self._last.lags)
        items, splits = drawn.items, self._splits
        if len(items) > 1 and self._path:
            splits = list(splits)
            first_key = number * 2 * dealing.num_lanes
            kept = dealing.splits
            for level, (node, is_right) in enumerate(self._path):
                key = first_key + node.number
                split = kept.get(key) or dealing.split(key, node, items, splits[level].off)
                splits[level] = split
                items = split.right if is_right else split.left
                if len(items) == 1:  # the nodes below share out one source: nobody's error changes
                    break
        source = items[0][0]
        self._next = source, drawn, splits
        return source

    def count(self, source: int, tokens: int, targets: int) -> None:
        """The draw was made."""
        assert self._next is not None and self._next[0] == source, "count() follows choose()"
        _, self._last, self._splits = self._next
        self._number += 1
        self._next = None

    def state(self) -> list[int]:
        """Round, bits, and what each node above this lane remembers."""
        return [self._number, self._last.above(), *[split.remembered() for split in self._splits]]


def _path(lane: int, num_lanes: int) -> list[tuple[_Node, bool]]:
    """The nodes above a lane, from the root, and whether it is in their right half."""
    path, number, start, size = [], 1, 0, num_lanes
    while size > 1:
        left = size // 2
        common = gcd(left, size)
        is_right = lane >= start + left
        path.append((_Node(number, size, left, left // common, size // common), is_right))
        start, size = (start + left, size - left) if is_right else (start, left)
        number = 2 * number + is_right
    return path


def _pack(numbers: Sequence[int]) -> int:
    """Small signed integers as one: their width in bits, then each of them, its sign in the lowest bit."""
    folded = [2 * number if number >= 0 else -2 * number - 1 for number in numbers]
    width = max(folded).bit_length()
    packed = 0
    for one in reversed(folded):
        packed = packed << width | one
    return packed << _WIDTH_BITS | width


def _unpack(packed: int, count: int) -> tuple[int, ...]:
    """The integers again; ValueError where `packed` cannot be `count` of them."""
    width = packed & (1 << _WIDTH_BITS) - 1
    rest = packed >> _WIDTH_BITS
    if packed < 0 or rest >> width * count:
        raise ValueError(f"{packed} does not hold {count} numbers of {width} bits")
    folded = [rest >> width * place & (1 << width) - 1 for place in range(count)]
    return tuple(one >> 1 if not one & 1 else -(one + 1 >> 1) for one in folded)


def _forget(kept: dict[int, _Round] | dict[int, _Split]) -> None:
    """Drop the oldest quarter; several threads may do so at once."""
    for key in list(kept)[: 1 + len(kept) // 4]:
        kept.pop(key, None)
