"""Boxes and points in answers: reading them, taking them to pixels, scoring them.

A model of the SPHINX family answers `<p>two dogs</p> [0.11,0.22,0.33,0.44;0.5,0.6,0.7,0.8]` or a bare `[0.51,0.2]`:
fractions of the image padded to a square (the frame `square` of vision/geometry.py), boxes as x0, y0, x1, y1, points as
x, y, several in one bracket separated by `;`. By default any number is read and a bracket that holds neither boxes nor
points is text. `reference_quirks=True` reads and scores as the published demo and evaluation do (LLaMA2-Accessory @
3777c43, accessory/demos/multi_turn_mm_box.py, accessory/eval_mm/evaluate.py).
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestiary.vision.geometry import Box, original_to_pixels, square_of, square_to_original

COLOURS = ("red", "blue", "green", "purple", "orange")
"""Of the published demo, in turn."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_LIST = rf"\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*"
_MENTION = re.compile(rf"(?:<p>(?P<name>[^<>]*)</p>\s*)?\[(?P<places>{_LIST}(?:;{_LIST})*)\]")

_QUIRK_PLACES = r"(\[[\d.,;\s]*\])"
_SEAM = "|||"
"""The demo's mark between a phrase and its bracket: such a bracket is not read a second time."""
_QUIRK_NAMED = re.compile(rf"<p>(.*?)</p>\s*{_QUIRK_PLACES}")
_QUIRK_BARE = re.compile(rf"(?<!{re.escape(_SEAM)}){_QUIRK_PLACES}")
_QUIRK_DECIMAL = re.compile(r"\d+\.\d+")
_QUIRK_BRACKET = re.compile(r"\[(.*?)\]")
_NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Mention:
    """One bracket of an answer.

    name: the phrase before it, "" for a bare one. places: (x, y) or (x0, y0, x1, y1) in fractions of the padded square.
    colour: a name that HTML and Pillow know.
    """

    name: str
    places: tuple[tuple[float, ...], ...]
    colour: str

    def pixels(self, width: int, height: int) -> tuple[tuple[float, ...], ...]:
        """The places in pixels of the `width` x `height` image; they may lie outside it, on the pad."""
        return tuple(square_to_pixels(place, width, height) for place in self.places)


def mentions(answer: str, *, reference_quirks: bool = False) -> list[Mention]:
    """Every bracket of boxes or points, in reading order.

    reference_quirks: numbers count only with a decimal point (so `[1,0,0.5,0.25]` is the point 0.5, 0.25) and in any
    amount, phrases come before bare brackets and each of these from last to first.
    """
    return mark_up(answer, reference_quirks=reference_quirks)[0]


def mark_up(answer: str, *, reference_quirks: bool = False) -> tuple[list[Mention], str]:
    """The mentions, and the answer as HTML with every mention in its colour.

    reference_quirks: what the answer holds besides is not escaped, and all bare brackets share one colour.
    """
    if reference_quirks:
        return _quirk_mark_up(answer)
    found: list[Mention] = []
    pieces: list[str] = []
    end = 0
    for match in _MENTION.finditer(answer):
        places = tuple(tuple(float(x) for x in part.split(",")) for part in match["places"].split(";"))
        if any(len(place) not in (2, 4) for place in places):
            continue
        mention = Mention((match["name"] or "").strip(), places, COLOURS[len(found) % len(COLOURS)])
        text = html.escape(f"{mention.name} [{match['places']}]".lstrip())
        pieces += [html.escape(answer[end : match.start()]), _span(mention.colour, text)]
        found.append(mention)
        end = match.end()
    return found, "".join([*pieces, html.escape(answer[end:])])


def box_of(answer: str) -> Box:
    """The first box of an answer that was asked for one, in fractions of the padded square; ValueError without one."""
    if (box := _first_box(answer)) is not None:
        return box
    shown = answer if len(answer) <= 80 else f"{answer[:77]}..."
    raise ValueError(f"no box in the answer {shown!r}; a box is four numbers in brackets, as in [0.1,0.2,0.3,0.4]")


def square_to_pixels(coords: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Fractions (x, y, x, y, ...) of the padded square in pixels of the original image."""
    return original_to_pixels(square_to_original(coords, width, height), width, height)


# Referring expressions: "where is the red car?"


@dataclass(frozen=True, slots=True)
class Grounding:
    """What was answered to a referring expression, beside the truth.

    predicted: fractions of the padded square; None where the answer holds no box. truth: pixels of the padded square.
    iou: intersection over union; 0 without a prediction.
    """

    predicted: Box | None
    truth: Box
    iou: float

    def is_correct(self, threshold: float = 0.5) -> bool:
        """Whether the boxes overlap enough: RefCOCO's rule."""
        return self.iou >= threshold


def grounding(
    answer: str, truth_px: Sequence[float], width: int, height: int, *, reference_quirks: bool = False
) -> Grounding:
    """Scores the box in an answer. truth_px: x0, y0, x1, y1 in pixels of the `width` x `height` image.

    reference_quirks: the first bracket decides whatever it holds, the opening bracket may be missing, an answer without
    four numbers is the box 0, 0, 0, 0, and arithmetic is in 32 bits (NaN where both boxes are empty).
    """
    side, pad_x, pad_y = square_of(width, height)
    x0, y0, x1, y1 = truth_px
    truth = (x0 + pad_x, y0 + pad_y, x1 + pad_x, y1 + pad_y)
    predicted = _quirk_first_box(answer) if reference_quirks else _first_box(answer)
    if predicted is None:
        return Grounding(None, truth, 0.0)
    number = np.float32 if reference_quirks else np.float64
    overlap = _iou(np.array(predicted, number) * side, np.array(truth, number))
    return Grounding(predicted, truth, overlap if reference_quirks or overlap == overlap else 0.0)


def _first_box(answer: str) -> Box | None:
    """The first place of four numbers in reading order."""
    for mention in mentions(answer):
        for place in mention.places:
            if len(place) == 4:
                return place
    return None


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boxes x0, y0, x1, y1 in the precision of the arrays; NaN where the union is empty."""
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(inner / union)


# The published reading


def _quirk_mark_up(answer: str) -> tuple[list[Mention], str]:
    named = list(_QUIRK_NAMED.finditer(answer))
    colours = [COLOURS[rank % len(COLOURS)] for rank in range(len(named) + 1)]
    found = [Mention(m[1], _quirk_places(m[2]), colour) for m, colour in zip(reversed(named), colours, strict=False)]
    turns = iter(colours[-2::-1])
    marked = _QUIRK_NAMED.sub(lambda m: _span(next(turns), f"{m[1]}{_SEAM}{m[2]}"), answer)
    bare = list(_QUIRK_BARE.finditer(marked))
    found += [Mention("", _quirk_places(m[1]), colours[-1]) for m in reversed(bare)]
    marked = _QUIRK_BARE.sub(lambda m: _span(colours[-1], m[1]), marked)
    return found, marked.replace(f"{_SEAM}[", "[")


def _quirk_places(bracket: str) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in _QUIRK_DECIMAL.findall(part)) for part in bracket.split(";"))


def _quirk_first_box(answer: str) -> Box:
    bracket = _QUIRK_BRACKET.search(answer)
    numbers = (bracket[1] if bracket else answer.partition("]")[0]).split(",")
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers)
    except ValueError:  # not four, or not numbers
        return _NO_BOX
    return x0, y0, x1, y1


def _span(colour: str, text: str) -> str:
    return f'<span style="color:{colour}">{text}</span>'
