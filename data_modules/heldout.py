"""Held-out samples for the benchmarks: several sources as one sequence, each sample read when asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from bestiary.schema import Sample
from data_modules.sources import SourceSpec, missing_sources, parse_sources
from data_modules.storage import DEFAULT_CACHE_BYTES, Storage

SourceGroup = Mapping[str, Mapping[str, Any] | SourceSpec]


def missing(*groups: SourceGroup) -> dict[str, str]:
    """Location -> one line, for every source of any group that is not on disk; a group may be empty."""
    specs = [spec for group in groups if group for spec in parse_sources(group)]
    return {spec.location: line for spec in specs for line in missing_sources({spec.name: spec})}


class Samples(Sequence[Sample]):
    """All samples of all sources (possibly none), in their order; only shards are held, never pictures.

    cache_root, cache_gb: where what is fetched from URLs is kept, and how much of it; for a run those of its stream.
    """

    def __init__(
        self,
        sources: SourceGroup,
        *,
        cache_root: str | Path | None = None,
        cache_gb: float = DEFAULT_CACHE_BYTES / 2**30,
    ) -> None:
        storage = Storage(cache_root or None, int(cache_gb * 2**30))
        self._opened = {spec.name: spec.open(storage) for spec in parse_sources(sources)} if sources else {}
        self._sets = list(self._opened.values())
        self._ends = list(accumulate(len(shards) for shards in self._sets))

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in their order."""
        return tuple(self._opened)

    def of(self, names: Sequence[str]) -> Samples:
        """The samples of some sources alone, nothing opened again."""
        chosen = Samples({})
        chosen._opened = {name: self._opened[name] for name in names}
        chosen._sets = list(chosen._opened.values())
        chosen._ends = list(accumulate(len(shards) for shards in chosen._sets))
        return chosen

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"sample {place} of {len(self)}")
        number = place % len(self)
        which = bisect_right(self._ends, number)
        return self._sets[which][number - (self._ends[which - 1] if which else 0)]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))
