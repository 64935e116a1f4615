"""SPHINX's published reading of boxes and scoring of short answers: what they gave on their inputs, ours give too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bestiary.evaluation.boxes import grounding, mark_up
from bestiary.evaluation.scorers import mean
from bestiary.evaluation.short_answers import (
    anls,
    exact_match,
    mme_label,
    mme_scores,
    relaxed_match,
    vqa_score,
    vqa_text,
)
from tests.parity.cases import cases, has, read_json

CASES = pytest.mark.parametrize("case", cases("sphinx", has("eval.json")))
TOLERANCE = 1e-6
DRAWN = (2, 4)
"""Lengths of a place that the published demo draws: a point, a box."""


def _entries(case: Path, name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = read_json(case / "eval.json")[name]
    assert entries
    return entries


@CASES
def test_brackets_of_an_answer_are_read_coloured_and_placed_as_published(case: Path) -> None:
    for entry in _entries(case, "box_parse"):
        found, marked = mark_up(entry["text"], reference_quirks=True)
        assert marked == entry["markdown"]
        assert [(m.name, m.colour) for m in found] == [(o["name"], o["color"]) for o in entry["objects"]]
        for mention, expected in zip(found, entry["objects"], strict=True):
            assert [list(place) for place in mention.places] == expected["points_in_square"]
            ours = [p for p in mention.pixels(entry["image_w"], entry["image_h"]) if len(p) in DRAWN]
            theirs = [p for p in expected["pixels_original_image"] if len(p) in DRAWN]
            assert len(ours) == len(theirs)
            for place, pixels in zip(ours, theirs, strict=True):
                assert place == pytest.approx(pixels, abs=TOLERANCE)


@CASES
def test_referring_expressions_are_scored_as_published(case: Path) -> None:
    for entry in _entries(case, "rec"):
        ours = grounding(entry["answer"], entry["gt_box"], entry["w"], entry["h"], reference_quirks=True)
        assert ours.predicted == pytest.approx(entry["parsed"], abs=TOLERANCE, nan_ok=True)
        assert ours.truth == pytest.approx(entry["gt_padded"], abs=TOLERANCE)
        assert ours.iou == pytest.approx(entry["iou"], abs=TOLERANCE, nan_ok=True)
        assert ours.is_correct() == entry["correct@0.5"]


@CASES
def test_relaxed_accuracy_is_the_published_one(case: Path) -> None:
    for entry in _entries(case, "relaxed_correctness"):
        assert relaxed_match(entry["prediction"], [entry["target"]]) == entry["correct"], entry
    for entry in _entries(case, "relaxed_accuracy_lists"):
        given = [(e["answer"], e["annotation"]) for e in entry["entries"]]
        scores = [relaxed_match(answer, [t] if isinstance(t, str) else t) for answer, t in given]
        assert mean(scores) == pytest.approx(entry["score"], abs=TOLERANCE)


@CASES
def test_exact_match_is_the_published_one(case: Path) -> None:
    for entry in _entries(case, "exact_match"):
        ours = exact_match(entry["answer"], entry["annotation"], reference_quirks=True)
        assert float(ours) == entry["score"], entry


@CASES
def test_mme_answers_and_scores_are_the_published_ones(case: Path) -> None:
    for entry in _entries(case, "mme_parse"):
        assert mme_label(entry["answer_lower"]) == entry["label"], entry
    for entry in _entries(case, "mme_metric"):
        ours = mme_scores(entry["gts"], entry["preds"])
        counts = [ours.true_positives, ours.false_negatives, ours.true_negatives, ours.false_positives, ours.num_other]
        assert counts == [entry[name] for name in ("TP", "FN", "TN", "FP", "other_num")]
        rates = [ours.precision, ours.recall, ours.accuracy, ours.accuracy_plus, ours.score]
        names = ("precision", "recall", "acc", "acc_plus", "task_score")
        assert rates == pytest.approx([entry[name] for name in names], abs=TOLERANCE)


@CASES
def test_vqa_accuracy_and_its_normalisation_are_the_published_ones(case: Path) -> None:
    for entry in _entries(case, "vqa_score"):
        assert vqa_text(entry["answer"]) == entry["processed"]
        ours = vqa_score(entry["answer"], entry["gts"], reference_quirks=True)
        assert ours == pytest.approx(entry["acc"], abs=TOLERANCE), entry


@CASES
def test_anls_is_the_published_one(case: Path) -> None:
    for entry in _entries(case, "anls"):
        assert anls(entry["answer"], entry["gts"]) == pytest.approx(entry["score"], abs=TOLERANCE), entry
