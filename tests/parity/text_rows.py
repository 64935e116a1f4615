"""Rows of plain text as SPHINX's text pre-training made them, for replicating it: run-on segments or one document each.

Unlike packing.py, which never cuts a sample and never lets two attend to one another, run-on segments are one long text
cut into equal lengths, and a document goes on where the last one ended. Labels are the ids themselves but for the pad.
The rules are LLaMA2-Accessory's (@ 3777c43, accessory/tools/generate_packed_data.py and accessory/data/falcon.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def run_on_segments(
    documents: Iterable[Sequence[int]], length: int, *, bos_id: int = 1, pad_id: int = 0
) -> Iterator[list[int]]:
    """Segments of `length` ids, made of whole documents (BOS ... EOS) one after another; the last is padded.

    A document's BOS is left out, its EOS stays: it is what separates documents. No documents give one segment of pads.
    """
    _check(length)
    segment: list[int] = []
    for document in documents:
        start = int(bool(document) and document[0] == bos_id)
        while len(segment) + len(document) - start > length:
            room = length - len(segment)
            yield [*segment, *document[start : start + room]]
            segment, start = [], start + room
        segment += document[start:]
    yield _padded(segment, length, pad_id)


def document_row(document: Sequence[int], length: int, *, pad_id: int = 0) -> list[int]:
    """One document (BOS ... EOS) a row, cut or padded at its end."""
    _check(length)
    return _padded(document[:length], length, pad_id)


def _padded(ids: Sequence[int], length: int, pad_id: int) -> list[int]:
    return [*ids, *[pad_id] * (length - len(ids))]


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length}; a row of text holds at least one token")
