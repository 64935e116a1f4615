"""What a question benchmark asks, what was answered, and what a rule of scoring is.

Held-out samples are one exchange each: a bare question (or a phrase to locate) and the answer, with the facts that the
`benchmark` adapter keeps in `meta`: `gt_answers`, `gt_box`, `question_id`, `dataset_name`, `image_path`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bestiary.evaluation.asking import first_exchange
from bestiary.evaluation.report import Metric, Score, metric_of
from bestiary.schema import Sample, SampleError
from bestiary.vision.geometry import Box
from bestiary.vision.image import image_size

GROUPS = ("domain", "category")
"""What scores of questions are broken down by."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark.

    text: without the benchmark's instruction. truths: every answer that counts. box: the true place in fractions of the
    original picture, None where the truth is text. size: width and height of that picture in pixels, where there is a
    box. picture: its number; questions about one picture share it, a question without a picture has its own.
    """

    sample: Sample
    text: str
    truths: tuple[str, ...]
    box: Box | None
    size: tuple[int, int] | None
    picture: int
    groups: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with what the model said, and what it said of another picture (None without one)."""

    question: Question
    answer: str
    control: str | None


class Rule(Protocol):
    """How answers are scored. `quirks`: as the published evaluation scores, where that differs."""

    def gold(self, question: Question) -> str:
        """The answer that scores best; SampleError where the sample holds no truth of this kind."""

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """The score of one answer, in [0, 1]."""

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """The scores of the set; the first is the one to quote."""

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """What a reader of the scores must know about these questions and answers."""


def mean_metric(items: Sequence[Answered], score: Callable[[Question, str], float], *, seed: int) -> Metric:
    """The mean of one score over all answers, beside their controls, by domain and category."""
    scores = [
        Score(
            item.question.picture,
            score(item.question, item.answer),
            None if item.control is None else score(item.question, item.control),
            item.question.groups,
        )
        for item in items
    ]
    return metric_of(scores, seed=seed, groups=GROUPS)


def question_of(
    sample: Sample, picture: int, *, category: str, truths: Mapping[str, tuple[str, ...]] | None = None
) -> Question:
    """The question a held-out sample asks.

    category: the field of `meta` that scores are broken down by; samples without it have no category. truths: answers
    by `question_id`, instead of the sample's own.
    """
    text, answer = first_exchange(sample)
    box = _box(sample)
    groups = {"domain": sample.domain}
    if (value := sample.meta.get(category)) is not None:
        groups["category"] = str(value)
    return Question(
        sample=sample,
        text=text,
        truths=_own_truths(sample, answer) if truths is None else _looked_up(sample, truths),
        box=box,
        size=None if box is None else _size(sample),
        picture=picture,
        groups=groups,
    )


def picture_name(sample: Sample) -> str | None:
    """What two samples with one picture share; None without a picture."""
    name = sample.meta.get("image_path")
    if isinstance(name, str):
        return name
    return hashlib.sha256(sample.images[0]).hexdigest() if sample.images else None


def numbered(names: Iterable[str | None]) -> list[int]:
    """Numbers for pictures, from 0; equal names share one, None never does."""
    known: dict[Any, int] = {}
    return [known.setdefault(place if name is None else name, len(known)) for place, name in enumerate(names)]


def read_truths(path: Path) -> dict[str, tuple[str, ...]]:
    """All people's answers by question id, from VQA's form of annotations or DocVQA's.

    VQA (VQAv2, OK-VQA, TextVQA, VizWiz): `annotations` of `question_id` and `answers` of `answer`. DocVQA: `data` of
    `questionId` and `answers`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" in found:
            return {str(e["question_id"]): tuple(a["answer"] for a in e["answers"]) for e in found["annotations"]}
        return {str(e["questionId"]): tuple(map(str, e["answers"])) for e in found["data"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"answers_file {path} does not exist; put the set's official answers there") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"answers_file {path} is neither VQA's nor DocVQA's form of answers ({type(error).__name__}: {error})"
        ) from error


def _own_truths(sample: Sample, answer: str) -> tuple[str, ...]:
    given = sample.meta.get("gt_answers", answer)
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        return tuple(given)
    return (answer,) if isinstance(given, list) else (str(given),)


def _looked_up(sample: Sample, truths: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    name = str(sample.meta.get("question_id"))
    if name not in truths:
        raise SampleError(sample.key, f"has question_id {name}, which answers_file lacks; is it of the same split?")
    return truths[name]


def _box(sample: Sample) -> Box | None:
    given = sample.meta.get("gt_box")
    if given is None:
        return None
    if not isinstance(given, list | tuple) or len(given) != 4 or not all(isinstance(c, int | float) for c in given):
        raise SampleError(sample.key, f"has gt_box {given!r:.60}; it is x0, y0, x1, y1 in fractions of the picture")
    x0, y0, x1, y1 = map(float, given)
    return x0, y0, x1, y1


def _size(sample: Sample) -> tuple[int, int]:
    """Width and height of the picture; of questions written without theirs, what the adapter kept."""
    if sample.images:
        try:
            return image_size(sample.images[0])
        except ValueError as error:
            raise SampleError(sample.key, f"cannot read its picture: {error}") from error
    name = str(sample.meta.get("question_id"))
    height, _, width = name.removeprefix("height").partition("_width")
    if not (height.isdecimal() and width.isdecimal()):
        raise SampleError(sample.key, f"has a box but neither a picture nor its size; question_id is {name!r}")
    return int(width), int(height)
