"""Monkey's published scoring of answers: what it gave on its inputs, ours gives too."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bestiary.evaluation.scorers import mean
from bestiary.evaluation.short_answers import (
    _without_punctuation,
    anls,
    contains,
    gqa_words,
    relaxed_match,
    vqa_score,
    vqa_text,
)
from tests.parity.cases import cases, has, read_json

CASES = pytest.mark.parametrize("case", cases("monkey", has("metrics.json")))
TOLERANCE = 1e-9


def _truths(entry: dict[str, Any]) -> list[str]:
    """A bare string is one truth."""
    given = entry["annotation"]
    return [given] if isinstance(given, str) else given


@CASES
def test_anls_relaxed_accuracy_and_containment_are_the_published_ones(case: Path) -> None:
    golden = read_json(case / "metrics.json")
    rules = {
        "anls": lambda e: anls(e["answer"], _truths(e), spacing="kept"),
        "relaxed_accuracy": lambda e: float(relaxed_match(e["answer"], _truths(e), relative_to="answer")),
        "accuracy": lambda e: float(any(contains(e["answer"], truth) for truth in _truths(e))),
    }
    for name, score in rules.items():
        told = golden[name]
        assert mean(told["per_item"]) == pytest.approx(told["score"], abs=TOLERANCE), name
        for entry, expected in zip(told["entries"], told["per_item"], strict=True):
            assert score(entry) == pytest.approx(expected, abs=TOLERANCE), (name, entry)


@CASES
def test_answers_to_gqa_are_reduced_as_published(case: Path) -> None:
    for told in read_json(case / "metrics.json")["gqa_normalise"]:
        assert gqa_words(told["answer"]) == told["normalised"], told


@CASES
def test_texts_of_vqa_are_normalised_as_published(case: Path) -> None:
    for told in read_json(case / "metrics.json")["vqa_text_processing"]:
        assert _without_punctuation(told["text"]) == told["punctuation"], told
        assert vqa_text(told["text"]) == told["digit_article"], told


@CASES
def test_vqa_scores_are_the_published_ones(case: Path) -> None:
    golden = read_json(case / "metrics.json")["vqa_score"]
    answers = {told["question_id"]: told["answer"] for told in golden["predictions"]}
    kinds: dict[str, dict[str, list[float]]] = {
        "perQuestionType": defaultdict(list),
        "perAnswerType": defaultdict(list),
    }
    scores: dict[str, float] = {}
    for told in golden["annotations"]:
        texts = [one["answer"] for one in told["answers"]]
        people = [sorted((k, v) for k, v in one.items() if k != "answer") for one in told["answers"]]
        score = vqa_score(answers[told["question_id"]], texts, reference_quirks=True, people=people)
        scores[str(told["question_id"])] = score
        kinds["perQuestionType"][told["question_type"]].append(score)
        kinds["perAnswerType"][told["answer_type"]].append(score)
    found = {str(k): v for k, v in golden["per_question"].items()}
    assert {k: round(100 * v, 2) for k, v in scores.items()} == pytest.approx(found, abs=TOLERANCE)
    assert round(100 * mean(list(scores.values())), 2) == golden["accuracy"]["overall"]
    for name, groups in kinds.items():
        assert {k: round(100 * mean(v), 2) for k, v in groups.items()} == golden["accuracy"][name]
