"""One batch of records becomes one shard, in whatever process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bestiary.schema import Sample, SampleError
from data_modules.adapters.protocol import Adapter, Record, RejectedRecordError, Rejection
from data_modules.index import Shard, key_hash
from data_modules.writer import ShardFile, shard_path

_UNLIKE_THE_FORMAT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What parsing a record of another shape raises."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of rejected.jsonl."""

    where: str
    kind: str
    problem: str


@dataclass(frozen=True, slots=True)
class Made:
    """What became of one batch. shard: None where every record was rejected. keys: uint64, hashes of the keys."""

    shard: Shard | None
    rejected: tuple[Rejected, ...]
    keys: np.ndarray


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Turns batches of an adapter's records into shards of one folder; picklable."""

    adapter: Adapter
    folder: Path
    source: str

    def make(self, number: int, records: Sequence[Record], refused: Collection[int] = ()) -> Made:
        """Write shard `number`. refused: hashes of keys that earlier shards have."""
        batch = _Batch(self, refused)
        shard = ShardFile(shard_path(self.folder, number), source=self.source)
        try:
            for record in records:
                batch.add(shard, record)
            facts = shard.commit() if len(shard) else None
        except BaseException:
            shard.abandon()
            raise
        return Made(facts, tuple(batch.rejected), np.array(batch.keys, np.uint64))


@dataclass(slots=True)
class _Batch:
    """The bookkeeping of one batch."""

    maker: ShardMaker
    refused: Collection[int]
    keys: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def add(self, shard: ShardFile, record: Record) -> None:
        """The samples of a record into the shard, or the reason why not."""
        try:
            for sample in self._samples(record):
                self._add_sample(shard, record, sample)
        except RejectedRecordError as error:
            self.rejected.append(Rejected(error.where, str(error.kind), _one_line(error.problem)))

    def _samples(self, record: Record) -> Iterator[Sample]:
        adapter = self.maker.adapter
        try:
            made = adapter.to_sample(record)
        except RejectedRecordError:
            raise
        except SampleError as error:
            raise RejectedRecordError(record.where, error.problem, Rejection.SAMPLE) from error
        except _UNLIKE_THE_FORMAT as error:
            problem = f"is not what format {adapter.name} promises ({type(error).__name__}: {error})"
            raise RejectedRecordError(record.where, problem) from error
        yield from [made] if isinstance(made, Sample) else made

    def _add_sample(self, shard: ShardFile, record: Record, sample: Sample) -> None:
        digest = key_hash(sample.key)  # where two keys have the same, the later sample is lost
        if digest in self.refused or digest in self._seen:
            problem = f"key {sample.key!r} is in the source already; make keys unique"
            self.rejected.append(Rejected(record.where, Rejection.DUPLICATE_KEY, problem))
            return
        try:
            shard.add(sample)
        except SampleError as error:
            problem = _one_line(f"sample {sample.key}: {error.problem}")
            self.rejected.append(Rejected(record.where, Rejection.SAMPLE, problem))
            return
        self._seen.add(digest)
        self.keys.append(digest)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
