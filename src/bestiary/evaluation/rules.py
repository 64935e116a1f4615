"""Rules that score one text answer at a time: exact, several people's, relaxed, edit distance, multiple choice.

Each is named by a benchmark's `rule` node. `quirks` scores as SPHINX's published evaluation does (LLaMA2-Accessory @
3777c43, accessory/eval_mm).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.evaluation.questions import Answered, Question, mean_metric
from bestiary.evaluation.report import Metric
from bestiary.evaluation.short_answers import (
    RelativeTo,
    Spacing,
    anls,
    contains,
    exact_match,
    gqa_words,
    relaxed_match,
    vqa_score,
    vqa_text,
)
from bestiary.schema import SampleError

LETTERS = "ABCDE"
"""Choices of the published evaluation."""
_CHOICE = re.compile(r"^\(?([A-Z])[).:](.*)$", re.MULTILINE)
_LETTER = re.compile(r"(?:the )?(?:answer|option|choice)?(?: is)?:?\s*\(?([A-Z])(?:[).:,]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True)
class ExactMatch:
    """The whole answer is one of the truths, but for letter case, spacing and a final period (GQA, OCR-VQA, VSR).

    Quirks: all periods are dropped; where the truth is a letter A-E the answer is what stands before its first period,
    and one that is no such letter becomes a random one (drawn by the question's key, so it is the same every time). The
    published clean-up of GQA's answers comes after they were scored, so there is nothing of it to do.
    """

    def gold(self, question: Question) -> str:
        """The first truth."""
        return _first(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        if not quirks:
            return float(any(exact_match(answer, truth) for truth in question.truths))
        truth = _first(question)
        if truth in LETTERS:
            answer = published_choice(answer, question.sample.key)
        return float(exact_match(answer, truth, reference_quirks=True))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`accuracy`."""
        return {"accuracy": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True)
class MultipleChoice:
    """The letter of the right choice (ScienceQA, Q-Bench, MMMU), or its text where truths are texts (AI2D).

    A letter is read from `B`, `(B)`, `B. Low`, `The answer is B`, or from the text of one of the choices that the
    question lists as `B. Low`. What names no choice is wrong, and counted in the notes. Quirks: as `ExactMatch`.
    """

    def gold(self, question: Question) -> str:
        """The first truth."""
        return _first(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        truth = _first(question)
        if quirks or not _is_letter(truth):
            return ExactMatch().score(question, answer, quirks=quirks)
        return float(choice_letter(answer, question.text) == truth)

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`accuracy`."""
        return {"accuracy": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """How many answers named no choice."""
        lettered = [item for item in items if _is_letter(_first(item.question))]
        unread = sum(choice_letter(item.answer, item.question.text) is None for item in lettered)
        return [f"{unread} of {len(lettered)} answers name no choice"] if unread else []


@dataclass(frozen=True)
class VqaAccuracy:
    """The soft score of VQA: three of the people who were asked agree (VQAv2, OK-VQA, TextVQA, VizWiz).

    It needs the answers of several people. With one truth alone it is equality after VQA's normalisation, and a note
    says so.
    """

    def gold(self, question: Question) -> str:
        """The answer that scores most."""
        _first(question)
        return max(question.truths, key=lambda truth: self.score(question, truth, quirks=False))

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """The mean over the people of min(1, others who said so / 3)."""
        if len(question.truths) == 1:
            return float(vqa_text(answer) == vqa_text(question.truths[0]))
        return vqa_score(answer, question.truths, reference_quirks=quirks)

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`vqa_accuracy`."""
        return {"vqa_accuracy": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """Whether there was but one truth."""
        return _single_truths(items, "VQA accuracy, which asks several people")


@dataclass(frozen=True)
class RelaxedAccuracy:
    """A number within `tolerance` of a truth, or the same text but for letter case (ChartQA). Quirks: none.

    relative_to: of what the tolerance is a share, "truth" or "answer" (see `relaxed_match`).
    """

    tolerance: float = 0.05
    relative_to: RelativeTo = "truth"

    def gold(self, question: Question) -> str:
        """The first truth."""
        return _first(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        return float(relaxed_match(answer, question.truths, tolerance=self.tolerance, relative_to=self.relative_to))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`relaxed_accuracy`."""
        return {"relaxed_accuracy": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True)
class Containment:
    """A truth is part of the answer, which loses its periods first (`accuracy` of Monkey's evaluation). Quirks: none.

    It is generous: `cat` is in `concatenate`, and a number in a longer one. `ExactMatch` is the honest rule beside it.
    reduced: the answer is cut down first as Monkey's evaluation does for GQA (`gqa_words`).
    """

    reduced: bool = False

    def gold(self, question: Question) -> str:
        """The first truth."""
        return _first(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        said = gqa_words(answer) if self.reduced else answer
        return float(any(contains(said, truth) for truth in question.truths))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`containment`."""
        return {"containment": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """How many truths hold a period, so that no answer contains them."""
        lost = sum(all("." in truth.strip() for truth in item.question.truths) for item in items)
        return (
            [f"{lost} of {len(items)} questions have truths with a period alone, which no answer contains"]
            if lost
            else []
        )


@dataclass(frozen=True)
class Anls:
    """Average normalised Levenshtein similarity to the nearest truth, 0 below `threshold` (DocVQA). Quirks: none.

    spacing: see `short_answers.anls`.
    """

    threshold: float = 0.5
    spacing: Spacing = "loose"

    def gold(self, question: Question) -> str:
        """The first truth."""
        return _first(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """In [threshold, 1], or 0."""
        return anls(answer, question.truths, threshold=self.threshold, spacing=self.spacing)

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`anls`."""
        return {"anls": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """Whether there was but one truth."""
        return _single_truths(items, "ANLS over all true answers")


def choice_letter(answer: str, question: str) -> str | None:
    """The letter of the choice an answer names, None where it names none."""
    said = answer.strip()
    if match := _LETTER.match(said):
        return match[1].upper()
    for letter, text in _CHOICE.findall(question):
        if text.strip() and exact_match(said, text):
            return str(letter)
    return None


def published_choice(answer: str, key: str) -> str:
    """The published evaluation's choice: before the first period, else at random; `key` decides the draw."""
    said = answer.split(".")[0].strip()
    return said if said and said in LETTERS else random.Random(key).choice(LETTERS)


def _is_letter(truth: str) -> bool:
    return len(truth) == 1 and truth.isupper()


def _first(question: Question) -> str:
    if not question.truths:
        raise SampleError(question.sample.key, "has an empty list of gt_answers; a question needs a true answer")
    return question.truths[0]


def _single_truths(items: Sequence[Answered], what: str) -> list[str]:
    alone = sum(len(item.question.truths) == 1 for item in items)
    if not alone:
        return []
    return [f"{alone} of {len(items)} questions have one true answer: not {what}; set answers_file"]
