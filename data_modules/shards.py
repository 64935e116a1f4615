"""Shards and their sources: WebDataset tars read through a memory-mapped index.

A source is one folder: `shard-00000.tar` with `.idx` and `.keys` beside it, and `source.json`, which is written last
and names every shard. A folder without it is unfinished and is refused, unless it holds somebody else's tars: those are
indexed at first use (foreign.py). Reading a sample costs a slice of a map, a checksum and the decoding of its JSON;
nothing is opened per sample and no tar header is parsed for the common sample of one text and one image. Any
WebDataset reader can read the same tars.

A shard that ends before its index says so gives counted damage. A file that is cut WHILE it is mapped is another
matter: the kernel then ends the process with SIGBUS. Replace shards by renaming whole files, as the writer does.
"""

from __future__ import annotations

import errno
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from bestiary.schema import Sample
from data_modules.index import (
    BLOCK,
    DAMAGED,
    FOREIGN,
    IMAGES,
    RECORD_SIZE,
    SIMPLE,
    SOURCE_FILE,
    TEXTS,
    WHERE,
    Place,
    Shard,
    SourceFacts,
    parse_facts,
    part_of,
)
from data_modules.open_shard import OpenShard, open_limit
from data_modules.records import DamagedSampleError, Reason, from_members, from_parts, with_images
from data_modules.storage import Folder, NotThereError, Storage, StorageError, names_tars, split_pattern
from data_modules.ustar import TarError, parse_members
from data_modules.writer import ShardWriter

__all__ = ["ShardSet", "ShardWriter", "open_source", "read_source", "write_samples"]


class Meaning(Protocol):
    """What the members of a foreign tar mean. Both raise DamagedSampleError; it must be possible to pickle it."""

    def sample(self, key: str, kind: str, text: memoryview, extension: str, image: memoryview | None) -> Sample:
        """The Sample of a text (`kind`: json or txt) and at most one image."""

    def parsed(self, key: str, whole: memoryview) -> Sample:
        """The Sample of any other shape, from its stretch of the tar."""

    def check(self, folder: Folder, shard: Shard) -> None:
        """ValueError where the tar is not the one that was indexed; called when it is opened."""


