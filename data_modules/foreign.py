"""Somebody else's WebDataset tars as a source: indexed at first use, then read like our own.

The index of a tar (foreign_index.py) and a summary of the selection lie in `.bestiary/<format>` beside the tars, or
below the cache root where the folder is remote or may not be written. They are made again when a tar has another size,
time or ETag. Processes that index the same tars at the same time write equal files, whole or not at all.

format     becomes
bestiary   the Sample that our own record says
caption    human: "<image>", assistant: the caption
llava      the turns of `conversations` (speakers as the llava adapter knows them), `<image>` tags left as they are

Keys are `<tar>/<key>` for caption and llava, since other people's keys may repeat from tar to tar.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from bestiary.schema import IMAGE_TAG, Sample, Turn
from data_modules.adapters.conversations import SPEAKERS
from data_modules.adapters.reading import GZIP
from data_modules.foreign_index import FORMATS, VERSION, index_tar, members_of
from data_modules.foreign_tar import Archive, MappedArchive
from data_modules.index import DAMAGED, FORMAT, Shard, SourceFacts, index_bytes, index_hash, shard_facts
from data_modules.open_shard import LOT_BYTES
from data_modules.records import DamagedSampleError, Reason, from_members, from_parts, image_kind
from data_modules.shards import ShardSet
from data_modules.storage import Folder, NotThereError, Storage, names_tars, printable, split_pattern
from data_modules.writer import write_atomically

log = logging.getLogger(__name__)

INDEX_FOLDER = ".bestiary"
"""Beside the tars: hidden, so that nobody takes an index for data."""

T = TypeVar("T")
_THREADS = 8
_OWN_TAR = re.compile(r"shard-\d{5,}\.tar")


def open_foreign(
    location: str, *, storage: Storage, format: str, name: str | None, domain: str | None, lot: int = 0
) -> ShardSet:
    """The tars of a local folder, or of a pattern of names, as one source; ValueError of one line says what to do."""
    if format not in FORMATS:
        raise ValueError(f"{location}: format={format!r} is unknown; choose from {', '.join(FORMATS)}")
    if format != "bestiary" and not domain:
        raise ValueError(f"{location}: samples of format={format} name no domain; give one: domain, --domain")
    folder, files = _tars(location, storage, format)
    index = _index_folder(folder, storage, format)
    known = _Known(folder, storage.folder(str(index)), index, format)
    found = known.shards(files)
    shards = [each.shard for each in found]
    domains = (domain,) if domain and format != "bestiary" else ()
    facts = SourceFacts(
        format=FORMAT,
        name=name or Path(folder.location.partition("?")[0]).name,
        licence="",
        domains=domains or tuple(dict.fromkeys(each for shard in shards for each in shard.domains)),
        samples=sum(shard.samples for shard in shards),
        shards=tuple(shards),
        index_hash=index_hash(shards),
    )
    meaning = ForeignMeaning(
        format, facts.name, domain or "", {each.shard.file: each.version for each in found}, str(index)
    )
    return ShardSet(folder, facts=facts, index_folder=known.index, meaning=meaning, lot=lot)


@dataclass(frozen=True, slots=True)
class ForeignMeaning:
    """What the members of foreign tars mean; versions: tar -> what it was when it was indexed."""

    format: str
    source: str
    domain: str
    versions: dict[str, str]
    index: str

    def sample(self, key: str, kind: str, text: memoryview, extension: str, image: memoryview | None) -> Sample:
        """The Sample of a text and at most one image."""
        if self.format == "bestiary":
            return from_parts(key, text, extension, image)
        if image is not None and image_kind(image) is None:
            problem = f"member .{extension} starts with {bytes(image[:12])!r}, no JPEG, PNG or WebP"
            raise DamagedSampleError(key, problem, Reason.STRUCTURE)
        try:
            turns = _caption(kind, text) if self.format == "caption" else _conversation(text, image is not None)
        except (ValueError, RecursionError) as error:
            problem = f"member .{kind} is no {self.format}: {type(error).__name__}: {error}"
            raise DamagedSampleError(key, problem, Reason.RECORD) from error
        return Sample(key, self.source, self.domain, turns, () if image is None else (image,))

    def parsed(self, key: str, whole: memoryview) -> Sample:
        """One of our own records with several images."""
        return from_members(key, members_of(whole))

    def check(self, folder: Folder, shard: Shard) -> None:
        """ValueError where a tar was written again since its index was made."""
        if folder.version(shard.file) != self.versions[shard.file]:
            raise ValueError(
                f"{folder.location.rstrip('/')}/{shard.file} changed after it was indexed; start again to index it "
                f"anew (if that does not help, remove {self.index})"
            )


class _Caption(msgspec.Struct):
    caption: str


class _Message(msgspec.Struct):
    role: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Message]


_decode_caption = msgspec.json.Decoder(_Caption).decode
_decode_conversation = msgspec.json.Decoder(_Conversation).decode


def _caption(kind: str, text: memoryview) -> tuple[Turn, ...]:
    caption = str(text, "utf-8") if kind == "txt" else _decode_caption(text).caption
    caption = caption.strip()
    if not caption:
        raise ValueError("the caption is empty")
    return Turn("human", IMAGE_TAG), Turn("assistant", caption)


def _conversation(text: memoryview, has_image: bool) -> tuple[Turn, ...]:
    messages = _decode_conversation(text).conversations
    if not messages:
        raise ValueError("the conversation is empty")
    num_tags = sum(message.value.count(IMAGE_TAG) for message in messages)
    if num_tags > has_image:
        raise ValueError(f"{num_tags} {IMAGE_TAG} tags, but {'one image' if has_image else 'no image'}")
    for message in messages:
        if message.role.lower() not in SPEAKERS:
            raise ValueError(f"from {message.role[:80]!r} is none of {', '.join(SPEAKERS)}")
    return tuple([Turn(SPEAKERS[message.role.lower()], message.value) for message in messages])


@dataclass(frozen=True, slots=True)
class _Found:
    """The facts of one indexed tar: `source.json` of a single shard, and what the tar was then."""

    format: str
    version: str
    shard: Shard


class _Summary(msgspec.Struct):
    """All tars of a selection, in its order."""

    format: str
    tars: list[_Found]


class _Known:
    """The indexes that were made of one folder's tars."""

    def __init__(self, folder: Folder, index: Folder, path: Path, format: str) -> None:
        self.folder = folder
        self.index = index
        self._path = path
        self._format = format
        self._stamp = f"{FORMAT} {format} {VERSION}"

    def shards(self, files: Sequence[str]) -> list[_Found]:
        """Facts of the tars in this order; those without an index that fits are indexed now."""
        name = f"summary-{hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:16]}.json"
        known = self._read(name, _Summary)
        if known is not None and self._fits(known, files):
            return _with_samples(known.tars, self.folder)
        missing = [file for file in files if self._of(file) is None]
        if missing:
            log.info("indexing %d of %d tars of %s into %s", len(missing), len(files), self.folder.location, self._path)
        with ThreadPoolExecutor(max(1, min(_THREADS, os.cpu_count() or 1, len(missing)))) as pool:
            list(pool.map(self._index, missing))
        found = [each for file in files if (each := self._of(file)) is not None]
        if len(found) != len(files):
            raise ValueError(f"{self.folder.location} is changing while it is indexed; wait until its tars are whole")
        self._write(name, msgspec.json.encode(_Summary(self._stamp, found)))
        return _with_samples(found, self.folder)

    def _fits(self, known: _Summary, files: Sequence[str]) -> bool:
        """Whether a summary is of these tars as they are now."""
        if known.format != self._stamp or [each.shard.file for each in known.tars] != list(files):
            return False
        if not self.folder.is_local:
            return True  # asked when a tar is opened: asking for all of them takes a request each
        return all(self.folder.version(each.shard.file) == each.version for each in known.tars)

    def _of(self, file: str) -> _Found | None:
        """The facts of a tar whose index is there and fits."""
        stem = file.removesuffix(".tar")
        found = self._read(f"{stem}.json", _Found)
        if found is None or found.format != self._stamp or found.version != self.folder.version(file):
            return None
        if not all(self.index.exists(f"{stem}{suffix}") for suffix in (".idx", ".keys")):
            return None
        return found

    def _index(self, file: str) -> None:
        """Index one tar; its three files appear whole, the facts last."""
        stem = file.removesuffix(".tar")
        version, size = self.folder.version(file), self.folder.size(file)
        archive: Archive = (
            MappedArchive(self.folder.map(file)) if self.folder.is_local else _RemoteArchive(self.folder, file, size)
        )
        if bytes(archive.read(0, len(GZIP))) == GZIP:
            where = f"{self.folder.location.rstrip('/')}/{file}"
            raise ValueError(f"{where} is compressed (gzip); unpack it: samples are read at their places in the tar")
        entries, domains = index_tar(archive, stem, self._format)
        index, keys = index_bytes(entries)
        shard = shard_facts(file, size, domains, entries, index, keys)
        self._write(f"{stem}.idx", index)
        self._write(f"{stem}.keys", keys)
        self._write(f"{stem}.json", msgspec.json.encode(_Found(self._stamp, version, shard)))
        damaged = [entry for entry in entries if entry.place.flags & DAMAGED]
        if damaged:
            key, _, problem = damaged[0].name.partition("\0")
            hint = f"; is format={self._format} right?" if len(damaged) == len(entries) else ""
            log.warning(
                "%s/%s: %d of %d samples are damaged, first %s: %s%s",
                self.folder.location.rstrip("/"), file, len(damaged), len(entries), key, problem, hint,
            )  # fmt: skip

    def _read(self, name: str, kind: type[T]) -> T | None:
        """A file of facts, None where it is absent or not what this version writes."""
        if not self.index.exists(name):
            return None
        try:
            return msgspec.json.decode(self.index.read(name), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, NotThereError) as error:
            log.warning("%s: %s is made again: %s", self._path, name, error)
            return None

    def _write(self, name: str, data: bytes) -> None:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, aside=path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp"))


