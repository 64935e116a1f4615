"""Small experts and pictures for tests: they see colours, and count what they are asked."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bestiary.description.cache import Cache
from bestiary.description.engine import Engine, Summaries
from bestiary.description.filters import Overlap
from bestiary.description.levels import Describer, Experts
from bestiary.description.tally import Tally
from bestiary.description.words import Described, Mask, SummaryError

CALLS: Counter[str] = Counter()
"""By expert, of the test that runs; see `fresh`."""


def png(red: int, size: tuple[int, int] = (24, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 60, 60)).save(file, "PNG")
    return file.getvalue()


class File:
    """A picture in memory; bytes None: it cannot be read."""

    def __init__(self, name: str, data: bytes | None) -> None:
        self.key = self.name = name
        self._data = data

    def read(self) -> bytes:
        if self._data is None:
            raise OSError(f"{self.name}: no such file")
        return self._data


class Colours:
    """Captioner: says the mean of red."""

    def __init__(self, name: str = "colours") -> None:
        self.name = self.fingerprint = name

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        CALLS[self.name] += len(pictures)
        return [f"red {picture[..., 0].mean():.0f}" for picture in pictures]


class Halves:
    """Region captioner: left and right."""

    name = fingerprint = "halves"

    def __call__(self, picture: np.ndarray) -> list[Described]:
        CALLS[self.name] += 1
        return [Described("left", (0.0, 0.0, 0.5, 1.0)), Described("right", (0.5, 0.0, 1.0, 1.0))]


class Stripes:
    """Mask maker: columns, each wider than the one before, more than are looked at."""

    name = fingerprint = "stripes"

    def __call__(self, picture: np.ndarray) -> list[Mask]:
        CALLS[self.name] += 1
        masks = []
        for number in range(1, 24):
            pixels = np.zeros(picture.shape[:2], bool)
            pixels[:, :number] = True
            masks.append(Mask(pixels))
        return masks


class Widths:
    """Matcher: the wider a crop, the better; at half the picture's width 0.5 exactly."""

    name = fingerprint = "widths"

    def __call__(self, crops: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        CALLS[self.name] += len(crops)
        return [crop.shape[1] / 24 for crop in crops]


class Letters:
    """Text reader: one text in red pictures, none in others; refuses very red ones."""

    name = fingerprint = "letters"

    def __call__(self, picture: np.ndarray) -> list[Described]:
        CALLS[self.name] += 1
        red = int(picture[0, 0, 0])
        if red > 250:
            raise ValueError(f"too red: {red}")
        return [Described(f"R{red}", (0.1, 0.1, 0.2, 0.2), 0.9)] if red > 99 else []


class Writer:
    """Summariser. down: how many calls fail first. says: what it says instead of the prompt's length."""

    name = fingerprint = "writer"

    def __init__(self, down: int = 0, says: str = "") -> None:
        self.down, self.says = down, says

    def __call__(self, prompt: str) -> str:
        CALLS[self.name] += 1
        if CALLS[self.name] <= self.down:
            raise SummaryError("the writer is away")
        return self.says or f"About {len(prompt)} letters."


def all_experts() -> Experts:
    return Experts(Colours(), Halves(), Stripes(), Colours("pieces"), Widths(), Letters())


def engine(
    folder: Path,
    experts: Experts,
    *,
    writer: Writer | None = None,
    allowed: int = 0,
    workers: int = 2,
    overlap: Overlap = "exact",
) -> Engine:
    """An engine with the cache in `folder`; CALLS begin at 0."""
    CALLS.clear()
    cache = Cache(folder)
    summaries = None if writer is None else Summaries(writer, cache)
    tally = Tally(allowed)
    return Engine(lambda: Describer(experts, cache), summaries, tally, overlap, workers=workers, requests=2)
