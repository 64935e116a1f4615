"""Pictures at the size of one window for the base of Monkey's demo, with the word that every quarter shows.

Words have the sizes in which windows and the whole view of the demo's pictures show them: drawn up to three times as
large and made smaller, sideways more than upwards, with and without antialias.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_modules.embedded.assets import WORDS
from data_modules.embedded.generate import DOMAINS
from data_modules.embedded.scene import PxBox, draw_labels
from data_modules.embedded.small_text import draw

from .monkey_pages import NOTHING, SIDE_PX

HEIGHT_PX = (6.5, 15.0)
"""Of capitals in the finished picture."""
QUARTERS = 4
_CHUNK = 250


@dataclass(frozen=True, slots=True)
class WindowPictures:
    """pixels: uint8[N, 3, 64, 64]; quarters: int64[N, 4], the number of a word or NOTHING."""

    pixels: torch.Tensor
    quarters: torch.Tensor


def make(count: int, *, seed: int, processes: int = 2) -> WindowPictures:
    """Training pictures; the same for any number of processes."""
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(partial(_chunk, count=count, seed=seed), starts)
        made = list(chain.from_iterable(parts))
    pixels, quarters = (torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True))
    return WindowPictures(pixels, quarters)


def _chunk(start: int, *, count: int, seed: int) -> list[tuple[np.ndarray, ...]]:
    torch.set_num_threads(1)
    return [_one(Random(f"monkey-base/{seed}/{n}")) for n in range(start, min(start + _CHUNK, count))]


def _one(rng: Random) -> tuple[np.ndarray, ...]:
    down = rng.uniform(1, 2)
    sideways = min(3.0, down * rng.uniform(1, 1.6))
    size = round(SIDE_PX * sideways), round(SIDE_PX * down)
    rooms = _rooms(rng, *size)
    words = draw_labels(rng, [WORDS] * len(rooms), "train")
    heights = [rng.choice((rng.uniform(6.5, 9), rng.uniform(*HEIGHT_PX))) * down for _ in rooms]
    image, boxes = draw(rng, rng.choice(DOMAINS[:3]), "train", size, words, heights, [(room, ()) for room in rooms])
    scaled = [tuple(v / (down if i % 2 else sideways) for i, v in enumerate(box)) for box in boxes]
    numbers = [WORDS.index(word) for word in words]
    return _pixels(image, rng.random() < 0.5), _quarters(scaled, numbers)


def _rooms(rng: Random, width: int, height: int) -> list[PxBox]:
    """Where words may stand: in quarters, in halves above one another, or one anywhere."""
    form = rng.random()
    if form < 0.5:
        x, y = width / 2, height / 2
        rooms = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        return [rooms[place] for place in sorted(rng.sample(range(4), rng.randint(2, 4)))]
    if form < 0.8:
        y = height * rng.uniform(0.3, 0.7)
        return [(0, 0, width, y), (0, y, width, height)]
    return [(0, 0, width, height)]


def _pixels(image: Image.Image, antialias: bool) -> np.ndarray:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = F.interpolate(tensor, size=(SIDE_PX, SIDE_PX), mode="bicubic", antialias=antialias)
    array: np.ndarray = small[0].round().clamp(0, 255).byte().numpy()
    return array


def _quarters(boxes: list[tuple[float, ...]], numbers: list[int]) -> np.ndarray:
    """The word whose middle lies in a quarter; NOTHING for none, and for two of them."""
    found: list[list[int]] = [[] for _ in range(QUARTERS)]
    for (x0, y0, x1, y1), number in zip(boxes, numbers, strict=True):
        found[2 * (y0 + y1 >= SIDE_PX) + (x0 + x1 >= SIDE_PX)].append(number)
    return np.array([numbers[0] if len(numbers) == 1 else NOTHING for numbers in found])
