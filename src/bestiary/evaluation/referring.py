"""Referring expression comprehension: the box of the region a phrase describes, right from an overlap of one half on.

The box is read from the answer (evaluation/boxes.py), in fractions of the picture padded to a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.evaluation.boxes import Grounding, grounding
from bestiary.evaluation.questions import Answered, Question, mean_metric
from bestiary.evaluation.report import Metric
from bestiary.schema import SampleError
from bestiary.vision.geometry import Box, original_to_pixels, original_to_square, square_to_original


@dataclass(frozen=True)
class BoxOverlap:
    """Share of answers whose box overlaps the true one by `threshold` or more (RefCOCO, RefCOCO+, RefCOCOg).

    Quirks: the first bracket decides whatever it holds, an answer without four numbers is the box 0, 0, 0, 0.
    """

    threshold: float = 0.5

    def gold(self, question: Question) -> str:
        """The true box as models answer it: fractions of the padded square, three decimals."""
        box, size = _truth(question)
        return f"[{','.join(f'{value:.3f}' for value in original_to_square(box, *size))}]"

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        return float(self._grounding(question, answer, quirks).is_correct(self.threshold))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`accuracy`, and `mean_iou` with 0 for an answer without a box."""

        def overlap(question: Question, answer: str) -> float:
            iou = self._grounding(question, answer, quirks).iou
            return iou if iou == iou else 0.0  # NaN of two empty boxes

        return {
            "accuracy": mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed),
            "mean_iou": mean_metric(items, overlap, seed=seed),
        }

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """How many answers hold no box."""
        without = sum(self.answered_box(item.question, item.answer) is None for item in items)
        return [f"{without} of {len(items)} answers hold no box"] if without else []

    def answered_box(self, question: Question, answer: str) -> Box | None:
        """The answer's box in fractions of the original picture, None without one; it may lie on the pad."""
        predicted = self._grounding(question, answer, quirks=False).predicted
        if predicted is None:
            return None
        x0, y0, x1, y1 = square_to_original(predicted, *_truth(question)[1])
        return x0, y0, x1, y1

    def _grounding(self, question: Question, answer: str, quirks: bool) -> Grounding:
        box, size = _truth(question)
        return grounding(answer, original_to_pixels(box, *size), *size, reference_quirks=quirks)


def _truth(question: Question) -> tuple[Box, tuple[int, int]]:
    if question.box is None or question.size is None:
        raise SampleError(
            question.sample.key, "has no gt_box in its meta; give samples whose truth is a box, or another rule"
        )
    return question.box, question.size
