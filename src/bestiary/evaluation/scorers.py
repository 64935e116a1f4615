"""Scores of answers that speak of marked regions: pure functions on strings.

Answers name their regions line by line: `Region 1: cat`, `Mark 2: dog`, `<Region 3>: a red bus`. By default prediction
and truth are paired by mark number, a missing prediction is wrong and an extra one is ignored. The published scripts
pair by order, never punish what is missing and need a newline after the last line; `reference_quirks=True` scores as
they do (Draw-and-Understand @ 28a1bd1, accessory/eval/{Referring_Object_Classification,Regional_OCR,
Region_Level_Captioning}).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MARK_LINE = re.compile(r"[ \t]*<?(?:region|mark)[ \t]+(\d+)[ \t]*>?[ \t]*:(.*)", re.IGNORECASE)
_QUIRK_CAPTION = re.compile(r"Region \d+: (.*?)\n")
_QUIRK_OCR = re.compile(r"Region \d+: (?:.*?\((?P<inside>.*?)\)\n|(?P<whole>.*?)\n)")
_QUIRK_EMPTY = "BLANK"


@dataclass(frozen=True, slots=True)
class Pair:
    """One region's predicted and true text; `predicted` is None where the answer does not name the region."""

    mark: int
    predicted: str | None
    truth: str


def parse_marks(text: str) -> dict[int, str]:
    """Mark number -> text of every line that names one region, stripped; the first line of a mark counts.

    Lines of another form are ignored; brackets, letter case, spaces and a final newline do not matter.
    """
    marks: dict[int, str] = {}
    for line in text.split("\n"):
        if match := _MARK_LINE.fullmatch(line.rstrip()):
            marks.setdefault(int(match[1]), match[2].strip())
    return marks


def normalise(text: str) -> str:
    """Case-folded with single spaces: what an exact match compares."""
    return " ".join(text.casefold().split())


def is_exact(predicted: str | None, truth: str) -> bool:
    """Whether the prediction is the truth, but for letter case and spacing. None is always wrong."""
    return predicted is not None and normalise(predicted) == normalise(truth)


def label_words(label: str) -> str:
    """A category name as words: `mug_(drinking):handle` -> `mug (drinking) handle`."""
    return label.replace("_", " ").replace(":", " ")


def semantic_iou(predicted: str | None, truth: str) -> float:
    """Shared words over all words, case ignored; 1 for two empty texts, 0 for a missing prediction."""
    if predicted is None:
        return 0.0
    ours, true = set(predicted.lower().split()), set(truth.lower().split())
    union = ours | true
    return len(ours & true) / len(union) if union else 1.0


def label_pairs(prediction: str, answer: str, *, reference_quirks: bool = False) -> list[Pair]:
    """Predicted and true category of each region, for semantic similarity and semantic IoU.

    reference_quirks: the i-th line holding `: ` answers the i-th true one whatever its number, only text up to the
    next `: ` counts, regions left out are not pairs, and more predictions than truths are an error.
    """
    if not reference_quirks:
        ours = parse_marks(prediction)
        return [
            Pair(mark, label_words(ours[mark]) if mark in ours else None, label_words(truth))
            for mark, truth in parse_marks(answer).items()
        ]
    ours_list, truths = _after_colon(prediction.strip()), _after_colon(answer.strip())
    if len(ours_list) > len(truths):
        raise ValueError(
            f"{len(ours_list)} predicted regions but {len(truths)} true ones: the published script has no score for "
            "extra regions; score with reference_quirks=False, which ignores them"
        )
    pairs = zip(ours_list, truths, strict=False)
    return [Pair(i, ours_i, label_words(truth)) for i, (ours_i, truth) in enumerate(pairs, start=1)]


def mean_semantic_iou(pairs: Iterable[Pair]) -> float:
    """Mean over regions, not over pictures."""
    return mean([semantic_iou(pair.predicted, pair.truth) for pair in pairs])


def ocr_pairs(prediction: str, answer: str, *, reference_quirks: bool = False) -> list[Pair]:
    """Predicted and true string of each region.

    reference_quirks: only `Region n:` lines that end in a newline are read (append one to a generated answer), a line
    ending in parentheses stands for the text inside them, empty means BLANK, pairing is by order, and the counts must
    agree.
    """
    if not reference_quirks:
        ours = parse_marks(prediction)
        return [Pair(mark, ours.get(mark), truth) for mark, truth in parse_marks(answer).items()]
    found = [m["inside"] or m["whole"] or _QUIRK_EMPTY for m in _QUIRK_OCR.finditer(prediction)]
    truths = _after_colon(answer)
    if len(found) != len(truths):
        raise ValueError(
            f"{len(found)} regions read from {prediction!r} but {len(truths)} true ones: the published script demands "
            "equal counts; score with reference_quirks=False, which counts a missing region as wrong"
        )
    return [Pair(i, ours_i, truth) for i, (ours_i, truth) in enumerate(zip(found, truths, strict=True), start=1)]


def ocr_accuracy(pairs: Iterable[Pair], *, reference_quirks: bool = False) -> float:
    """Share of strings read exactly, letter case ignored (spacing too, but with `reference_quirks`)."""

    def is_read(pair: Pair) -> bool:
        if reference_quirks:
            return pair.predicted is not None and pair.predicted.lower() == pair.truth.lower()
        return is_exact(pair.predicted, pair.truth)

    return mean([float(is_read(pair)) for pair in pairs])


def captions(text: str, *, reference_quirks: bool = False) -> list[str]:
    """The description of every region named in an answer, in order of the lines.

    reference_quirks: only `Region n: ...` lines without brackets that end in a newline.
    """
    return _QUIRK_CAPTION.findall(text) if reference_quirks else list(parse_marks(text).values())


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing, so that an empty set never looks like a score."""
    return sum(values) / len(values) if values else float("nan")


def _after_colon(text: str) -> list[str]:
    """Of every line with `: ` the part after the first, up to the next."""
    return [line.split(": ")[1] for line in text.split("\n") if ": " in line]
