"""Lanes: which sample comes next, and the state that says where a lane is.

A run has N lanes, N = rows of a global batch; lane c makes row c of every step, whoever computes it. A source with K
chunks is dealt as one endless order, its epochs' permutations one after another: lane c takes places g = c + j*N for
j = 0, 1, 2 ..., where g div K is the epoch and g mod K the place in that epoch. So every chunk of an epoch belongs to
exactly one lane, with any number of lanes, and nobody needs to ask anybody.

The state of a lane is a few integers. It travels as bytes beside the row it comes after.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

import numpy as np

ALGORITHM = 2
"""Version of everything that decides the order of samples; part of the fingerprint and of every state."""

_MASK = (1 << 64) - 1
ROUNDS = 8
"""Rounds of the Feistel network below."""


def mix64(value: int) -> int:
    """A fixed 64-bit integer hash: the finalizer of SplitMix64 (Steele, Lea, Flood 2014) after one increment."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def hash_ints(*values: int) -> int:
    """64 bits that depend on every value and on their order."""
    state = 0
    for value in values:
        state = mix64(state ^ mix64(value & _MASK))
    return state


def hash_name(name: str) -> int:
    """64 bits of a source's name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def rectangle(size: int) -> tuple[int, int]:
    """(rows, columns) of the smallest rectangle of about sqrt(size) x sqrt(size) that holds `size` things."""
    rows = isqrt(size - 1) + 1
    return rows, -(-size // rows)


class Permutation:
    """A permutation of range(size) that costs the same at any place and keeps no table.

    A Feistel network over the smallest rectangle of about sqrt(size) x sqrt(size), walked until it lands inside.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} things")
        self.size = size
        self._rows, self._columns = rectangle(size)
        self._keys = [hash_ints(key, number) for number in range(ROUNDS)]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size}")
        while True:
            row, column = divmod(place, self._columns)
            for number, key in enumerate(self._keys):
                if number % 2:
                    column = (column + mix64(key ^ row)) % self._columns
                else:
                    row = (row + mix64(key ^ column)) % self._rows
            place = row * self._columns + column
            if place < self.size:
                return place


