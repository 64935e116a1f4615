"""Walking through somebody else's tar: every header checked, nothing followed, nothing unpacked.

Understood are USTAR, PAX and GNU archives as `tar`, Python's tarfile and webdataset write them. Of PAX and long-name
records only `path` and `size` are applied, with limits. Directories and names that make no sample (no extension,
hidden, `__meta__`) are passed over, as webdataset does. Everything else is a Stretch with a problem: links, devices,
sparse files, names that leave the folder, broken headers. After a broken header the walk goes on at the next block
that is a header with a valid checksum; zero blocks between joined archives are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_modules.records import Reason
from data_modules.ustar import BLOCK, TarError, octal, padded

EXTRA_LIMIT = 1 << 16
"""Bytes of a PAX or long-name record."""
NAME_LIMIT = 400
"""Bytes of a name."""

_ZEROS = bytes(BLOCK)
_WINDOW = 1 << 20
_PLAIN = (b"0", b"\0", b"7")
_WITHOUT_DATA = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")
"""WebDataset's rule: the key is everything up to the first dot of the last part of the path."""
_META = re.compile(r"(?:.*/|)__[^/]*__")


class Archive(Protocol):
    """The bytes of a tar, read mostly forwards."""

    @property
    def size(self) -> int:
        """Bytes of the archive."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes from start up to stop, fewer where the archive ends before."""


@dataclass(frozen=True, slots=True)
class MappedArchive:
    """An archive, or a stretch of one, that lies in memory or is mapped."""

    data: memoryview

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return len(self.data)

    def read(self, start: int, stop: int) -> memoryview:
        """A slice."""
        return self.data[start:stop]


@dataclass(frozen=True, slots=True)
class Stretch:
    """One file of the archive, or a part of it that is none.

    start, stop: all of it, with its headers and padding. key, extension: of its name; both empty where it has none.
    data_at, size: contents. problem: empty, or one line; then reason says how it is counted.
    """

    start: int
    stop: int
    key: str = ""
    extension: str = ""
    data_at: int = 0
    size: int = 0
    problem: str = ""
    reason: Reason = Reason.STRUCTURE


@dataclass(slots=True)
class _Extra:
    """What PAX and long-name records say of the file that follows."""

    start: int
    name: bytes | None = None
    size: int | None = None
    problem: str = ""


