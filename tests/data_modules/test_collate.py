"""Rows to batches."""

from __future__ import annotations

import numpy as np
import pytest

from bestiary.schema import IGNORE, Slot
from data_modules.collate import collate_rows
from tests.data_modules.making import SIDE, CharProcessor, sample

EXAMPLES = [CharProcessor()(sample("toys", number)) for number in range(6)]


def test_every_example_lies_where_its_segment_says() -> None:
    rows = [[EXAMPLES[1], EXAMPLES[2]], [EXAMPLES[0]], [EXAMPLES[3], EXAMPLES[4], EXAMPLES[5]]]
    batch = collate_rows(rows, lanes=(4, 5, 6), states=(b"a", b"b", b"c"), step=9)
    flat = [example for row in rows for example in row]
    assert batch.ids.shape[1] == max(sum(map(len, row)) for row in rows)
    assert (batch.lanes, batch.states, batch.step) == ((4, 5, 6), (b"a", b"b", b"c"), 9)
    for example, segment in zip(flat, batch.segments, strict=True):
        span = slice(segment.start, segment.start + segment.length)
        assert (segment.key, segment.source, segment.num_targets) == (example.key, "toys", example.num_targets)
        assert batch.ids[segment.row, span].tolist() == example.ids.tolist()
        assert batch.labels[segment.row, span].tolist() == [IGNORE, *example.labels[1:].tolist()]
        assert batch.slots[segment.row, span].tolist() == example.slots.tolist()
        assert batch.positions[segment.row, span].tolist() == list(range(len(example)))
    assert batch.segment_ids[2].unique().tolist()[-1] == 3
    padding = batch.segment_ids == 0
    assert (batch.labels[padding] == IGNORE).all()
    assert (batch.ids[padding] == 0).all()
    assert batch.num_tokens == int((~padding).sum()) == sum(map(len, flat))
    assert batch.num_targets == int((batch.labels != IGNORE).sum())
    assert np.array_equal(batch.pixels.numpy(), np.concatenate([example.pixels for example in flat]))


def test_regions_follow_their_positions_and_examples_without_prompts_are_left_out() -> None:
    batch = collate_rows([[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2], EXAMPLES[3]]])
    assert batch.regions is not None
    assert batch.regions.counts.tolist() == [2, 2]
    assert batch.regions.coords.shape == (4, 4)
    assert int((batch.slots == Slot.REGION).sum()) == 4
    assert collate_rows([[EXAMPLES[0]]]).regions is None


def test_text_only_and_empty_rows_make_a_batch() -> None:
    text = collate_rows([[EXAMPLES[2]], []])
    assert text.pixels.shape == (0, 3, SIDE, SIDE)
    assert (text.segment_ids[1] == 0).all()
    empty = collate_rows([[]])
    assert (empty.ids.shape, empty.segments, empty.num_targets) == ((1, 1), (), 0)


def test_padding_can_be_wider_but_not_narrower() -> None:
    assert collate_rows([[EXAMPLES[0]]], pad_to=64).ids.shape == (1, 64)
    with pytest.raises(ValueError, match="shorter than the longest row"):
        collate_rows([[EXAMPLES[0]]], pad_to=3)
    with pytest.raises(ValueError, match="2 lanes for 1 rows"):
        collate_rows([[EXAMPLES[0]]], lanes=(0, 1))
