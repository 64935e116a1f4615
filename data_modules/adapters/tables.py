"""Tables row by row in bounded memory: CSV files and parquet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TextIO

from data_modules.adapters.fields import shown
from data_modules.adapters.protocol import Record
from data_modules.adapters.reading import MAX_RECORD_BYTES

_ROWS = 1024
_LONGEST_ROW = MAX_RECORD_BYTES
"""Characters of a row of a CSV file: more mean that it is not what it should be."""
_BREAK = re.compile(r"[\r\n]")


def csv_records(path: Path, *, delimiter: str = "\t", first: int = 0) -> Iterator[Record]:
    """The rows below the line of names; payload: a dict of texts, or a text that says why the row is refused.

    A row with another number of cells than names has them all under `cells`, for an adapter to refuse. Bytes that are
    no UTF-8 become lone surrogates, which no sample may hold. Quotes are read as the published reader does (pandas):
    words behind a closing one belong to its cell, and one that nothing closes is a ValueError. A row that ran into the
    next ones through an open quote is refused.
    """
    numbers = count(first)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_ROW))  # of the whole process; _Rows bounds every row
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _Rows(path, file, delimiter)
        try:
            names = next(rows, [])
            if len(names) < 2 or len(set(names)) < len(names):
                told = f"{path} begins with the names {shown(names)}"
                raise ValueError(f"{told}; it needs two or more, each once, tabs between")
            for cells in filter(None, rows):
                is_whole = len(cells) == len(names)
                row = dict(zip(names, cells, strict=True)) if is_whole else {"cells": cells}
                yield Record(next(numbers), f"{path.name} line {rows.line}", rows.problem(cells) or row)
        except csv.Error as error:
            raise ValueError(f"{path} line {rows.line}: {error}; is it a table with tabs between cells?") from error


class _Rows(Iterator[list[str]]):
    """The cells of every row of a table; ValueError for a row that is too long or that a quote keeps open to the end.

    line: the last line that was read.
    """

    def __init__(self, path: Path, file: TextIO, delimiter: str) -> None:
        self.line = 0
        self._path = path
        self._file = file
        self._delimiter = delimiter
        self._lines: list[str] = []
        self._length = 0
        self._rows = csv.reader(self._read(), delimiter=delimiter)

    def __next__(self) -> list[str]:
        self._lines, self._length = [], 0
        return next(self._rows)

    def problem(self, cells: Sequence[str]) -> str | None:
        """What is wrong with the row just read, if one of its quotes was left open and a later row's closed it.

        A cell then holds the end of one row and the beginning of the next, and goes on behind the quote that closes it,
        for that opened a cell or stood in its words. A cell that was written with tabs and line breaks in it ends with
        its quote.
        """
        if len(self._lines) < 2 or not any(self._delimiter in cell and _BREAK.search(cell) for cell in cells):
            return None
        try:
            list(csv.reader(self._lines, delimiter=self._delimiter, strict=True))
        except csv.Error:
            return f"is {len(self._lines)} lines that an open quote made one row; close the quote or take it out"
        return None

    def _read(self) -> Iterator[str]:
        """The lines of the file, those of a row kept for `problem`."""
        while line := self._file.readline(_LONGEST_ROW + 1):
            self.line += 1
            self._lines.append(line)
            self._length += len(line)
            if self._length > _LONGEST_ROW:
                raise ValueError(f"{self._path} line {self.line}: a row of more than {_LONGEST_ROW} characters; cut it")
            yield line
        if self._lines:  # a row that is whole asks for no further line
            start = self.line - len(self._lines) + 1
            raise ValueError(f"{self._path} line {start}: opens a quote that nothing closes; close it or take it out")


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
