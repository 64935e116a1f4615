"""The annotation files of a data set, one after another: a single file, or those that a list names."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data_modules.adapters.fields import Fields
from data_modules.adapters.protocol import Record, RejectedRecordError
from data_modules.adapters.reading import decode_record, file_identity, json_records
from data_modules.adapters.tables import csv_records, parquet_records


class Described(Protocol):
    """A dataclass whose fields are an adapter's arguments."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Domains(Protocol):
    """What says of which domain a sample is."""

    domain: str | None
    text_domain: str


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """One annotation file and what a list says of it.

    images: the folder its picture names are relative to. label: how a sample's meta names the file, None for the only
    one. ratio: the share of its records to take, below 1 by the published draw. columns: those a table must have.
    facts: what else the list says.
    """

    path: Path
    images: Path | None = None
    label: str | None = None
    ratio: float = 1.0
    columns: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """The payload of a record out of several files: the file, the record's number in it from 0, and what it holds."""

    file: AnnotationFile
    number: int
    payload: Any


def all_records(files: Sequence[AnnotationFile]) -> Iterator[Record]:
    """The records of all files, numbered through; payload: a Piece."""
    number = 0
    for place, file in enumerate(files):
        chosen = _chosen(file)
        for in_file, record in enumerate(_read(file)):
            if chosen is not None and not chosen[in_file]:
                continue
            where = record.where
            if file.label is not None:
                where = f"{file.label}{where.removeprefix(file.path.name)}"
            share = None if record.share is None else (place + record.share) / len(files)
            yield Record(number, where, Piece(file, in_file, record.payload), share)
            number += 1


def fields_of(record: Record) -> tuple[Fields, AnnotationFile]:
    """The fields of a record of `all_records`, and the file they stand in; RejectedRecordError where it is broken."""
    piece = record.payload
    if isinstance(piece.payload, str):
        raise RejectedRecordError(record.where, piece.payload)
    is_raw = isinstance(piece.payload, bytes)
    found = decode_record(replace(record, payload=piece.payload)) if is_raw else piece.payload
    return Fields(found, record.where), piece.file


def place_in(record: Record) -> dict[str, Any]:
    """`file` and `file_record` for meta, where the data set has several files."""
    piece = record.payload
    return {} if piece.file.label is None else {"file": piece.file.label, "file_record": piece.number}


def identity_of(adapter: Described, files: Sequence[AnnotationFile] = ()) -> dict[str, Any]:
    """What an adapter's samples depend on, as JSON: format, annotation files, folder of pictures, every option."""
    options = {option.name: getattr(adapter, option.name) for option in fields(adapter)}
    annotations, images = options.pop("annotations"), options.pop("images")
    described = [
        file_identity(file.path)
        | {"images": _resolved(file.images), "label": file.label, "ratio": file.ratio, "facts": file.facts}
        for file in files
    ]
    return {
        "format": options.pop("name"),
        "annotations": file_identity(annotations) if annotations.is_file() else _resolved(annotations),
        "files": described,
        "images": _resolved(images),
        **options,
    }


def domain_of(adapter: Domains, num_images: int, where: str) -> str:
    """The domain the caller gave for samples with pictures, or that of the others; RejectedRecordError without one."""
    domain = adapter.domain if num_images else adapter.text_domain
    if not domain:
        raise RejectedRecordError(where, "its pictures are of no domain; give one with --domain")
    return domain


def _resolved(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _read(file: AnnotationFile) -> Iterator[Record]:
    if not file.path.is_file():
        raise ValueError(f"{file.path} is not a file; correct the path of the annotations")
    if file.path.suffix == ".parquet":
        return parquet_records(file.path, columns=file.columns)
    if file.path.suffix in (".csv", ".tsv"):
        return csv_records(file.path)
    return json_records(file.path)


def _chosen(file: AnnotationFile) -> bytearray | None:
    """One flag a record: those that LLaMA2-Accessory's ratio takes; None for all.

    It draws `random.sample` of the whole list after `random.seed(0)`, which depends on the list's length alone.
    """
    if file.ratio == 1:
        return None
    total = sum(1 for _ in _read(file))
    flags = bytearray(total)
    for place in random.Random(0).sample(range(total), int(total * file.ratio)):
        flags[place] = 1
    return flags
