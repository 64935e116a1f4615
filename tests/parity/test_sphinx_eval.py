"""SPHINX's published reading of boxes and scoring of short answers: what they gave on their inputs, ours give too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bestiary.evaluation.boxes import grounding, mark_up
from bestiary.evaluation.questions import Answered, Rule, question_of
from bestiary.evaluation.referring import BoxOverlap
from bestiary.evaluation.rules import Anls, ExactMatch, RelaxedAccuracy, VqaAccuracy
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
from bestiary.evaluation.yes_no import Mme
from bestiary.schema import Sample, Turn
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


def _item(answer: str, picture: int = 0, **meta: Any) -> Answered:
    """A benchmark's question with the published truth, and an answer to it."""
    turns = (Turn("human", "?"), Turn("assistant", str(meta.get("gt_answers", ""))))
    sample = Sample(f"k{picture}", "published", "natural", turns, meta=meta)
    return Answered(question_of(sample, picture, category="dataset_name"), answer, None)


@CASES
def test_benchmark_rules_score_with_quirks_as_published(case: Path) -> None:
    def value(rule: Rule, item: Answered) -> float:
        [metric, *_] = rule.metrics([item], seed=0, quirks=True).values()
        return metric.value

    for entry in _entries(case, "exact_match"):
        assert value(ExactMatch(), _item(entry["answer"], gt_answers=entry["annotation"])) == entry["score"]
    for entry in _entries(case, "relaxed_correctness"):
        assert value(RelaxedAccuracy(), _item(entry["prediction"], gt_answers=entry["target"])) == entry["correct"]
    for entry in _entries(case, "vqa_score"):
        if len(entry["gts"]) > 1:  # one truth alone has no published score: nobody else agrees
            found = value(VqaAccuracy(), _item(entry["answer"], gt_answers=entry["gts"]))
            assert found == pytest.approx(entry["acc"], abs=TOLERANCE)
    for entry in _entries(case, "anls"):
        found = value(Anls(), _item(entry["answer"], gt_answers=entry["gts"]))
        assert found == pytest.approx(entry["score"], abs=TOLERANCE)
    for entry in _entries(case, "rec"):
        width, height = entry["w"], entry["h"]
        box = [corner / (height if i % 2 else width) for i, corner in enumerate(entry["gt_box"])]
        item = _item(entry["answer"], gt_box=box, question_id=f"height{height}_width{width}")
        assert value(BoxOverlap(), item) == entry["correct@0.5"]


@CASES
def test_mme_as_a_benchmark_gives_the_published_task_score(case: Path) -> None:
    for entry in _entries(case, "mme_metric"):
        items = [
            _item(label, picture=i // 2, gt_answers=truth.capitalize(), question_id=i, dataset_name="MME_count")
            for i, (truth, label) in enumerate(zip(entry["gts"], entry["preds"], strict=True))
        ]
        metrics = Mme({"perception": ["MME_count"]}).metrics(items, seed=0, quirks=len(items) <= 10)
        assert metrics["perception"].value == pytest.approx(entry["task_score"], abs=TOLERANCE)
        assert metrics["accuracy"].value == pytest.approx(entry["acc"], abs=TOLERANCE)
        assert metrics["accuracy_plus"].value == pytest.approx(entry["acc_plus"], abs=TOLERANCE)
