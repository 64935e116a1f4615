"""The published order of SPHINX's fine-tuning over a mix of shards (`data.order=grouped`), for exact replication.

Row c of step t is sample c of global batch t: a pure function of the data, the batch size, the seed, c and t, so ranks,
workers and accumulation may change at a resume. Every source is taken once an epoch, without shares. A sample that
cannot be used is counted and replaced by the one before it in its group (of the first, by the last), as published.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from bestiary.schema import SampleError
from data_modules.grouped_sampler import GroupedSampler, length_groups
from data_modules.shards import ShardSet
from data_modules.sources import SourceSpec, StreamError

ORDERS = ("stratified", "grouped")
_WITHOUT_EFFECT = {"packing": False, "chunk": 1, "unit": "samples", "temperature": 1.0}
"""Rules that would change nothing, by the value that says so."""


class GroupedOrder:
    """Places of rows and their samples. sources: opened, local; all their texts are read once, for their lengths.

    source_kinds: which group the samples of each source belong to; None = that of those with, or without, pictures.
    StreamError where no group fills one batch of `num_lanes` samples.
    """

    def __init__(
        self, sources: Sequence[ShardSet], source_kinds: Sequence[str | None], *, num_lanes: int, seed: int
    ) -> None:
        kinds, lengths = [], []
        for shards, kind in zip(sources, source_kinds, strict=True):
            for number, (_, place) in enumerate(shards.places()):
                kinds.append(kind or ("text" if place.members == 1 else "image_text"))
                lengths.append(_characters(shards, number))
        order, sizes = length_groups(kinds, lengths)
        self._order = np.array(order, np.int64)
        self._source_ends = list(accumulate(map(len, sources)))
        self._group_ends = list(accumulate(sizes))
        self._sampler = GroupedSampler(group_sizes=sizes, batch_size=num_lanes, seed=seed)
        self.num_batches = len(self._sampler) // num_lanes
        """Steps of an epoch."""
        if not self.num_batches:
            what = f"none of the groups, of {sizes} samples, fills stage.batch_size={num_lanes}"
            raise StreamError(f"data.order=grouped: {what}; lower it")
        self._batches = lru_cache(2)(self._sampler.global_batches)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._batches = lru_cache(2)(self._sampler.global_batches)

    @property
    def num_dropped(self) -> int:
        """Samples at the long ends of the groups that no epoch has: they do not fill a batch."""
        return self._sampler.num_dropped

    def place(self, lane: int, step: int) -> tuple[int, int]:
        """(epoch, place) of a lane's row."""
        epoch, number = divmod(step, self.num_batches)
        return epoch, self._batches(epoch)[number][lane]

    def sample(self, place: int) -> tuple[int, int]:
        """(source, number) of the sample at a place."""
        number = int(self._order[place])
        source = bisect_right(self._source_ends, number)
        return source, number - (self._source_ends[source - 1] if source else 0)

    def before(self, place: int) -> int:
        """The place before another in its group; of the first, the last."""
        group = bisect_right(self._group_ends, place)
        first = self._group_ends[group - 1] if group else 0
        return place - 1 if place > first else self._group_ends[group] - 1


def check_grouped(specs: Sequence[SourceSpec], rules: Any) -> None:
    """StreamError of one line where an option is given that has no effect in the grouped order."""
    given = [
        f"data.{name}={getattr(rules, name)} (set {str(value).lower() if isinstance(value, bool) else value})"
        for name, value in _WITHOUT_EFFECT.items()
        if getattr(rules, name) != value
    ]
    for spec in specs:
        given += [
            f"data.sources.{spec.name}.{name}"
            for name in ("weight", "count", "repeat", "max_epochs", "schedule", "chunk")
            if getattr(spec, name) not in (None, (), 1)
        ]
    if given:
        raise StreamError(
            f"data.order=grouped takes every sample once an epoch, one a row; {', '.join(given)} would change nothing: "
            "leave it out"
        )


def _characters(shards: ShardSet, number: int) -> int:
    """Of a sample's turns together; 0 of one that cannot be read, which is replaced when its turn comes."""
    if not shards.storage.is_local:
        raise StreamError(f"data.order=grouped reads every text first: copy {shards.location} to a local folder")
    try:
        return sum([len(turn.text) for turn in shards.view(number).turns])
    except SampleError:
        return 0
