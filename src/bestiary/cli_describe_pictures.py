"""The pictures of `bestiary describe`: files below a folder, or those of shards; all of them, or one part of many."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path

from bestiary.description.engine import Picture as AnyPicture
from data_modules.adapters.images import read_image
from data_modules.index import SOURCE_FILE
from data_modules.records import IMAGE_EXTENSIONS, KEY_LIMIT, DamagedSampleError
from data_modules.shards import ShardSet, open_source
from data_modules.storage import names_tars

_NO_KEY = re.compile(r"^[^A-Za-z0-9_]|[^A-Za-z0-9_=+,@-]")


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` (from 0) of `total` parts of the same pictures."""

    number: int = 0
    total: int = 1

    def has_name(self, name: str) -> bool:
        """Whether a file belongs to it: by its name alone, so that others may come and go."""
        return int.from_bytes(sha256(os.fsencode(name)).digest()[:8]) % self.total == self.number

    @property
    def folder(self) -> str:
        """Of its outputs, below that of all parts."""
        return f"part-{self.number:05d}-of-{self.total:05d}" if self.total > 1 else ""


def part_of(text: str) -> Part:
    """Reads "3/16"."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part = Part(int(found[1]), int(found[2])) if found else None
    if part is None or part.number >= part.total:
        raise ValueError(f"--part {text!r} is none: write i/n with i from 0 to n-1, for example 0/16")
    return part


@dataclass(frozen=True, slots=True)
class FilePicture:
    """A picture file below a folder; its key comes from its name below the folder, which is unique there."""

    root: Path
    path: str

    @property
    def name(self) -> str:
        """The name below the folder, printable."""
        return printable(self.path)

    @property
    def key(self) -> str:
        """The base name as far as keys may have it, and a hash of the whole."""
        digest = sha256(os.fsencode(self.path)).hexdigest()[:20]
        return f"{_NO_KEY.sub('_', Path(self.path).stem)[:40]}-{digest}"

    def read(self) -> bytes:
        """The file's bytes; ValueError where it is none of what shards hold, or a link that leaves the folder."""
        if not (self.root / self.path).resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"{self.name}: is a link out of {self.root}; copy the picture into it")
        return read_image(self.root, self.path, self.name)


@dataclass(frozen=True, slots=True)
class ShardPicture:
    """A picture of a sample in shards, or the problem that stands in its place."""

    key: str
    name: str
    data: bytes | DamagedSampleError

    def read(self) -> bytes:
        """The bytes; ValueError where the sample is damaged."""
        if isinstance(self.data, DamagedSampleError):
            raise ValueError(str(self.data))
        return self.data


@dataclass
class Pictures:
    """The pictures of one part, in a fixed order; total: how many, of shards how many samples.

    passed_over: kinds of what a folder holds beside pictures, with how many of each.
    """

    source: Path | ShardSet
    part: Part
    limit: int | None = None
    total: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.source, ShardSet):
            self.total = sum(self.source.shards[shard].samples for shard in self._shards(self.source))
        else:
            self._names = sorted(filter(self.part.has_name, self._walk(self.source)), key=os.fsencode)[: self.limit]
            self.total = len(self._names)
        self.total = self.total if self.limit is None else min(self.total, self.limit)

    def __iter__(self) -> Iterator[AnyPicture]:
        if isinstance(self.source, ShardSet):
            return islice(self._in_shards(self.source), self.limit)
        root = self.source
        return (FilePicture(root, name) for name in self._names)

    def _shards(self, source: ShardSet) -> range:
        return range(self.part.number, len(source.shards), self.part.total)

    def _in_shards(self, source: ShardSet) -> Iterator[ShardPicture]:
        for shard in self._shards(source):
            first = source.first_of(shard)
            for number in range(first, first + source.shards[shard].samples):
                try:
                    sample = source[number]
                except DamagedSampleError as error:
                    yield ShardPicture(_shard_key(error.key), printable(error.key), error)
                    continue
                for place, data in enumerate(sample.images):
                    key = sample.key if len(sample.images) == 1 else f"{sample.key}@{place}"
                    yield ShardPicture(_shard_key(key), printable(key), bytes(data))

    def _walk(self, root: Path) -> Iterator[str]:
        """Names of pictures below a folder; links to folders are not followed."""
        for folder, folders, files in os.walk(root, onerror=_raise):
            linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            if linked:
                self._pass("links to folders", len(linked))
            for name in files:
                if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                    yield os.path.relpath(os.path.join(folder, name), root)
                else:
                    self._pass("files of other kinds", 1)

    def _pass(self, kind: str, number: int) -> None:
        self.passed_over[kind] = self.passed_over.get(kind, 0) + number


def open_pictures(location: str, part: Part, *, format: str, limit: int | None = None) -> Pictures:
    """The pictures below a folder, or those of shards: a folder (or URL) with source.json, or named tars.

    format: of somebody else's tars, as `data_modules.shards.open_source` has it.
    """
    path = Path(location)
    is_folder = path.is_dir() and not (path / SOURCE_FILE).exists() and not names_tars(location)
    if is_folder and format == "bestiary":
        return Pictures(path, part, limit)
    if "://" not in location and not names_tars(location) and not path.is_dir():
        raise ValueError(f"{location} is no folder; give a folder of pictures, or shards")
    return Pictures(open_source(location, format=format, domain="described"), part, limit)


def printable(name: str) -> str:
    """A file's name or a key as one line: what cannot be printed is spelled out."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shard_key(key: str) -> str:
    """A key that a sample may have: foreign tars' own may be longer or hold other characters."""
    plain = _NO_KEY.sub("_", key)
    if plain == key and len(key) <= KEY_LIMIT:
        return key
    return f"{plain[: KEY_LIMIT - 21]}-{sha256(key.encode()).hexdigest()[:20]}"


def _raise(error: OSError) -> None:
    raise error
