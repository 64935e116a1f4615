"""What the shard writer and an adapter of a published annotation format say to each other.

The writer walks `records()` in its own process and sends the records, in batches, to worker processes; there
`to_sample` parses a record and opens its pictures. So `records()` finds boundaries and does no more than it must, a
record is cheap to pickle, and everything that costs (JSON of one record, pictures) happens in `to_sample`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from bestiary.schema import Sample

_NO_KEY = re.compile(r"^[^A-Za-z0-9_]|[^A-Za-z0-9_=+,@-]")


class Rejection(StrEnum):
    """The classes of problems that the report of a writer counts."""

    RECORD = "record"
    """The record is not what the format promises: broken JSON, missing fields, wrong types, empty text."""
    MISSING_IMAGE = "missing-image"
    """The picture's file does not exist, or its name leaves the image folder."""
    LARGE_IMAGE = "large-image"
    """The picture's file has too many bytes."""
    NOT_AN_IMAGE = "not-an-image"
    """The file is no JPEG, PNG or WebP, or its header is broken."""
    REGION = "region"
    """A mark lies outside its picture or is malformed."""
    SAMPLE = "sample"
    """The finished sample breaks what shards may hold."""
    DUPLICATE_KEY = "duplicate-key"
    """An earlier sample has the same key."""


class RejectedRecordError(ValueError):
    """A record that does not become a sample. `where` is the record's, `problem` one line that names the value."""

    def __init__(self, where: str, problem: str, kind: Rejection = Rejection.RECORD) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem
        self.kind = kind

    def __reduce__(self) -> tuple[type[RejectedRecordError], tuple[str, str, Rejection]]:
        return RejectedRecordError, (self.where, self.problem, self.kind)


def sample_key(source: str, number: int, part: int | None = None) -> str:
    """The key of the sample a record makes: unique in its source, sorted as the records are.

    Published ids repeat and hold characters no key may have; keep them in `meta["id"]`. part: which of the samples of
    one record, where it makes several.
    """
    stem = f"{_NO_KEY.sub('_', source)[:60]}-{number:08d}"
    return stem if part is None else f"{stem}-{part}"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an annotation file, not yet understood.

    number: place in the reading order over all files, from 0. where: "train.json record 17", for messages.
    payload: the raw bytes of the record where possible (parsed by the workers), or plain data.
    share: how much of the annotations has been read up to here, 0 to 1; None where unknown. Shown, never relied on.
    """

    number: int
    where: str
    payload: Any
    share: float | None = None


class Adapter(Protocol):
    """One published annotation format; picklable, and constructed without reading files.

    Constructors are `Adapter(annotations: Path, images: Path | None, *, source: str, domain: str | None, **options)`
    with every option of the format a keyword-only parameter, annotated `str`, `int`, `float` or `bool` and with a
    default (`--option name=value` converts by the annotation).
    """

    name: str
    """The FORMAT of `bestiary shards write`."""

    def records(self) -> Iterator[Record]:
        """All records in the order of the files, in bounded memory; the same on every call.

        A record that can be told apart but not understood is yielded all the same: `to_sample` rejects it. ValueError
        (one line) only where the file as a whole cannot be read on: broken structure, missing file, wrong format.
        """

    def to_sample(self, record: Record) -> Sample | list[Sample]:
        """The sample or samples of a record, a pure function of record and files; RejectedRecordError otherwise."""

    def identity(self) -> dict[str, Any]:
        """What the output depends on, as JSON: the annotation files (`reading.file_identity`), folders and options."""
