"""Tables row by row in bounded memory: CSV files and parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from data_modules.adapters.protocol import Record

_ROWS = 1024


def csv_records(path: Path, *, delimiter: str = "\t", first: int = 0) -> Iterator[Record]:
    """The rows below the line of names; payload: a dict of texts.

    A row with another number of cells than names has them all under `cells`, for an adapter to refuse. Bytes that are
    no UTF-8 become lone surrogates, which no sample may hold.
    """
    numbers = count(first)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        try:
            names = next(rows, [])
            if len(names) < 2 or len(set(names)) < len(names):
                raise ValueError(f"{path} begins with the names {names}; it needs two or more, each once, tabs between")
            for cells in rows:
                if cells:
                    is_whole = len(cells) == len(names)
                    row = dict(zip(names, cells, strict=True)) if is_whole else {"cells": cells}
                    yield Record(next(numbers), f"{path.name} line {rows.line_num}", row)
        except csv.Error as error:
            raise ValueError(f"{path} line {rows.line_num}: {error}; is it a table with tabs between cells?") from error


def parquet_records(path: Path, *, columns: Sequence[str], first: int = 0) -> Iterator[Record]:
    """The rows of a parquet file; payload: a dict of plain values. ValueError where one of `columns` is missing."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow; pip install 'bestiary[parquet]'") from error
    numbers = count(first)
    try:
        with ParquetFile(path, pre_buffer=False) as file:  # a buffer keeps all row groups that were read
            has = file.schema_arrow.names
            if missing := [name for name in columns if name not in has]:
                told = f"{path} has no column {', '.join(missing)}, only {', '.join(has)}"
                raise ValueError(f"{told}; write it with these names, or take another file")
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number = next(numbers)
                    place = number - first
                    yield Record(number, f"{path.name} row {place}", row, (place + 1) / total)
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {one_line(error)}; fetch it again") from error


def one_line(error: BaseException) -> str:
    """The message of a library's error without its line breaks."""
    return " ".join(str(error).split())
