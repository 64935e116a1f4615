"""The words of description generation: what an expert takes and what it says.

Every array of a picture is RGB, uint8, [H, W, 3]. Every box of a Described is [x1, y1, x2, y2] as shares of width and
height, rounded to three decimals (Monkey's data_generation scripts); a Mask speaks in pixels.
An expert decides nothing about files, caching or order: it is called with decoded pictures by the engine, in one
process and from one thread at a time. It raises ValueError with one line for a picture it cannot take, ExpertError
where no picture would go well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Box = tuple[float, float, float, float]

# Boxes and scores are written with three decimals.
# Source: data_generation/ grit_generate.py, sam_blip.py, ocr_ppocr.py, image_text_matching.py.
DECIMALS = 3


@dataclass(frozen=True, slots=True)
class Described:
    """A caption (or a read text) of one place of a picture; score is None as long as nobody has judged it."""

    caption: str
    box: Box
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """One segment: pixels is bool [H, W] with H and W of the picture, and holds at least one True."""

    pixels: np.ndarray

    @property
    def area(self) -> int:
        """Number of pixels of the segment."""
        return int(self.pixels.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Smallest [x1, y1, x2, y2] around the segment in pixels, x2 and y2 exclusive; ValueError when it is empty."""
        columns, rows = np.flatnonzero(self.pixels.any(axis=0)), np.flatnonzero(self.pixels.any(axis=1))
        if not len(columns):
            raise ValueError(f"a mask of {self.pixels.shape} holds no pixel: drop empty segments")
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Expert(Protocol):
    """What every expert has beside its call."""

    @property
    def name(self) -> str:
        """Short name for messages and tables, such as 'blip2'."""

    @property
    def fingerprint(self) -> str:
        """Model and settings in one line: equal fingerprints mean equal answers; part of the key of the cache."""


class Captioner(Expert, Protocol):
    """Says what whole pictures (or crops of them) show."""

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """One caption a picture, in order."""


class Matcher(Expert, Protocol):
    """Judges how well a caption fits a crop."""

    def __call__(self, crops: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """The probability that caption i describes crop i, unrounded (softmax of the matching head, class 1)."""


class RegionCaptioner(Expert, Protocol):
    """Finds places of a picture and says what each shows."""

    def __call__(self, picture: np.ndarray) -> list[Described]:
        """The described places, without scores."""


class MaskMaker(Expert, Protocol):
    """Cuts a picture into segments."""

    def __call__(self, picture: np.ndarray) -> list[Mask]:
        """All segments in any order; the engine takes the largest."""


class TextReader(Expert, Protocol):
    """Reads the texts of a picture."""

    def __call__(self, picture: np.ndarray) -> list[Described]:
        """The texts with their boxes and the recogniser's confidence as score; none for a picture without text."""


class Summariser(Expert, Protocol):
    """Writes one detailed caption from everything the experts said."""

    def __call__(self, prompt: str) -> str:
        """The answer, stripped; may be called from several threads.

        Raises SummaryError when none can be had now, ValueError when there never will be one for this prompt.
        """


class ExpertError(ValueError):
    """The expert itself cannot work, whatever the picture (its weights cannot be opened): the run ends; one line."""


class SummaryError(Exception):
    """No summary now (endpoint down, rate limit, useless answer): the picture stays pending for the next run."""


def share_box(box: Sequence[float], width: int, height: int) -> Box:
    """A pixel box [x1, y1, x2, y2] as shares of width and height, rounded as the published files are."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return (
        round(x1 / width, DECIMALS),
        round(y1 / height, DECIMALS),
        round(x2 / width, DECIMALS),
        round(y2 / height, DECIMALS),
    )
