"""Embedded pictures with everything markable in them, as arrays: what encoders and the prompt path are fitted on."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_modules.embedded.generate import DOMAINS, scene
from data_modules.embedded.scene import STRING_LETTERS

PAD = (122, 116, 104)
"""Colour around a picture that is not square (reference/sphinx_v.md 3.2)."""
MOST = 8
"""Things of a picture that are kept."""
LENGTH = 3
"""Characters of a printed string."""
NONE, TEXT = -2, -1
"""In `Pictures.names`: no thing here; a printed string."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """N pictures on the square canvas.

    pixels: uint8[N, S, S, 3]. boxes: float32[N, MOST, 4], fractions of the square. names: int64[N, MOST], index into
    `vocabulary`, TEXT or NONE. letters: int64[N, MOST, LENGTH], index into STRING_LETTERS, -100 where no string is.
    domains: int64[N], index into DOMAINS. vocabulary: all names, sorted.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    names: np.ndarray
    letters: np.ndarray
    domains: np.ndarray
    vocabulary: tuple[str, ...]

    @property
    def counts(self) -> np.ndarray:
        """Things in each picture, int64[N]."""
        return np.asarray((self.names != NONE).sum(axis=1))


def square(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int, int]]:
    """The picture in the middle of a padded square of `side` px, and (longer side, left pad, top pad) in its pixels."""
    width, height = image.size
    long = max(width, height)
    left, top = (long - width) // 2, (long - height) // 2
    canvas = Image.new("RGB", (long, long), PAD)
    canvas.paste(image, (left, top))
    return canvas.resize((side, side), Image.Resampling.BICUBIC), (long, left, top)


def _chunk(job: tuple[int, int, int, str, int]) -> tuple[np.ndarray, np.ndarray, list[list[tuple[str, str]]]]:
    seed, first, last, split, side = job
    pixels = np.zeros((last - first, side, side, 3), np.uint8)
    boxes = np.zeros((last - first, MOST, 4), np.float32)
    told = []
    for row, index in enumerate(range(first, last)):
        picture = scene(DOMAINS[index % len(DOMAINS)], seed, index, split)  # type: ignore[arg-type]
        canvas, (long, left, top) = square(picture.image, side)
        pixels[row] = np.asarray(canvas)
        things = picture.things[:MOST]
        for column, thing in enumerate(things):
            boxes[row, column] = (np.array(thing.box) + np.array([left, top, left, top])) / long
        told.append([(thing.kind, thing.label) for thing in things])
    return pixels, boxes, told


def make_pictures(
    count: int, *, seed: int, split: str, side: int, vocabulary: tuple[str, ...] | None = None, processes: int = 2
) -> Pictures:
    """`count` pictures, the domains in turn; `vocabulary` None takes the names that occur."""
    jobs = [(seed, first, min(count, first + 250), split, side) for first in range(0, count, 250)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.map(_chunk, jobs, chunksize=1)
    told = [row for part in parts for row in part[2]]
    found = sorted({label for row in told for kind, label in row if kind != "text"})
    vocabulary = tuple(found) if vocabulary is None else vocabulary
    index = {name: i for i, name in enumerate(vocabulary)}
    names = np.full((count, MOST), NONE, np.int64)
    letters = np.full((count, MOST, LENGTH), -100, np.int64)
    for i, row in enumerate(told):
        for j, (kind, label) in enumerate(row):
            names[i, j] = TEXT if kind == "text" else index[label]
            if kind == "text":
                letters[i, j] = [STRING_LETTERS.index(c) for c in label]
    pixels, boxes = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    return Pictures(pixels, boxes, names, letters, np.arange(count) % len(DOMAINS), vocabulary)


def cached(folder: Path, name: str, count: int, *, seed: int, split: str, side: int) -> Pictures:
    """`make_pictures`, kept in a file of `folder`; delete the folder after a change of the generators."""
    path = folder / f"{name}-{split}-{seed}-{count}-{side}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = make_pictures(count, seed=seed, split=split, side=side)
        np.savez(path, pixels=made.pixels, boxes=made.boxes, names=made.names, letters=made.letters,
                 domains=made.domains, vocabulary=np.array(made.vocabulary))  # fmt: skip
    with np.load(path) as file:
        return Pictures(*(file[k] for k in ("pixels", "boxes", "names", "letters", "domains")),
                        vocabulary=tuple(str(name) for name in file["vocabulary"]))  # fmt: skip
