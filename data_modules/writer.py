"""Writing a source: samples in, shards with their index out.

Equal samples in equal order give equal bytes, on any machine at any time, however many processes wrote them. Every
file appears under its name only when it is whole (written aside, fsync, rename), and source.json comes last, so a
killed writer leaves no believable source.

One process: `ShardWriter` (or `shards.write_samples`). Several processes, in three steps:

    prepare_folder(folder, overwrite=False)                       # once: refuses a finished source, clears leftovers
    facts = write_shard(shard_path(folder, 3), samples, source=s)   # anywhere, in any order: one shard, three files
    finish_source(folder, [facts of 0, facts of 1 ...], source=s)   # once: checks that keys are unique, source.json

A shard's three files depend on its samples alone; what its domain numbers mean stands in its own facts, so nothing is
numbered over the whole source. `Shard` is plain data (`dataclasses.asdict`, JSON and back with `msgspec`): keep the
facts of finished shards in a journal, and ask `is_whole(folder, facts)` when resuming. Where single samples may be
refused, use `ShardFile` itself: `add` raises SampleError and leaves the shard as it was.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np

from bestiary.schema import Sample, SampleError
from data_modules.index import (
    FORMAT,
    IMAGES,
    LARGEST,
    RECORD,
    SIMPLE,
    SOURCE_FILE,
    TEXTS,
    Entry,
    Keys,
    Place,
    Shard,
    SourceFacts,
    index_bytes,
    index_hash,
    key_hash,
    shard_facts,
)
from data_modules.records import to_members
from data_modules.ustar import BLOCK, END, member, padded

_OWN_FILE = re.compile(r"shard-\d{5,}\.(tar|idx|keys)(\.tmp)?|source\.json(\.tmp)?")


def shard_path(folder: Path | str, number: int) -> Path:
    """The tar of a shard by its number in the source."""
    return Path(folder) / f"shard-{number:05d}.tar"


class ShardFile:
    """One shard while it is written. Leaving the context commits it, or removes it after an error.

    path: of the tar; `.idx` and `.keys` go beside it. source: what every sample must name.
    """

    def __init__(self, path: Path | str, *, source: str) -> None:
        self.path = Path(path)
        self.source = source
        self.size = 0
        """Bytes of members so far."""
        self.facts: Shard | None = None
        """What finish_source needs, once committed."""
        self._keys: set[str] = set()
        self._domains: dict[str, int] = {}
        self._entries: list[Entry] = []
        self._tar: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.commit()
        except BaseException:
            self.abandon()
            raise

    def add(self, sample: Sample) -> None:
        """Append one sample; SampleError when no reader would accept it, and then nothing was written."""
        if sample.source != self.source:
            raise SampleError(sample.key, f"source {sample.source!r} does not belong into shards of {self.source!r}")
        if sample.key in self._keys:
            raise SampleError(sample.key, f"key is in {self.source!r} already; keys name samples, make them unique")
        members = to_members(sample)
        data = b"".join([member(f"{sample.key}.{extension}", content) for extension, content in members])
        if len(data) > LARGEST:
            raise SampleError(sample.key, f"it takes {len(data)} bytes, a sample may have {LARGEST}; leave it out")
        domain = self._domains.setdefault(sample.domain, len(self._domains))
        place = _place(sample.key, members, self.size, data, domain)
        if self._tar is None:
            self._tar = _aside(self.path).open("wb")
        self._tar.write(data)
        self._entries.append(Entry(sample.key, place, sha256(data).digest()))
        self._keys.add(sample.key)
        self.size += len(data)

    def commit(self) -> Shard:
        """Make the three files appear and return their facts; ValueError without any sample."""
        if self._tar is None:
            raise ValueError(f"no sample was written into {self.path}; a shard needs at least one")
        with self._tar as tar:
            _commit(tar, END, _aside(self.path), self.path)
        index, keys = index_bytes(self._entries)
        write_atomically(self.path.with_suffix(".idx"), index)
        write_atomically(self.path.with_suffix(".keys"), keys)
        size = self.size + len(END)
        self.facts = shard_facts(self.path.name, size, list(self._domains), self._entries, index, keys)
        return self.facts

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._tar is not None:
            self._tar.close()
            _aside(self.path).unlink(missing_ok=True)


class ShardWriter:
    """Write one source into one folder, sample by sample; use it as a context manager.

    samples_per_shard: a new tar begins after so many. licence: what source.json says of the data.
    overwrite: replace a finished source; otherwise one that exists is refused. Leftovers of a killed writer are
    replaced in any case.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        source: str,
        samples_per_shard: int = 1000,
        licence: str = "",
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        self.folder = Path(folder)
        self.source = source
        self.samples_per_shard = samples_per_shard
        self.licence = licence
        self.overwrite = overwrite
        self._keys: set[str] = set()
        self._shards: list[Shard] = []
        self._shard: ShardFile | None = None

    def __enter__(self) -> ShardWriter:
        prepare_folder(self.folder, overwrite=self.overwrite)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._shard is not None:
            self._shard.abandon()

    def write(self, sample: Sample) -> None:
        """Append one sample; SampleError when no reader would accept it."""
        if sample.key in self._keys:
            raise SampleError(sample.key, f"key is in {self.source!r} already; keys name samples, make them unique")
        if self._shard is None:
            self._shard = ShardFile(shard_path(self.folder, len(self._shards)), source=self.source)
        self._shard.add(sample)
        self._keys.add(sample.key)
        if len(self._shard) == self.samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._shard is not None, "a shard is opened by its first sample"
        self._shards.append(self._shard.commit())
        self._shard = None

    def _finish(self) -> None:
        if self._shard is not None and len(self._shard):
            self._close_shard()
        finish_source(self.folder, self._shards, source=self.source, licence=self.licence, check_keys=False)


