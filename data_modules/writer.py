"""Writing a source: samples in, shards with their index out.

Equal samples in equal order give equal bytes, on any machine at any time. Every file appears under its name only when
it is whole (written aside, fsync, rename), and source.json comes last, so a killed writer leaves no believable source.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from bestiary.schema import Sample, SampleError
from data_modules.index import FORMAT, SOURCE_FILE, Entry, Shard, index_bytes, index_hash
from data_modules.records import to_members
from data_modules.ustar import END, member

_OWN_FILE = re.compile(r"shard-\d{5}\.(tar|idx|keys)(\.tmp)?|source\.json(\.tmp)?")


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
        self._domains: dict[str, int] = {}
        self._shards: list[Shard] = []
        self._entries: list[Entry] = []
        self._size = 0
        self._tar: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        finished = self.folder / SOURCE_FILE
        if finished.exists() and not self.overwrite:
            raise FileExistsError(f"{self.folder} already holds a finished source; give overwrite=True to replace it")
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._tar is not None:
                self._tar.close()

    def write(self, sample: Sample) -> None:
        """Append one sample; SampleError when no reader would accept it."""
        if sample.source != self.source:
            raise SampleError(sample.key, f"source {sample.source!r} does not belong into shards of {self.source!r}")
        if sample.key in self._keys:
            raise SampleError(sample.key, f"key is in {self.source!r} already; keys name samples, make them unique")
        members = to_members(sample)
        data = b"".join(member(f"{sample.key}.{extension}", content) for extension, content in members)
        if self._tar is None:
            self._tar = _aside(self._path(".tar")).open("wb")
        self._tar.write(data)
        self._entries.append(
            Entry(
                key=sample.key,
                offset=self._size,
                size=len(data),
                json_crc32=zlib.crc32(members[0][1]),
                members=len(members),
                domain=self._domains.setdefault(sample.domain, len(self._domains)),
                sha256=sha256(data).digest(),
            )
        )
        self._keys.add(sample.key)
        self._size += len(data)
        if len(self._entries) == self.samples_per_shard:
            self._close_shard()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard-{len(self._shards):05d}{suffix}"

    def _close_shard(self) -> None:
        assert self._tar is not None, "a shard is opened by its first sample"
        path = self._path(".tar")
        with self._tar as tar:
            _commit(tar, END, _aside(path), path)
        records, keys = index_bytes(self._entries)
        write_atomically(self._path(".idx"), records)
        write_atomically(self._path(".keys"), keys)
        self._shards.append(
            Shard(
                file=path.name,
                samples=len(self._entries),
                bytes=self._size + len(END),
                index_sha256=sha256(records).hexdigest(),
                keys_sha256=sha256(keys).hexdigest(),
            )
        )
        self._tar, self._entries, self._size = None, [], 0

    def _finish(self) -> None:
        if self._entries:
            self._close_shard()
        if not self._shards:
            raise ValueError(f"no sample was written into {self.folder}; a source needs at least one")
        facts = {
            "format": FORMAT,
            "name": self.source,
            "licence": self.licence,
            "domains": list(self._domains),
            "samples": len(self._keys),
            "shards": [asdict(shard) for shard in self._shards],
            "index_hash": index_hash(self._shards),
        }
        write_atomically(self.folder / SOURCE_FILE, json.dumps(facts, indent=1).encode() + b"\n")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a sibling file, flush it to the disk, rename it over `path`."""
    aside = _aside(path)
    with aside.open("wb") as file:
        _commit(file, data, aside, path)


def _commit(file: BinaryIO, last: bytes, aside: Path, path: Path) -> None:
    file.write(last)
    file.flush()
    os.fsync(file.fileno())
    os.replace(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