class Deal:
    """One source as every lane sees it: its chunks, and whose turn each of them is.

    shard_sizes: samples of each shard. chunk: consecutive samples of one shard that stay together.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int], *, chunk: int, seed: int, num_lanes: int) -> None:
        self.chunk = chunk
        self.num_lanes = num_lanes
        self.key = hash_ints(seed, hash_name(name))
        self._sizes = tuple(shard_sizes)
        self._samples_before = (0, *accumulate(self._sizes))
        self._chunks_until = list(accumulate(-(-size // chunk) for size in self._sizes))
        self.num_chunks = self._chunks_until[-1]
        self._permutations: dict[int, Permutation] = {}

    def turn(self, lane: int, j: int) -> tuple[int, range]:
        """(epoch, numbers of the samples) of a lane's j-th chunk."""
        epoch, place = divmod(lane + j * self.num_lanes, self.num_chunks)
        number = self._permutation(epoch)[place]
        shard = bisect_right(self._chunks_until, number)
        first_chunk = self._chunks_until[shard - 1] if shard else 0
        start = (number - first_chunk) * self.chunk
        stop = min(start + self.chunk, self._sizes[shard])
        before = self._samples_before[shard]
        return epoch, range(before + start, before + stop)

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First sample, and the one after the last, of chunks by number. numbers: int64[n]."""
        if self.chunk == 1:
            return numbers, numbers + 1
        shards = np.searchsorted(self._chunks_until, numbers, side="right")
        first_chunks = np.array([0, *self._chunks_until])[shards]
        starts = (numbers - first_chunks) * self.chunk
        stops = np.minimum(starts + self.chunk, np.array(self._sizes)[shards])
        before = np.array(self._samples_before)[shards]
        return before + starts, before + stops

    def _permutation(self, epoch: int) -> Permutation:
        found = self._permutations.get(epoch)
        if found is None:
            if len(self._permutations) > 8:  # lanes live in neighbouring epochs; a few are enough
                self._permutations.clear()
            found = self._permutations[epoch] = Permutation(self.num_chunks, hash_ints(self.key, epoch))
        return found


class Ref(NamedTuple):
    """A sample that waits undecoded: where it is and what it costs in both budgets."""

    source: int
    index: int  # type: ignore[assignment]  # it hides tuple.index, which nobody asks a Ref for
    epoch: int
    tokens: int
    views: int


@dataclass(slots=True)
class Place:
    """Where a lane is in one source.

    j: its current chunk; offset: samples of it already drawn; taken: samples that went to the packer;
    left_out: samples that did not (damaged, or too long under the policy `skip`).
    """

    j: int = 0
    offset: int = 0
    taken: int = 0
    left_out: int = 0


@dataclass(slots=True)
class LaneState:
    """Everything a lane needs to go on.

    rows: rows emitted. waiting: the packer's look-ahead, oldest first.
    losses: (source, shard, reason) -> samples left out or found broken while decoding.
    mix: the lane's place in the mixture; only `mixture.py` reads it. [] = at its start.
    """

    lane: int
    places: list[Place]
    rows: int = 0
    waiting: list[Ref] = field(default_factory=list)
    losses: dict[tuple[int, int, int], int] = field(default_factory=dict)
    mix: list[int] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The state as variable-length integers; equal states give equal bytes."""
        numbers = [ALGORITHM, self.lane, self.rows, len(self.places)]
        for place in self.places:
            numbers += [place.j, place.offset, place.taken, place.left_out]
        numbers.append(len(self.waiting))
        for ref in self.waiting:
            numbers += ref
        numbers.append(len(self.losses))
        for (source, shard, reason), count in sorted(self.losses.items()):
            numbers += [source, shard, reason, count]
        numbers.append(len(self.mix))
        numbers += [2 * number if number >= 0 else -2 * number - 1 for number in self.mix]
        return _to_varints(numbers)

    @classmethod
    def from_bytes(cls, data: bytes) -> LaneState:
        """The state again; ValueError when the bytes are not one of this version."""
        numbers = _from_varints(data)
        try:
            version = next(numbers)
            if version != ALGORITHM:
                raise ValueError(f"lane state of version {version}, this program writes {ALGORITHM}")
            lane, rows = next(numbers), next(numbers)
            places = [Place(*_take(numbers, 4)) for _ in range(next(numbers))]
            waiting = [Ref(*_take(numbers, 5)) for _ in range(next(numbers))]
            losses: dict[tuple[int, int, int], int] = {}
            for _ in range(next(numbers)):
                source, shard, reason, count = _take(numbers, 4)
                losses[source, shard, reason] = count
            mix = [folded >> 1 if not folded & 1 else -(folded + 1 >> 1) for folded in _take(numbers, next(numbers))]
        except (StopIteration, IndexError):
            raise ValueError(f"lane state of {len(data)} bytes is cut off") from None
        if next(numbers, None) is not None:
            raise ValueError(f"lane state of {len(data)} bytes is longer than it should be")
        return cls(lane, places, rows, waiting, losses, mix)


def lanes_of(part: int, parts: int, lanes: range) -> range:
    """The contiguous block of lanes that belongs to one of several ranks, or to one of a rank's workers."""
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts}")
    cut = [lanes.start + len(lanes) * number // parts for number in (part, part + 1)]
    return range(*cut)


def _to_varints(numbers: Iterable[int]) -> bytes:
    """Seven bits a byte, lowest first; the high bit says that more follow."""
    return b"".join([_ONE_BYTE[number] if number < 128 else _varint(number) for number in numbers])


_ONE_BYTE = tuple(bytes([number]) for number in range(128))


@lru_cache(1 << 14)  # a waiting sample is written again with every row
def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _from_varints(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
    if shift:
        raise IndexError("bytes end inside a number")


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]
