"""The shards of a source through processes, results in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Concatenate, ParamSpec, TypeVar

from data_modules.shards import ShardSet

T = TypeVar("T")
P = ParamSpec("P")


def over_shards(
    act: Callable[Concatenate[ShardSet, int, P], T], shards: ShardSet, workers: int, *args: P.args, **kwargs: P.kwargs
) -> Iterator[T]:
    """`act(shards, shard, ...)` for every shard; in this process where one worker or one shard is all there is."""
    numbers = range(len(shards.shards))
    if min(workers, len(numbers)) <= 1:
        yield from (act(shards, number, *args, **kwargs) for number in numbers)
        return
    with ProcessPoolExecutor(min(workers, len(numbers)), get_context("spawn")) as pool:
        waiting = [pool.submit(act, shards, number, *args, **kwargs) for number in numbers]
        for future in waiting:
            yield future.result()
