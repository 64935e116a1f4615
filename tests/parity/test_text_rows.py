from __future__ import annotations

import pytest

from tests.parity.text_rows import document_row, run_on_segments

BOS, EOS = 1, 2


def test_segments_hold_every_token_but_bos_in_order() -> None:
    documents = [[BOS, *range(10, 10 + n), EOS] for n in (0, 1, 4, 9, 30)]
    flat = [token for document in documents for token in document[1:]]
    for length in (1, 2, 7, 64):
        segments = list(run_on_segments(documents, length))
        assert all(len(segment) == length for segment in segments)
        joined = [token for segment in segments for token in segment]
        assert joined[: len(flat)] == flat and not any(joined[len(flat) :])
        assert len(joined) - len(flat) < length


def test_a_document_without_bos_loses_nothing_and_none_gives_one_segment_of_pads() -> None:
    assert list(run_on_segments([[5, 6, EOS]], 4, pad_id=9)) == [[5, 6, EOS, 9]]
    assert list(run_on_segments([], 2)) == [[0, 0]]


def test_documents_are_read_as_they_are_needed() -> None:
    endless = ([BOS, 7, EOS] for _ in iter(int, 1))
    assert next(run_on_segments(endless, 4)) == [7, EOS, 7, EOS]


def test_a_row_is_one_document_cut_or_padded() -> None:
    assert document_row([BOS, 7, EOS], 2) == [BOS, 7] and document_row([BOS, 7, EOS], 5) == [BOS, 7, EOS, 0, 0]


def test_rows_hold_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="length=0"):
        list(run_on_segments([], 0))
    with pytest.raises(ValueError, match="length=0"):
        document_row([], 0)