class ShardSet:
    """The samples of one source by number.

    folder: where the tars lie. max_open: shards that stay open; None is plenty for local ones, whose maps need no
    descriptors, and asks the limits of the process for remote ones. lot: consecutive samples that are fetched together
    from a remote store; 0 = stretches of 4 MiB.
    facts, index_folder, meaning: of foreign tars only; see foreign.py.

    It can be pickled (what is open stays behind) and read from several threads.
    """

    def __init__(
        self,
        folder: Folder | Path | str,
        *,
        max_open: int | None = None,
        lot: int = 0,
        facts: SourceFacts | None = None,
        index_folder: Folder | None = None,
        meaning: Meaning | None = None,
    ) -> None:
        self.storage: Folder = Storage().folder(folder) if isinstance(folder, (Path, str)) else folder
        self.location = self.storage.location
        """The folder's path or URL, for messages."""
        self.max_open = max_open or open_limit(self.storage.is_local)
        self.lot = lot
        facts = facts or _read_facts(self.storage)
        self.name = facts.name
        self.licence = facts.licence
        self.domains = facts.domains
        self._known = frozenset(facts.domains)
        self.shards = facts.shards
        self.index_hash = facts.index_hash
        self.made_by = facts.made_by
        self._index_folder: Folder = index_folder or self.storage
        self._meaning = meaning
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self._len = self._ends[-1] if self._ends else 0
        self._reset()

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else wrote the tars: their hashes are from when they were first read."""
        return self._meaning is not None

    @property
    def folder(self) -> Path:
        """The local folder; ValueError for a remote one."""
        if not self.storage.is_local:
            raise ValueError(f"{self.location} is no local folder; copy the source here first")
        return Path(self.location)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __getitem__(self, number: int) -> Sample:
        """The sample, its pictures still encoded and copied out of the map: safe to keep and to pickle.

        DamagedSampleError where the shard does not hold it whole.
        """
        return with_images(sample := self.view(number), tuple([bytes(image) for image in sample.images]))

    def view(self, number: int) -> Sample:
        """The sample, its pictures slices of the map: nothing but their first bytes is read before it is used."""
        shard = bisect_right(self._ends, number)
        if not 0 <= number < self._len:
            raise IndexError(f"sample {number} of {self.location}, which has {len(self)}")
        opened = self._open.get(shard) or self._open_shard(shard)
        local = number - opened.first
        records = opened.records
        if not records.checked[local // BLOCK] and not records.check(local // BLOCK):
            raise self._damage(opened, local, "the index of its stretch is not what was written", Reason.STRUCTURE)
        offset, size, text_at, text_size, crc32, image_at, image_size, image, flags, key_size = _unpack(
            records.data, local * RECORD_SIZE
        )
        data, start = opened.data, offset
        if data is None:
            data, start = opened.fetch(local), 0
        if start + size > len(data):
            raise self._damage(opened, local, f"needs bytes up to {offset + size}, the file ends before", Reason.CUT)
        head = bytes(data[start : start + text_at + text_size])
        if flags != SIMPLE or zlib.crc32(head) != crc32:
            return self._other(opened, local, data[start : start + size])
        key = head[:key_size].decode("ascii", "replace")
        try:
            if not image:
                return self._sound(from_parts(key, head[text_at:], "", None))
            start += image_at
            return self._sound(from_parts(key, head[text_at:], IMAGES[image], data[start : start + image_size]))
        except DamagedSampleError as error:
            raise self._damage(opened, local, error.problem, error.reason) from error

    def locate(self, number: int) -> tuple[int, int]:
        """Shard number and place in it of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {self.location}, which has {len(self)}")
        shard = bisect_right(self._ends, number)
        return shard, number - self.first_of(shard)

    def first_of(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return self._ends[shard] - self.shards[shard].samples

    def where(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        return f"{self.location.rstrip('/')}/{self.shards[shard].file}"

    def key(self, number: int) -> str:
        """The key of a sample, without reading the sample."""
        shard, local = self.locate(number)
        return (self._open.get(shard) or self._open_shard(shard)).keys.key(local)

    def keys(self) -> Iterator[str]:
        """Every key, in order."""
        for shard in range(len(self.shards)):
            yield from self._opened(shard).keys

    def places(self, only: int | None = None) -> Iterator[tuple[Shard, Place]]:
        """Every record of the index (of one shard, with `only`) with its shard, in order; no tar is read."""
        for shard, facts in enumerate(self.shards):
            if only not in (None, shard):
                continue
            records = self._opened(shard).records
            for local in range(facts.samples):
                yield facts, records.place(local)

    def verify(self) -> list[str]:
        """Compare every byte with the sha256 of when it was written or indexed; one line for each that differs."""
        return [line for shard in range(len(self.shards)) for line in self.verify_shard(shard)]

    def verify_shard(self, shard: int) -> list[str]:
        """The same for one shard: its index, its keys, its samples, in order."""
        opened, facts = self._opened(shard), self.shards[shard]
        problems = []
        if opened.keys.sha256() != facts.keys_sha256:
            problems.append(f"{self.where(shard)}: its keys file differs from what was written")
        for local in range(facts.samples):
            if not local % BLOCK:
                opened.records.check(local // BLOCK)
            if not opened.records.checked[local // BLOCK]:
                problems.append(f"{self.where(shard)}: sample {opened.keys.key(local)} has another index record")
                continue
            place = opened.records.place(local)
            if place.flags & DAMAGED:
                key, _, problem = opened.keys.name(local).partition("\0")
                problems.append(f"{self.where(shard)}: sample {key}: {problem}")
            elif sha256(opened.slice(local)).digest() != opened.keys.digest(local):
                problems.append(f"{self.where(shard)}: sample {opened.keys.key(local)} differs from what was written")
        return problems

    def _other(self, opened: OpenShard, local: int, whole: memoryview) -> Sample:
        """Any sample but the common one: of several images, of a foreign tar, or with something wrong."""
        place = opened.records.place(local)
        try:
            return self._sound((self._foreign if place.flags & FOREIGN else _parsed)(opened, local, place, whole))
        except DamagedSampleError as error:
            raise self._damage(opened, local, error.problem, error.reason) from error

    def _sound(self, sample: Sample) -> Sample:
        if sample.domain in self._known:
            return sample
        problem = f"its domain {sample.domain!r:.60} is none that the source names"
        raise DamagedSampleError(sample.key, problem, Reason.RECORD)

    def _foreign(self, opened: OpenShard, local: int, place: Place, whole: memoryview) -> Sample:
        """A sample of a foreign tar, or the damage that was found there."""
        key, _, problem = opened.keys.name(local).partition("\0")
        if place.flags & DAMAGED:
            raise DamagedSampleError(key, problem, Reason(place.members))
        text = whole[place.text_at : place.text_at + place.text_size]
        if zlib.crc32(text) != place.crc32:
            raise DamagedSampleError(key, "the text is not what was indexed", Reason.RECORD)
        assert self._meaning is not None, "only foreign.py makes such records, and it says what they mean"
        if not place.flags & SIMPLE:
            return self._meaning.parsed(key, whole)
        image = whole[place.image_at : place.image_at + place.image_size] if place.image else None
        return self._meaning.sample(key, TEXTS[place.text], text, IMAGES[place.image], image)

    def _opened(self, shard: int) -> OpenShard:
        return self._open.get(shard) or self._open_shard(shard)

    def _open_shard(self, shard: int) -> OpenShard:
        """Map a shard; the one that was opened first is let go (draws are random: no better rule exists)."""
        facts = self.shards[shard]
        try:
            if self._meaning is not None:
                self._meaning.check(self.storage, facts)
            opened = self._new(shard, facts)
        except ValueError as error:  # no damage that is counted: the files are not those of this source
            raise error if isinstance(error, StorageError) else StorageError(str(error)) from error
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) or not self._open:
                raise
            self._open.clear()  # too many files or maps in the process: let ours go and try once more
            opened = self._new(shard, facts)
        # No lock: a second thread that opens the same shard costs a map, a lock held at a fork would never be free.
        self._open[shard] = opened
        if len(self._open) > self.max_open:
            for oldest in list(self._open)[: -self.max_open]:
                self._open.pop(oldest, None)  # another thread may have been faster
        return opened

    def _new(self, shard: int, facts: Shard) -> OpenShard:
        first = self.first_of(shard)
        return OpenShard(self.storage, self._index_folder, facts, number=shard, first=first, lot=self.lot)

    def _damage(self, opened: OpenShard, local: int, problem: str, reason: Reason) -> DamagedSampleError:
        where = self.where(opened.number)
        try:
            key = opened.keys.key(local)
        except StorageError:
            raise  # an outage is no damage
        except ValueError as error:
            key, problem = f"number {opened.first + local}", f"{problem} ({error})"
        return DamagedSampleError(key, f"{where}: {problem}", reason)

    def _reset(self) -> None:
        self._open: dict[int, OpenShard] = {}


def read_source(folder: Path | str) -> ShardSet:
    """Open a finished source of our own; ValueError says what is missing and what to do."""
    return ShardSet(folder)


def open_source(
    path: str | Path,
    *,
    storage: Storage | None = None,
    format: str = "bestiary",
    name: str | None = None,
    domain: str | None = None,
    lot: int = 0,
) -> ShardSet:
    """Open a source, wherever it lies and whoever wrote it.

    path: a folder or URL with source.json (written by us), or some of the tars of such a folder, by name or pattern; or
        somebody's WebDataset tars: a local folder of them, one tar, or a pattern as
        `https://host/set/part-{00000..00099}.tar` (a URL has no listing, so it needs the pattern).
    format: what the members of somebody's tars mean: bestiary (our own records), caption, llava; see foreign.py.
    name, domain: `source` and `domain` of samples that do not say so themselves.
    lot: samples that are drawn together; 1 also where the cache holds the source, which is then fetched in stretches.
    """
    storage = storage or Storage()
    shards = _open(str(path), storage, format=format, name=name, domain=domain, lot=lot)
    if lot == 1 and sum(shard.bytes for shard in shards.shards) <= storage.cache_bytes // 2:
        shards.lot = 0
    return shards


def _open(text: str, storage: Storage, *, format: str, name: str | None, domain: str | None, lot: int) -> ShardSet:
    place, files = split_pattern(text) if names_tars(text) else (text, None)
    folder = storage.folder(place)
    # Of a URL's tars it is not asked: stores that do not list answer "forbidden" for what is not there.
    if (files is None or folder.is_local) and folder.exists(SOURCE_FILE):
        if format != "bestiary":
            raise ValueError(f"{folder.location} was written by us: leave out format={format!r}")
        return ShardSet(folder, facts=None if files is None else part_of(_read_facts(folder), files, place), lot=lot)
    if files is None:
        if not folder.is_local:
            raise FileNotFoundError(
                f"{folder.location} holds no source.json; for tars of others name them: "
                f"{folder.location.rstrip('/')}/name-{{00000..00099}}.tar"
            )
        if not Path(folder.location).is_dir():
            raise FileNotFoundError(f"source folder {folder.location} does not exist")
    from data_modules.foreign import open_foreign  # it stands on this module

    return open_foreign(text, storage=storage, format=format, name=name, domain=domain, lot=lot)


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


def _parsed(opened: OpenShard, local: int, place: Place, whole: memoryview) -> Sample:
    """A sample of our own whose headers must be read."""
    key = str(local)  # of messages only: the caller knows the name
    try:
        members = list(parse_members(whole, 0, len(whole)))
    except TarError as error:
        raise DamagedSampleError(key, error.problem, Reason.STRUCTURE) from error
    keys = {member.key for member in members}
    parts = {member.extension: whole[member.start : member.start + member.size] for member in members}
    if len(keys) != 1 or len(parts) != len(members) or len(parts) != place.members:
        found = sorted(f"{member.key}.{member.extension}" for member in members)
        raise DamagedSampleError(key, f"holds {found}, not one sample's members", Reason.STRUCTURE)
    if zlib.crc32(whole[: place.text_at + place.text_size]) != place.crc32:
        raise DamagedSampleError(key, "the JSON member is not what was written", Reason.RECORD)
    return from_members(keys.pop(), parts)


def _read_facts(folder: Folder) -> SourceFacts:
    """source.json, and that the folder holds what it names (without asking for every file)."""
    try:
        facts = parse_facts(folder.read(SOURCE_FILE), f"{folder.location.rstrip('/')}/{SOURCE_FILE}")
    except NotThereError as error:
        is_there = not folder.is_local or Path(folder.location).is_dir()
        state = "is not finished (no source.json); write it again" if is_there else "does not exist"
        raise FileNotFoundError(f"source folder {folder.location} {state}") from error
    if folder.is_local:
        present = set(folder.list())
        for shard in facts.shards:
            for name in (shard.file, f"{shard.file.removesuffix('.tar')}.idx"):
                if name not in present:
                    raise ValueError(
                        f"{Path(folder.location) / name} is missing or not a regular file, but {SOURCE_FILE} names it; "
                        "write or copy the source again"
                    )
    return facts


_unpack = WHERE.unpack_from
