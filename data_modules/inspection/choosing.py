"""Which samples a preview shows."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import accumulate, islice

from data_modules.inspection.preview import Shown
from data_modules.records import DamagedSampleError
from data_modules.shards import ShardSet


def choose(sources: Sequence[ShardSet], *, num: int = 24, seed: int = 0, keys: Sequence[str] = ()) -> list[Shown]:
    """`num` samples of all sources together, drawn without repetition, in their order; or those with certain keys."""
    if keys:
        places = _with_keys(sources, keys)
    else:
        if num < 1:
            raise ValueError(f"num is {num}; show at least one sample")
        ends = list(accumulate(map(len, sources)))
        drawn = sorted(random.Random(seed).sample(range(ends[-1]), min(num, ends[-1])))
        places = [
            (which, number - (ends[which] - len(sources[which]))) for number in drawn for which in [_of(ends, number)]
        ]
    return [_shown(sources[which], number) for which, number in places]


def _of(ends: Sequence[int], number: int) -> int:
    return bisect_right(ends, number)


def _shown(shards: ShardSet, number: int) -> Shown:
    try:
        return Shown(shards[number], shards.location)
    except DamagedSampleError as error:
        return Shown(error, shards.location)


def _with_keys(sources: Sequence[ShardSet], keys: Sequence[str]) -> list[tuple[int, int]]:
    """Places of keys in the order asked for; ValueError names the nearest key of one that no source has."""
    wanted = set(keys)
    found: dict[str, list[tuple[int, int]]] = {key: [] for key in keys}
    for which, shards in enumerate(sources):
        for number, key in enumerate(shards.keys()):
            if key in wanted:
                found[key].append((which, number))
    for key, places in found.items():
        if not places:
            some = [key for shards in sources for key in islice(shards.keys(), 10_000)]
            near = get_close_matches(key, some, n=1) or some[:1]
            names = ", ".join(shards.name for shards in sources)
            raise ValueError(f"no sample of {names} has the key {key!r}; one is {near[0]!r}")
    return [place for key in found for place in found[key]]