class Walk:
    """The files of an archive in order; iterate once. `is_ended`: whether an end mark was seen after the last file."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._at = 0
        self.is_ended = False

    def __iter__(self) -> Iterator[Stretch]:
        extra: _Extra | None = None
        while self._at < self._archive.size:
            start = self._at
            head = bytes(self._archive.read(start, start + BLOCK))
            if not any(head) if len(head) < BLOCK else head == _ZEROS:
                self.is_ended = True
                self._at = self._after_zeros(start + BLOCK)
                continue
            self.is_ended = False
            if len(head) < BLOCK:
                yield self._cut(start if extra is None else extra.start, "inside a header")
                return
            if not is_header(head):
                yield self._lost(start if extra is None else extra.start)
                extra = None
                continue
            if head[156:157] in b"xgLK":
                extra = self._read_extra(head, extra or _Extra(start))
                if extra is None:
                    yield self._cut(start, "inside a long header")
                    return
                continue
            found = self._file(head, extra or _Extra(start))
            extra = None
            if found is not None:
                yield found
        if extra is not None:
            yield self._cut(extra.start, "before the file of a long header")

    def _file(self, head: bytes, extra: _Extra) -> Stretch | None:
        """The file of a header; None for what is passed over."""
        at = self._at
        kind = head[156:157]
        try:
            size = extra.size if extra.size is not None else _number(head[124:136])
        except TarError as error:
            self._at = at + BLOCK
            return Stretch(extra.start, self._at, problem=error.problem)
        if kind in _WITHOUT_DATA or kind == b"5":
            size = 0
        data_at = at + BLOCK
        stop = data_at + padded(size)
        while kind == b"S" and stop < self._archive.size and self._has_more_sparse(head, stop):
            stop += BLOCK
            head = bytes(self._archive.read(stop - BLOCK, stop))
        if data_at + size > self._archive.size:
            return self._too_long(extra, head, size)
        self._at = stop
        if kind == b"5":
            return None
        name, key, extension, problem = _understood(head, extra)
        if not problem and kind not in _PLAIN:
            what = f"is {_WITHOUT_DATA[kind]}" if kind in _WITHOUT_DATA else f"has type {kind!r}"
            problem = f"member {name} {what}; only plain files are read"
        if not problem and not extension:
            return None
        return Stretch(extra.start, stop, key, extension, data_at, size, problem)

    def _has_more_sparse(self, head: bytes, at: int) -> bool:
        """GNU's old sparse files may have further blocks of their map."""
        return head[482 if is_header(head) else 504] != 0 and at + BLOCK <= self._archive.size

    def _too_long(self, extra: _Extra, head: bytes, size: int) -> Stretch:
        """A file that announces more than there is: the archive is cut here, unless another header follows."""
        name, key, extension, _ = _understood(head, extra)
        start, total = extra.start, self._archive.size
        self._at = self._next_header(self._at + BLOCK)
        what = f"member {name} announces {size} bytes"
        if self._at < total:
            problem = f"{what}, more than the archive has"
            return Stretch(start, self._at, key, extension, problem=problem)
        return Stretch(start, total, key, extension, problem=f"{what}, the archive ends before", reason=Reason.CUT)

    def _read_extra(self, head: bytes, extra: _Extra) -> _Extra | None:
        """Apply a PAX or long-name record to what is known; None where the archive ends inside it."""
        kind, at = head[156:157], self._at + BLOCK
        try:
            size = _number(head[124:136])
            if at + size > self._archive.size:
                self._at = self._archive.size
                return None
            self._at = at + padded(size)
            if size > EXTRA_LIMIT:
                raise TarError(f"a long header has {size} bytes, more than {EXTRA_LIMIT}")
            data = bytes(self._archive.read(at, at + size))
            if kind == b"L":
                extra.name = data.rstrip(b"\0")
            elif kind == b"x":
                _apply_pax(data, extra)
        except TarError as error:
            self._at = max(self._at, at)
            extra.problem = error.problem
        return extra

    def _cut(self, start: int, where: str) -> Stretch:
        self._at = total = self._archive.size
        return Stretch(start, total, problem=f"the archive ends {where}, at byte {total}", reason=Reason.CUT)

    def _lost(self, start: int) -> Stretch:
        """From something that is no header to the next that is one."""
        at = self._at
        self._at = self._next_header(at + BLOCK)
        return Stretch(start, self._at, problem=f"no valid tar header at byte {at}; lost up to byte {self._at}")

    def _next_header(self, at: int) -> int:
        """The next block that is a valid header, or the end of the archive."""
        while at < self._archive.size:
            window = self._archive.read(at, at + _WINDOW)
            blocks = np.frombuffer(window[: len(window) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
            for number in np.flatnonzero((blocks[:, 257:262] == _MAGIC).all(axis=1)):
                if is_header(blocks[number].tobytes()):
                    return at + int(number) * BLOCK
            at += _WINDOW
        return self._archive.size

    def _after_zeros(self, at: int) -> int:
        """The next block that is not zero, or the end of the archive."""
        while at < self._archive.size:
            window = np.frombuffer(self._archive.read(at, at + _WINDOW), np.uint8)
            found = np.flatnonzero(window)
            if len(found):
                return at + int(found[0]) // BLOCK * BLOCK
            at += len(window)
        return self._archive.size


def is_header(head: bytes) -> bool:
    """Whether a block is a tar header of USTAR, PAX or GNU whose checksum is right."""
    if head[257:262] != b"ustar":
        return False
    try:
        announced = octal(head[148:156])
    except TarError:
        return False
    return announced == sum(head) - sum(head[148:156]) + 8 * 32


def split_name(raw: bytes) -> tuple[str, str]:
    """Key and extension (in small letters) of a member's name, both empty where it makes no sample.

    TarError for a name that could leave the folder or that no line of text can hold.
    """
    shown = repr(raw[:80])[1:]
    if len(raw) > NAME_LIMIT:
        raise TarError(f"member name {shown}... has {len(raw)} bytes, more than {NAME_LIMIT}")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise TarError(f"member name {shown} is not UTF-8") from None
    while name.startswith("./"):
        name = name[2:]
    if not name.isprintable() or "\\" in name:
        raise TarError(f"member name {shown} holds characters that no name may have")
    if name.startswith("/") or ".." in name.split("/"):
        raise TarError(f"member name {shown} leads out of the archive")
    found = _KEY.fullmatch(name)
    if found is None or _META.fullmatch(name):
        return "", ""
    return found[1], found[2].lower()


def _understood(head: bytes, extra: _Extra) -> tuple[str, str, str, str]:
    """(name to be shown, key, extension, problem) of a header."""
    raw = extra.name
    if raw is None:
        raw = head[:100].partition(b"\0")[0]
        if head[257:263] == b"ustar\0" and head[345]:
            raw = head[345:500].partition(b"\0")[0] + b"/" + raw
    shown = repr(raw[:80])[1:]
    try:
        key, extension = split_name(raw)
    except TarError as error:
        return shown, "", "", error.problem
    return shown, key, extension, extra.problem and f"member {shown}: {extra.problem}"


def _apply_pax(data: bytes, extra: _Extra) -> None:
    """The records `length key=value` that matter: path, size, and sparse files, which are refused."""
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 8)
        digits = data[at:space]
        length = int(digits) if space > 0 and digits.isdigit() else 0
        record = data[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or at + length > len(data) or not record.endswith(b"\n"):
            raise TarError("a PAX header is broken")
        value = value[:-1]
        if key == b"path":
            extra.name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise TarError(f"a PAX header holds the size {value[:40]!r}")
            extra.size = int(value)
        elif key.startswith(b"GNU.sparse"):
            extra.problem = "a sparse file; only plain files are read"
        at += length


def _number(field: bytes) -> int:
    """A size: octal, or GNU's binary form for eight gigabytes and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return octal(field)


_MAGIC = np.frombuffer(b"ustar", np.uint8)
