"""What is in a source: counts, lengths, pictures, turns, marks and domains, gathered shard by shard."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bestiary.schema import Lengths, Sample, SampleError, SampleTooLongError
from data_modules.adapters.images import image_size
from data_modules.adapters.protocol import RejectedRecordError
from data_modules.index import Shard
from data_modules.inspection.check import readable_samples
from data_modules.inspection.parallel import over_shards
from data_modules.records import DamagedSampleError
from data_modules.shards import ShardSet

PERCENTILES = (5, 25, 50, 75, 95)


class Measure(Protocol):
    """What a sample takes in a row; picklable. A processor's `lengths`, or a count of text tokens."""

    def __call__(self, sample: Sample) -> Lengths:
        """Tokens, views and targets; SampleError where the sample cannot be used."""


@dataclass(slots=True)
class Tally:
    """What was counted, of a shard or of a source; `columns` hold one number a sample, picture or answer.

    Columns: turns, characters, answer_characters, images, marks, tokens, views, targets (one a sample); width, height,
    image_bytes (one a picture). tokens has what too long samples would need, too. refused: samples that the processor
    does not take. first_refusal: key and reason.
    """

    samples: int = 0
    bytes: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    first_refusal: str = ""
    domains: Counter[str] = field(default_factory=Counter)
    regions: Counter[str] = field(default_factory=Counter)
    columns: dict[str, array[int]] = field(default_factory=dict)

    def note(self, **values: int) -> None:
        """Append to columns."""
        for name, value in values.items():
            self.columns.setdefault(name, array("q")).append(value)

    def refuse(self, key: str, problem: str) -> None:
        """The processor does not take a sample."""
        self.refused += 1
        self.first_refusal = self.first_refusal or f"{key}: {' '.join(problem.split())}"

    def include(self, other: Tally) -> None:
        """Add what another tally counted."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.refused += other.refused
        self.first_refusal = self.first_refusal or other.first_refusal
        for mine, theirs in (
            (self.damaged, other.damaged),
            (self.domains, other.domains),
            (self.regions, other.regions),
        ):
            mine.update(theirs)
        for name, values in other.columns.items():
            self.columns.setdefault(name, array("q")).extend(values)

    def summary(self) -> dict[str, Any]:
        """Plain JSON: counts, and the spread of every column."""
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "damaged": dict(sorted(self.damaged.items())),
            "refused": self.refused,
            "first_refusal": self.first_refusal,
            "domains": dict(self.domains.most_common()),
            "regions": dict(self.regions.most_common()),
            **{name: spread(values) for name, values in self.columns.items()},
        }


def spread(values: Sequence[int] | array[int]) -> dict[str, float]:
    """Sum, mean, extremes and percentiles; empty without values."""
    if not len(values):
        return {}
    numbers = np.asarray(values, np.int64)
    found = {"sum": int(numbers.sum()), "mean": round(float(numbers.mean()), 3), "min": int(numbers.min())}
    found |= {
        f"p{p}": round(float(value), 3)
        for p, value in zip(PERCENTILES, np.percentile(numbers, PERCENTILES), strict=True)
    }
    return {**found, "max": int(numbers.max())}


def gather(
    shards: ShardSet,
    *,
    measure: Measure | None = None,
    workers: int = 1,
    watch: Callable[[Shard], None] | None = None,
) -> Tally:
    """The tally of a source. measure: count rows' positions, too. watch: called after every shard."""
    total = Tally()
    for facts, tally in zip(shards.shards, over_shards(tally_shard, shards, workers, measure), strict=True):
        total.include(tally)
        if watch is not None:
            watch(facts)
    return total


def tally_shard(shards: ShardSet, shard: int, measure: Measure | None = None) -> Tally:
    """The tally of one shard; of pictures only the header is read."""
    tally = Tally(bytes=shards.shards[shard].bytes)
    for sample in readable_samples(shards, shard):
        if isinstance(sample, DamagedSampleError):
            tally.damaged[sample.reason.name.lower()] += 1
        else:
            _count(tally, sample, measure)
    return tally


def _count(tally: Tally, sample: Sample, measure: Measure | None) -> None:
    tally.samples += 1
    tally.domains[sample.domain] += 1
    tally.regions.update(region.kind for region in sample.regions)
    tally.note(
        turns=len(sample.turns),
        characters=sum(len(turn.text) for turn in sample.turns),
        answer_characters=sum(len(turn.text) for turn in sample.turns if turn.role == "assistant"),
        images=len(sample.images),
        marks=len({region.mark for region in sample.regions}),
    )
    for data in sample.images:
        _count_image(tally, data)
    if measure is not None:
        try:
            lengths = measure(sample)
        except SampleTooLongError as error:  # how long it would have to be is what is asked here
            tally.note(tokens=error.num_tokens)
            tally.refuse(sample.key, error.problem)
            return
        except ValueError as error:  # a SampleError, too
            problem = error.problem if isinstance(error, SampleError) else str(error)
            tally.refuse(sample.key, problem)
            return
        tally.note(tokens=lengths.tokens, views=lengths.views, targets=lengths.targets)


def _count_image(tally: Tally, data: bytes | memoryview) -> None:
    try:
        width, height = image_size(bytes(data), "")
    except RejectedRecordError:
        tally.damaged["image"] += 1
        return
    tally.note(width=width, height=height, image_bytes=len(data))


def table(tallies: Mapping[str, Tally]) -> list[list[str]]:
    """Header and one row a source (and their sum), for the terminal."""
    header = ["source", "samples", "damaged", "MB", "domains", "characters", "tokens", "pictures", "size", "marks"]
    rows = [_row(name, tally) for name, tally in tallies.items()]
    if len(rows) > 1:
        rows.append(_row("all", merged(tallies.values())))
    return [header, *rows]


def refusals(tallies: Mapping[str, Tally]) -> list[str]:
    """One line for every source of which the processor refuses samples."""
    return [
        f"{name}: {tally.refused:,} of {tally.samples:,} refused by the processor, first {tally.first_refusal}"
        for name, tally in tallies.items()
        if tally.refused
    ]


def merged(tallies: Iterable[Tally]) -> Tally:
    """One tally of several."""
    total = Tally()
    for tally in tallies:
        total.include(tally)
    return total


def _row(name: str, tally: Tally) -> list[str]:
    def middle(column: str) -> str:
        values = tally.columns.get(column)
        return f"{float(np.median(values)):,.0f}" if values else "-"

    domains = ", ".join(f"{domain} {count:,}" for domain, count in tally.domains.most_common(3))
    more = len(tally.domains) - 3
    return [
        name,
        f"{tally.samples:,}",
        f"{tally.damaged.total():,}",
        f"{tally.bytes / 1e6:,.1f}",
        domains + (f", {more} more" if more > 0 else ""),
        middle("characters"),
        middle("tokens"),
        f"{len(tally.columns.get('width', ())):,}",
        f"{middle('width')} x {middle('height')}" if "width" in tally.columns else "-",
        f"{tally.regions.total():,}",
    ]