def prepare_folder(folder: Path | str, *, overwrite: bool = False, keep: Iterable[Shard] = ()) -> None:
    """Make a folder ready for shards: a finished source is refused or removed, leftovers of a killed writer removed.

    keep: whole shards of an earlier attempt that shall stay.
    """
    folder = Path(folder)
    finished = folder / SOURCE_FILE
    if finished.exists() and not overwrite:
        raise FileExistsError(f"{folder} already holds a finished source; give overwrite=True to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    finished.unlink(missing_ok=True)
    kept = {Path(shard.file).with_suffix(suffix).name for shard in keep for suffix in (".tar", ".idx", ".keys")}
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def write_shard(path: Path | str, samples: Iterable[Sample], *, source: str) -> Shard:
    """Write one shard of a source, whole or not at all; SampleError on the first sample no reader would accept."""
    with ShardFile(path, source=source) as shard:
        for sample in samples:
            shard.add(sample)
    assert shard.facts is not None, "the context committed it"
    return shard.facts


def is_whole(folder: Path | str, shard: Shard) -> bool:
    """Whether the three files of a shard are there: sizes, and the hashes of its index and keys (not of the tar)."""
    tar = Path(folder) / shard.file
    paths = [tar, tar.with_suffix(".idx"), tar.with_suffix(".keys")]
    if not all(path.is_file() and not path.is_symlink() for path in paths) or tar.stat().st_size != shard.bytes:
        return False
    hashes = paths[1].read_bytes()[shard.samples * RECORD.size :]
    return (sha256(hashes).hexdigest(), sha256(paths[2].read_bytes()).hexdigest()) == (
        shard.index_sha256,
        shard.keys_sha256,
    )


def finish_source(
    folder: Path | str,
    shards: Sequence[Shard],
    *,
    source: str,
    licence: str = "",
    made_by: Mapping[str, Any] | None = None,
    check_keys: bool = True,
) -> SourceFacts:
    """Write source.json over finished shards, in the order given; only then the folder is a source.

    made_by: plain JSON about how it was made. check_keys: refuse a key that two samples have (8 bytes a sample).
    """
    folder = Path(folder)
    if not shards:
        raise ValueError(f"no sample was written into {folder}; a source needs at least one")
    if check_keys:
        _refuse_equal_keys(folder, shards)
    facts = SourceFacts(
        format=FORMAT,
        name=source,
        licence=licence,
        domains=tuple(dict.fromkeys(domain for shard in shards for domain in shard.domains)),
        samples=sum(shard.samples for shard in shards),
        shards=tuple(shards),
        index_hash=index_hash(shards),
        made_by=dict(made_by or {}),
    )
    write_atomically(folder / SOURCE_FILE, msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")
    return facts


def write_atomically(path: Path, data: bytes, *, aside: Path | None = None) -> None:
    """Write a sibling file, flush it to the disk, rename it over `path`.

    aside: the sibling's name; give one of your own where several processes may write the same file.
    """
    aside = aside or _aside(path)
    try:
        with aside.open("wb") as file:
            _commit(file, data, aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _place(key: str, members: Sequence[tuple[str, bytes]], offset: int, data: bytes, domain: int) -> Place:
    """The record of a sample of our own: its JSON first, then its pictures."""
    text_size = len(members[0][1])
    is_simple = len(members) <= 2
    image, image_size = members[1] if len(members) == 2 else ("", b"")
    return Place(
        offset=offset,
        size=len(data),
        text_at=BLOCK,
        text_size=text_size,
        crc32=zlib.crc32(data[: BLOCK + text_size]),
        image_at=BLOCK + padded(text_size) + BLOCK if image else 0,
        image_size=len(image_size),
        members=len(members),
        domain=domain,
        image=IMAGES.index(image),
        text=TEXTS.index("json"),
        flags=SIMPLE if is_simple else 0,
        key_size=len(key),
    )


def _refuse_equal_keys(folder: Path, shards: Sequence[Shard]) -> None:
    hashes = np.empty(sum(shard.samples for shard in shards), "<u8")
    at = 0
    for shard in shards:
        for key in _keys_of(folder, shard):
            hashes[at] = key_hash(key)
            at += 1
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    found = sorted(
        (key, shard.file) for shard in shards for key in _keys_of(folder, shard) if key_hash(key) in suspects
    )
    for (key, first), (again, second) in pairwise(found):
        if key == again:
            raise ValueError(
                f"{folder}: key {key!r} is in {first} and in {second}; keys name samples, make them unique"
            )


def _keys_of(folder: Path, shard: Shard) -> Keys:
    path = (folder / shard.file).with_suffix(".keys")
    return Keys(memoryview(path.read_bytes()), shard.samples, str(path))


def _commit(file: BinaryIO, last: bytes, aside: Path, path: Path) -> None:
    file.write(last)
    file.flush()
    os.fsync(file.fileno())
    os.replace(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
