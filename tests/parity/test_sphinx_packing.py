"""Rows of SPHINX's text pre-training: run-on segments, and one document a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.cases import cases, has, read_json
from tests.parity.sphinx_examples import tokenizer_of
from tests.parity.text_rows import document_row, run_on_segments

CASES = pytest.mark.parametrize("case", cases("sphinx", has("packing.json")))


def _documents(case: Path) -> tuple[dict[str, Any], list[list[int]]]:
    golden, tokenizer = read_json(case / "packing.json"), tokenizer_of(case)
    return golden, [tokenizer.encode(text, bos=True, eos=True) for text in golden["texts"]]


@CASES
def test_documents_run_on_across_the_published_segments(case: Path) -> None:
    golden, documents = _documents(case)
    assert list(run_on_segments(documents, golden["max_len"])) == golden["packed"]


@CASES
def test_one_document_a_row_is_cut_and_padded_as_published(case: Path) -> None:
    golden, documents = _documents(case)
    (expected,) = (value for name, value in golden.items() if name.startswith("vanilla_input_ids"))
    assert [document_row(ids, golden["vanilla_max_words"]) for ids in documents] == expected
