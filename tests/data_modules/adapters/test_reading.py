"""Annotation files record by record: boundaries, numbers, encodings, broken files."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_modules.adapters import RejectedRecordError, reading, tables
from data_modules.adapters.reading import decode_record, file_identity, json_records
from data_modules.adapters.tables import csv_records, parquet_records

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def _decoded(path: Path) -> list[Any]:
    return [decode_record(record) for record in json_records(path)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_an_array_is_read_as_the_json_module_reads_it_whatever_the_window(
    tmp_path: Path, values: list[Any], window: int, indent: int | None, is_ascii: bool
) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=is_ascii), "utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_WINDOW", window)
        records = list(json_records(path))
    assert [record.number for record in records] == list(range(len(values)))
    for record, value in zip(records, values, strict=True):
        if "\\ud8" in json.dumps(value):  # may be half of a surrogate pair, which no text can hold
            continue
        assert decode_record(record) == value
        assert repr(decode_record(record)) == repr(value)  # 1 stays 1, 1.0 stays 1.0, -0.0 stays -0.0


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n \xef\xbb\xbf".strip()])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_lines_and_arrays_may_begin_with_a_bom_and_end_as_windows_ends_lines(
    tmp_path: Path, start: bytes, end: bytes
) -> None:
    path = tmp_path / "records.json"
    for data in (b'{"a": 1}\r\n\r\n{"a": 2}' + end, b'[{"a": 1},\r\n{"a": 2}]' + end):
        path.write_bytes(start + data)
        assert _decoded(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("raw", [b"NaN", b'{"a": Infinity}', b"1e400", b'"\xff"', b'"\\ud800"', b"{'a': 1}", b"01"])
def test_a_broken_record_is_refused_alone(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(b'[{"a": 1}, ' + raw + b', {"a": 3}]')
    first, second, third = json_records(path)
    assert decode_record(first) == {"a": 1} and decode_record(third) == {"a": 3}
    with pytest.raises(RejectedRecordError, match=r"records.json record 1: is not JSON"):
        decode_record(second)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (gzip.compress(b'{"id": 1}', mtime=0), "is compressed (gzip); unpack it"),
        (b'\n{ \n "id": 1\n}\n', "on several lines; give a"),
    ],
)
def test_a_file_that_is_neither_an_array_nor_lines_is_refused_at_once(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{path} ")) as refused:
        list(json_records(path))
    assert told in str(refused.value)


def test_a_pipe_in_a_list_of_annotations_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")  # nobody writes to it: opening would wait for ever
    with pytest.raises(ValueError, match=r"x\.json is no regular file but a pipe"):
        file_identity(tmp_path / "x.json")


@pytest.mark.parametrize("data", [b'[{"a": 1}, {"a"', b'[{"a": 1},', b"[", b'[{"a": "x]}]'])
def test_a_cut_array_is_an_error_after_its_whole_records(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"records.json ends inside its array"):
        list(json_records(path))


def test_a_row_of_a_table_with_other_cells_is_left_for_the_adapter_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes('\ufeffinstruction\toutput\r\n"two\nlines"\té\r\nx\r\n\r\na\tb\tc\r\n'.encode())
    assert [record.payload for record in csv_records(path)] == [
        {"instruction": "two\nlines", "output": "é"},
        {"cells": ["x"]},
        {"cells": ["a", "b", "c"]},
    ]
    path.write_text("instruction\tinstruction\n")
    with pytest.raises(ValueError, match="each once"):
        list(csv_records(path))


def _rows(path: Path, text: str) -> list[Any]:
    path.write_text(f"a\tb\tc\n{text}", newline="")
    return [tuple(r.payload.values()) if isinstance(r.payload, dict) else r.payload for r in csv_records(path)]


def test_quotes_of_a_table_mean_what_they_mean_to_the_published_reader(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    text = (
        '"x" y\t5" "q"\tz\n'
        '"a\tb\nc"\t"say ""it"""\tz\n'  # as tables are written: tabs and line breaks in a cell
        '"two\nlines" more\t"p\tq"\tz\n'
        'x\ty\t"last"'
    )
    expected = [
        ("x y", '5" "q"', "z"),
        ("a\tb\nc", 'say "it"', "z"),
        ("two\nlines more", "p\tq", "z"),
        ("x", "y", "last"),
    ]
    assert _rows(path, text) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_that_an_open_quote_made_one_are_refused(tmp_path: Path, end: str) -> None:
    told = "is 2 lines that an open quote made one row; close the quote or take it out"
    for first, second in (('1\t"2\t3', '4\t5 "x" y\t6'), ('"1\t2\t3', '"4"\t5\t6'), ('"1\t2\t3', '"4\t5\t6')):
        assert _rows(tmp_path / "records.csv", end.join((first, second, "7\t8\t9", ""))) == [told, ("7", "8", "9")]


@pytest.mark.parametrize("text", ['1\t2\t3\n4\t"5\t6\n7\t8\t9\n', '1\t2\t3\n4\t5\t"6'])
def test_a_quote_that_nothing_closes_is_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"records\.csv line 3: opens a quote that nothing closes; close it"):
        _rows(tmp_path / "records.csv", text)


def test_a_long_cell_of_a_table_ends_nothing_and_a_long_row_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, long = tmp_path / "records.csv", "x" * 300_000
    assert _rows(path, f"{long}\t2\t3\n4\t5\t6\n") == [(long, "2", "3"), ("4", "5", "6")]
    monkeypatch.setattr(tables, "_LONGEST_ROW", 100)
    for text in (f"{long}\t2\t3\n", '"' + "x\n" * 90 + '"\t2\t3\n'):
        with pytest.raises(ValueError, match=r"records\.csv line \d+: a row of more than 100 characters; cut it"):
            _rows(path, text)


def test_missing_columns_of_a_parquet_are_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "records.parquet"
    write_table(pyarrow.table({"caption": ["a"], "url": ["b"]}), path)
    with pytest.raises(ValueError, match=r"records.parquet has no column image_path, only caption, url; write it with"):
        list(parquet_records(path, columns=("caption", "image_path")))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"records.parquet cannot be read as parquet") as caught:
        list(parquet_records(path, columns=()))
    assert "\n" not in str(caught.value)


def test_a_parquet_is_read_in_bounded_memory(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    path, rows, groups = tmp_path / "records.parquet", 2048, 40
    schema = pyarrow.schema([("caption", pyarrow.binary())])
    with ParquetWriter(path, schema) as writer:
        for _ in range(groups):
            writer.write_table(pyarrow.table({"caption": [os.urandom(200) for _ in range(rows)]}, schema))
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, _ in enumerate(parquet_records(path, columns=("caption",)), start=1):
        if number % rows == 0:
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert number == rows * groups
    assert most < path.stat().st_size / 4, "row groups that were read are held"