class _RemoteArchive:
    """A tar behind a URL, read forwards in the windows that reading samples will ask for again."""

    def __init__(self, folder: Folder, file: str, size: int) -> None:
        self._folder, self._file = folder, file
        self.size = size
        self._number = -1
        self._window = memoryview(b"")

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes from start up to stop, fewer where the archive ends before."""
        stop = min(stop, self.size)
        first, last = start // LOT_BYTES, max(start, stop - 1) // LOT_BYTES
        pieces = []
        for number in range(first, last + 1):
            window, begin = self._of(number), number * LOT_BYTES
            pieces.append(window[max(start - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _of(self, number: int) -> memoryview:
        if number != self._number:
            self._window = self._folder.span(self._file, number * LOT_BYTES, (number + 1) * LOT_BYTES)
            self._number = number
        return self._window


def _with_samples(found: Sequence[_Found], folder: Folder) -> list[_Found]:
    kept = [each for each in found if each.shard.samples]
    if not kept:
        raise ValueError(f"{folder.location}: not one sample in {len(found)} tars; are they WebDataset tars?")
    return kept


def _tars(location: str, storage: Storage, format: str) -> tuple[Folder, list[str]]:
    """The folder and the names of its tars, in order."""
    if not names_tars(location):
        folder = storage.folder(location)
        files = [name for name in folder.list() if name.endswith(".tar") and not name.startswith(".")]
        links = [path for path in Path(folder.location).glob("*.tar") if path.is_symlink()]
        if links:
            raise ValueError(f"{links[0]} is a link; copy the tar into the folder")
        if not files:
            told = "is not finished (no source.json) and holds no tar; write it again, or name the folder of the tars"
            raise FileNotFoundError(f"source folder {folder.location} {told}")
        if format == "bestiary" and all(_OWN_TAR.fullmatch(name) for name in files):
            raise FileNotFoundError(f"source folder {folder.location} is not finished (no source.json); write it again")
        return folder, files
    prefix, files = split_pattern(location)
    for file in files:
        if not file.endswith(".tar"):
            raise ValueError(f"{printable(location)}: {file!r} is no .tar; unpack compressed tars first")
    folder = storage.folder(prefix)
    if folder.is_local:
        for file in files:
            if not folder.exists(file):
                raise FileNotFoundError(f"{folder.location.rstrip('/')}/{file} does not exist or is no regular file")
    return folder, files


def _index_folder(folder: Folder, storage: Storage, format: str) -> Path:
    """Where the indexes of a folder's tars go: beside them if possible."""
    if folder.is_local:
        beside = Path(folder.location) / INDEX_FOLDER / format
        try:
            beside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.info("%s cannot be made (%s); its indexes go into the cache", beside, error)
        else:
            if os.access(beside, os.W_OK):
                return beside
        location = str(Path(folder.location).resolve())
    else:
        location = folder.location
    name = hashlib.sha256(location.encode()).hexdigest()[:32]
    path = storage.cache_root / "indexes" / name / format
    path.mkdir(parents=True, exist_ok=True)
    return path
