from __future__ import annotations

import math

import pytest

from bestiary.evaluation.scorers import (
    Pair,
    captions,
    is_exact,
    label_pairs,
    mean_semantic_iou,
    ocr_accuracy,
    ocr_pairs,
    parse_marks,
    semantic_iou,
)


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Region 1: cat\nRegion 2: dog", {1: "cat", 2: "dog"}),
        ("Mark 3: street sign\n", {3: "street sign"}),
        ("<Region 1>: a cat\r\n<mark 2 >:two  dogs", {1: "a cat", 2: "two  dogs"}),
        ("Region 1:\nRegion 2: x: y", {1: "", 2: "x: y"}),
        ("Region 1: first\nRegion 1: second", {1: "first"}),
        ("the cat is Region 1: no\nRegion one: no\nRegion 1 cat\n", {}),
        ("<Region 1> <Region 2>: near", {}),
        ("", {}),
    ],
)
def test_every_line_that_names_one_region_is_read(text: str, marks: dict[int, str]) -> None:
    assert parse_marks(text) == marks


def test_exact_means_all_but_case_and_spacing() -> None:
    assert is_exact("  Street   SIGN", "street sign")
    assert not is_exact("street-sign", "street sign")
    assert not is_exact(None, "")
    assert is_exact("", "")


def test_semantic_iou_of_nothing_is_defined() -> None:
    assert semantic_iou("", "") == 1.0
    assert semantic_iou("", "cat") == 0.0
    assert semantic_iou(None, "cat") == 0.0
    assert semantic_iou("a black cat", "cat") == pytest.approx(1 / 3)


def test_labels_are_paired_by_mark_and_missing_ones_are_wrong() -> None:
    pairs = label_pairs("Region 2: dog\nRegion 9: extra", "Region 1: alley_cat\nRegion 2: dog")
    assert pairs == [Pair(1, None, "alley cat"), Pair(2, "dog", "dog")]
    assert mean_semantic_iou(pairs) == 0.5


def test_published_labels_are_paired_by_order_and_missing_ones_forgotten() -> None:
    pairs = label_pairs("Region 2: dog", "Region 1: cat\nRegion 2: dog", reference_quirks=True)
    assert pairs == [Pair(1, "dog", "cat")]
    with pytest.raises(ValueError, match="2 predicted regions but 1 true"):
        label_pairs("Region 1: a\nRegion 2: b", "Region 1: a", reference_quirks=True)


def test_ocr_needs_no_final_newline_and_keeps_brackets() -> None:
    pairs = ocr_pairs("Region 1: STOP\nRegion 2: f(x)", "Region 1: stop\nRegion 2: f(x)\nRegion 3: go")
    assert ocr_accuracy(pairs) == pytest.approx(2 / 3)


def test_published_ocr_reads_brackets_and_blanks_and_demands_equal_counts() -> None:
    pairs = ocr_pairs("Region 1: word (STOP)\nRegion 2: \n", "Region 1: stop\nRegion 2: x", reference_quirks=True)
    assert [p.predicted for p in pairs] == ["STOP", "BLANK"]
    assert ocr_accuracy(pairs, reference_quirks=True) == 0.5
    with pytest.raises(ValueError, match="1 regions read"):
        ocr_pairs("Region 1: a\nRegion 2: b", "Region 1: a\nRegion 2: b", reference_quirks=True)


def test_captions_need_neither_brackets_nor_newline() -> None:
    assert captions("<Region 1>: a cat\nRegion 2: a dog") == ["a cat", "a dog"]
    assert captions("<Region 1>: a cat\nRegion 2: a dog\n", reference_quirks=True) == ["a dog"]


def test_a_mean_of_nothing_is_not_a_score() -> None:
    assert math.isnan(ocr_accuracy([]))
