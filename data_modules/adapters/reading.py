"""Annotation files record by record, in bounded memory: JSON arrays, JSON lines.

The splitters find where a record ends and leave its meaning to the workers: a million-record array costs its bytes
once through a regular expression, and never more memory than a window and one record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from data_modules.adapters.protocol import Record, RejectedRecordError

MAX_RECORD_BYTES = 64 * 2**20
"""A longer record means that the file is not what it should be."""
MAX_HASHED_BYTES = 64 * 2**20
"""Annotation files up to this size are identified by their contents: a copy of one is the same."""
GZIP = b"\x1f\x8b"
"""How a gzip file begins, whatever its name."""
_WINDOW = 4 * 2**20
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_IN_ARRAY = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+([\[\]{},])?", re.DOTALL)
_IN_ELEMENT = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+([\[\]{}])?", re.DOTALL)
"""Up to the next mark of structure, over whole strings; without a mark where the window ends (or cuts a string)."""
_BLANK = b" \t\r\n"
_MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors put first."""


def refuse_pipe(path: Path) -> None:
    """ValueError for annotations that cannot be read twice, such as a pipe; nothing is opened."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(
            f"{path} is no regular file but a pipe or a device; annotations are read more than once: save them to a "
            "file and name that"
        )


def file_identity(path: Path) -> dict[str, Any]:
    """What tells one annotation file from another: its hash, or size and time of change of a very large one."""
    facts = path.stat()
    refuse_pipe(path)
    if facts.st_size > MAX_HASHED_BYTES:
        return {"file": path.name, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    return {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def json_records(path: Path, *, first: int = 0) -> Iterator[Record]:
    """The elements of a top-level JSON array, or the lines of JSON lines; payload: the raw bytes of each.

    first: the number of the first record. Decode with `decode_record`. ValueError for a file that is neither.
    """
    with path.open("rb") as file:
        start = file.read(_WINDOW).lstrip(_MARK + _BLANK)
    if start.startswith(GZIP):
        raise ValueError(f"{path} is compressed (gzip); unpack it first")
    if start.partition(b"\n")[0].strip(_BLANK) == b"{":
        raise ValueError(f"{path} has an object on several lines; give a JSON array, or one record a line (jq -c)")
    yield from (array_records if start.startswith(b"[") else line_records)(path, first=first)


def line_records(path: Path, *, first: int = 0) -> Iterator[Record]:
    """The lines of a file that are not blank."""
    total, read, number = max(1, path.stat().st_size), 0, first
    with path.open("rb") as file:
        for line_number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES), b""), start=1):
            read += len(line)
            if len(line) == MAX_RECORD_BYTES:
                raise ValueError(f"{path} line {line_number} is longer than {MAX_RECORD_BYTES} bytes; is it text?")
            text = line.removeprefix(_MARK).strip(_BLANK)
            if text:
                yield Record(number, f"{path.name} line {line_number}", text, read / total)
                number += 1


def array_records(path: Path, *, first: int = 0) -> Iterator[Record]:
    """The elements of a top-level JSON array, whatever they are; ValueError where the array itself is broken."""
    total = max(1, path.stat().st_size)
    for number, (element, end) in enumerate(_elements(path)):
        yield Record(first + number, f"{path.name} record {number}", element, end / total)


def whole_json(path: Path) -> Any:
    """A small JSON file: a list of files or settings. ValueError of one line where it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(_MARK))
    except (OSError, UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def decode_record(record: Record) -> Any:
    """The JSON of a record with raw bytes; RejectedRecordError where it is broken."""
    try:
        return msgspec.json.decode(record.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RejectedRecordError(record.where, f"is not JSON ({error})") from error


def _elements(path: Path) -> Iterator[tuple[bytes, int]]:
    """(raw element, bytes of the file up to its end) of the array in a file."""
    with path.open("rb") as file:
        buffer = _opened(path, file)
        base, start, at, depth, found = file.tell() - len(buffer), 1, 1, 1, 0
        while depth:
            ends, at, depth = _scan(buffer, at, depth)
            for end in ends:
                element = buffer[start:end].strip(_BLANK)
                is_closing = end == ends[-1] and not depth
                if not element and not (is_closing and not found):
                    raise ValueError(f"{path} byte {base + end}: an array element is missing")
                if element:
                    yield element, base + end
                found, start = found + 1, end + 1
            if depth:
                if len(buffer) - start > MAX_RECORD_BYTES:
                    raise ValueError(f"{path} byte {base + start}: a record of more than {MAX_RECORD_BYTES} bytes")
                more = file.read(_WINDOW)
                if not more:
                    raise ValueError(f"{path} ends inside its array; it is cut, fetch it again")
                buffer, base, at, start = buffer[start:] + more, base + start, at - start, 0
        if (buffer[at:] + file.read(_WINDOW)).strip(_BLANK):
            raise ValueError(f"{path} byte {base + at}: something follows the array; is it several files in one?")


def _opened(path: Path, file: BinaryIO) -> bytes:
    """The first window, from the bracket that opens the array."""
    buffer = file.read(_WINDOW).removeprefix(_MARK).lstrip(_BLANK)
    if not buffer.startswith(b"["):
        raise ValueError(f"{path} does not begin with a JSON array but with {buffer[:16]!r}; is it of another format?")
    return buffer


def _scan(buffer: bytes, at: int, depth: int) -> tuple[list[int], int, int]:
    """Where elements end (a comma of the array, or its last bracket), where to go on, and the depth there.

    Stops at the end of the buffer, in front of a string that it cuts, and behind the bracket that closes the array
    (depth 0).
    """
    ends: list[int] = []
    while depth:
        found = (_IN_ARRAY if depth == 1 else _IN_ELEMENT).match(buffer, at)
        assert found is not None, "both patterns match nothing at all, too"
        at, mark = found.end(), found[1]
        if mark is None:
            break
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if mark == b"," or not depth:
            ends.append(at - 1)
    return ends, at, depth
