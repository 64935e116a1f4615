"""Is a source what was written: hashes of every sample, the index against the tar, and, if asked, every picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

from PIL import Image

from bestiary.schema import Sample
from data_modules.adapters.images import PILLOW_FORMATS
from data_modules.index import FOREIGN, Shard
from data_modules.inspection.parallel import over_shards
from data_modules.records import DamagedSampleError
from data_modules.shards import ShardSet
from data_modules.ustar import END

DECODE_LIMIT = 200_000_000
"""Pixels of a picture beyond which it is not decoded but reported: nobody trains on it, and it may be a bomb."""


def check_source(
    shards: ShardSet, *, decode: bool = False, workers: int = 1, watch: Callable[[Shard], None] | None = None
) -> Iterator[str]:
    """One line for every problem of a source, in order.

    decode: also decode every picture. watch: called after every shard.
    """
    for facts, problems in zip(shards.shards, over_shards(check_shard, shards, workers, decode), strict=True):
        yield from problems
        if watch is not None:
            watch(facts)


def check_shard(shards: ShardSet, shard: int, decode: bool = False) -> list[str]:
    """The problems of one shard; a shard that cannot be opened is one."""
    try:
        problems = [*shards.verify_shard(shard), *_gaps(shards, shard)]
        if shards.is_foreign:  # an index says where members lie, not whether they mean anything
            problems = [*dict.fromkeys([*problems, *_unreadable(shards, shard)])]
        return [*problems, *_undecodable(shards, shard)] if decode else problems
    except (ValueError, OSError) as error:
        return [str(error) if shards.shards[shard].file in str(error) else f"{shards.where(shard)}: {error}"]


def image_problem(data: bytes | memoryview) -> str | None:
    """Why a picture cannot be decoded, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                if image.width * image.height > DECODE_LIMIT:
                    return f"has {image.width} x {image.height} pixels, more than {DECODE_LIMIT}"
                image.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({' '.join(str(error).split())})"
    return None


def readable_samples(shards: ShardSet, shard: int) -> Iterator[Sample | DamagedSampleError]:
    """The samples of a shard in order, or what is wrong in their place."""
    first = shards.first_of(shard)
    for number in range(first, first + shards.shards[shard].samples):
        try:
            yield shards.view(number)
        except DamagedSampleError as error:
            yield error


def _gaps(shards: ShardSet, shard: int) -> Iterator[str]:
    """Samples must follow one another without gaps up to the end of the tar, in shards of our own."""
    facts, at = shards.shards[shard], 0
    for found, place in shards.places(shard):
        if place.flags & FOREIGN:
            return
        if place.offset != at:
            yield f"{shards.where(shard)}: byte {at} should begin a sample, the index says byte {place.offset}"
            return
        at = place.offset + place.size
        assert found is facts, "places of one shard"
    size = shards.storage.size(facts.file)
    if size != facts.bytes or at + len(END) != size:
        yield f"{shards.where(shard)}: has {size} bytes, its samples and source.json make it {at + len(END)}"


def _unreadable(shards: ShardSet, shard: int) -> Iterator[str]:
    for sample in readable_samples(shards, shard):
        if isinstance(sample, DamagedSampleError):
            yield _told(shards, shard, sample)


def _told(shards: ShardSet, shard: int, damage: DamagedSampleError) -> str:
    where = shards.where(shard)
    return f"{where}: sample {damage.key}: {damage.problem.removeprefix(f'{where}: ')}"


def _undecodable(shards: ShardSet, shard: int) -> Iterator[str]:
    for sample in readable_samples(shards, shard):
        if isinstance(sample, DamagedSampleError):
            if not shards.is_foreign:
                yield _told(shards, shard, sample)
            continue
        for number, data in enumerate(sample.images):
            problem = image_problem(data)
            if problem:
                yield f"{shards.where(shard)}: sample {sample.key}: image {number} {problem}"
