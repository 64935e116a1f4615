"""The few bytes of the USTAR format that a shard needs, written and parsed strictly.

Python's tarfile opens links, devices, sparse files and PAX overrides; a shard has none of them, so nothing here can
follow one. Every member is a plain file whose name is a WebDataset name: `<key>.<extension>`, the key without a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
END = bytes(2 * BLOCK)
"""Two zero blocks close an archive."""

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_/=+,@-]*")
_MEMBER_NAME = re.compile(rf"({KEY.pattern})\.([a-z0-9.]+)")
_NAME_LIMIT = 100
_PLAIN = (b"0", b"\0")


class TarError(ValueError):
    """A header or member that a shard may not have; `problem` is one short line."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Member:
    """One plain file of an archive: key and extension of its name, first byte and size of its contents."""

    key: str
    extension: str
    start: int
    size: int


def padded(size: int) -> int:
    """Size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member. Owner, mode and time are constants: equal samples give equal shards."""
    encoded = name.encode("ascii")
    if len(encoded) > _NAME_LIMIT:
        raise ValueError(f"member name {name!r} is longer than {_NAME_LIMIT} characters; shorten the key")
    fields = (
        encoded.ljust(100, b"\0")
        + b"0000644\0"  # mode
        + b"0000000\0" * 2  # owner, group
        + b"%011o\0" % size
        + b"%011o\0" % 0  # mtime, an integer: a fractional one would need a PAX header of its own
        + b" " * 8  # checksum, summed as blanks
        + b"0"  # plain file
        + bytes(100)  # link name
        + b"ustar\x0000"
    ).ljust(BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def member(name: str, data: bytes) -> bytes:
    """Header, bytes and padding of one file."""
    return header(name, len(data)) + data + bytes(padded(len(data)) - len(data))


def parse_members(data: memoryview, start: int, stop: int) -> Iterator[Member]:
    """The plain files between two offsets of an archive; raises TarError at the first thing that is none."""
    at = start
    while at < stop:
        head = bytes(data[at : at + BLOCK])
        if head[257:262] != b"ustar":
            raise TarError(f"no tar header at byte {at}")
        if head[156:157] not in _PLAIN:
            raise TarError(f"member at byte {at} has type {head[156:157]!r}; a shard holds plain files only")
        try:
            size = octal(head[124:136])
        except TarError as error:
            raise TarError(f"header at byte {at}: {error.problem}") from error
        if at + BLOCK + size > stop:
            raise TarError(f"member at byte {at} announces {size} bytes, more than its sample has")
        key, extension = split_name(head)
        yield Member(key, extension, at + BLOCK, size)
        at += BLOCK + padded(size)


def split_name(head: bytes) -> tuple[str, str]:
    """Key and extension of a header's name; refuses absolute paths, `..`, hidden files and the long-name prefix."""
    raw = head[:100].rstrip(b"\0")
    if head[345:346] != b"\0":
        raise TarError(f"member {raw!r} uses the long-name prefix")
    found = _MEMBER_NAME.fullmatch(raw.decode("latin-1"))
    if found is None:
        raise TarError(f"member name {raw!r} is not <key>.<extension>")
    return found[1], found[2]


def octal(field: bytes) -> int:
    """The number in a header's field; TarError for anything but octal digits."""
    digits = field.strip(b" \0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"{field!r} stands where an octal number belongs")
    return int(digits, 8)
