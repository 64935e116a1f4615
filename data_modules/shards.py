"""Shards and their sources: WebDataset tars read through a memory-mapped index.

A source is one folder: `shard-00000.tar` with `.idx` and `.keys` beside it, and `source.json`, which is written last
and names every shard. A folder without it is unfinished and is refused. Random access costs a slice of a map and a
`json.loads`; nothing is opened per sample. Any WebDataset reader can read the same tars.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from bestiary.schema import Sample
from data_modules.index import FORMAT, RECORD, SOURCE_FILE, Shard, index_hash, key_at, map_file, map_records, read_keys
from data_modules.records import DamagedSampleError, Reason, from_members
from data_modules.ustar import TarError, parse_members
from data_modules.writer import ShardWriter

__all__ = ["ShardSet", "ShardWriter", "read_source", "write_samples"]


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """The maps of one shard."""

    data: memoryview
    records: memoryview


class ShardSet:
    """The samples of one source by number; keeps the maps of at most `max_open` shards (two descriptors each)."""

    def __init__(self, folder: Path | str, *, max_open: int = 64) -> None:
        self.folder = Path(folder)
        self.max_open = max_open
        facts = _read_facts(self.folder)
        self.name: str = facts["name"]
        self.licence: str = facts["licence"]
        self.domains: tuple[str, ...] = tuple(facts["domains"])
        self.shards: tuple[Shard, ...] = tuple(Shard(**shard) for shard in facts["shards"])
        self.index_hash: str = facts["index_hash"]
        if self.index_hash != index_hash(self.shards):
            raise ValueError(
                f"{self.folder / SOURCE_FILE}: index_hash does not match its shards; write the source again"
            )
        for shard in self.shards:
            for path in (self.folder / shard.file, (self.folder / shard.file).with_suffix(".idx")):
                if not path.is_file():
                    raise ValueError(f"{path} is missing, but {SOURCE_FILE} names it; write or copy the source again")
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, number: int) -> Sample:
        """The sample, pictures still encoded; DamagedSampleError where the shard does not hold it whole."""
        shard, local = self.locate(number)
        opened = self._opened(shard)
        start, size, json_crc32, num_members, _, _ = RECORD.unpack_from(opened.records, local * RECORD.size)
        if start + size > len(opened.data):
            raise self._damage(shard, local, f"needs bytes up to {start + size}, the file ends before", Reason.CUT)
        try:
            members = list(parse_members(opened.data, start, start + size))
        except TarError as error:
            raise self._damage(shard, local, error.problem, Reason.STRUCTURE) from error
        keys = {member.key for member in members}
        parts = {member.extension: opened.data[member.start : member.start + member.size] for member in members}
        if len(keys) != 1 or len(parts) != len(members) or len(parts) != num_members:
            found = sorted(f"{member.key}.{member.extension}" for member in members)
            raise self._damage(shard, local, f"holds {found}, not one sample's members", Reason.STRUCTURE)
        if zlib.crc32(parts.get("json", b"")) != json_crc32:
            raise self._damage(shard, local, "the JSON member is not what was written", Reason.RECORD)
        return from_members(keys.pop(), parts)

    def locate(self, number: int) -> tuple[int, int]:
        """Shard number and place in it of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {self.folder}, which has {len(self)}")
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard] - self.shards[shard].samples)

    def first_of(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return self._ends[shard] - self.shards[shard].samples

    def key(self, number: int) -> str:
        """The key of a sample, without reading the sample."""
        shard, local = self.locate(number)
        return key_at(self._beside(shard, ".keys"), self.shards[shard].samples, local)

    def keys(self) -> Iterator[str]:
        """Every key, in order."""
        for shard, facts in enumerate(self.shards):
            for key, _ in read_keys(self._beside(shard, ".keys"), facts.samples):
                yield key

    def verify(self) -> list[str]:
        """Compare every byte with the sha256 of when it was written; one line for each sample that differs."""
        problems = []
        for shard, facts in enumerate(self.shards):
            opened = self._opened(shard)
            for local, (key, expected) in enumerate(read_keys(self._beside(shard, ".keys"), facts.samples)):
                start, size = RECORD.unpack_from(opened.records, local * RECORD.size)[:2]
                if sha256(opened.data[start : start + size]).digest() != expected:
                    problems.append(f"{self.folder / facts.file}: sample {key} differs from what was written")
        return problems

    def _opened(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        facts = self.shards[shard]
        index = self._beside(shard, ".idx")
        records = map_records(index, facts.samples)
        if sha256(records).hexdigest() != facts.index_sha256:
            raise ValueError(f"{index} is not the index that {SOURCE_FILE} names; write the source again")
        self._open[shard] = opened = _OpenShard(map_file(self.folder / facts.file), records)
        while len(self._open) > self.max_open:
            self._open.popitem(last=False)
        return opened

    def _beside(self, shard: int, suffix: str) -> Path:
        return (self.folder / self.shards[shard].file).with_suffix(suffix)

    def _damage(self, shard: int, local: int, problem: str, reason: Reason) -> DamagedSampleError:
        number = self.first_of(shard) + local
        return DamagedSampleError(self.key(number), f"{self.folder / self.shards[shard].file}: {problem}", reason)


def read_source(folder: Path | str) -> ShardSet:
    """Open a finished source; ValueError says what is missing and what to do."""
    return ShardSet(folder)


def write_samples(
    folder: Path | str,
    samples: Iterable[Sample],
    *,
    source: str,
    samples_per_shard: int = 1000,
    licence: str = "",
    overwrite: bool = False,
) -> ShardSet:
    """Write all samples as one source and open it."""
    with ShardWriter(
        folder, source=source, samples_per_shard=samples_per_shard, licence=licence, overwrite=overwrite
    ) as writer:
        for sample in samples:
            writer.write(sample)
    return ShardSet(folder)


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / SOURCE_FILE
    if not path.is_file():
        state = "is not finished (no source.json); write it again" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"source folder {folder} {state}")
    try:
        facts = json.loads(path.read_bytes())
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}, expected {FORMAT!r}")
        for shard in facts["shards"]:
            if Path(shard["file"]).name != shard["file"] or not shard["file"].endswith(".tar"):
                raise ValueError(f"shard {shard['file']!r} is not a plain .tar file name")
            if not isinstance(shard["samples"], int) or shard["samples"] < 1:
                raise ValueError(f"shard {shard['file']!r} has {shard['samples']!r} samples")
        return {name: facts[name] for name in ("name", "licence", "domains", "shards", "index_hash")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); write the source again") from error
