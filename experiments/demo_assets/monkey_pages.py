"""Windows full of words for the eye of Monkey's demo to learn to read from, and the word that every patch shows.

A curriculum: at `ease` 1 every word is three patches wide, one high and lies on the grid of patches, a letter in each;
at 0 words have the sizes, shapes and places in which the demo's windows show them. From the latter alone the eye learns
nothing in the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_modules.embedded.assets import WORDS, ink_box, text_font
from data_modules.embedded.natural import background
from data_modules.embedded.small_text import FONTS, colours

SIDE_PX = 64
NOTHING = len(WORDS)
"""Class of a patch that shows no word."""
COVER = 0.25
"""Share of a patch that a word's box must cover to be what the patch shows."""
PATCH_PX = 8
_HIGH_PX, _WIDE = (6.5, 15.0), (1.2, 2.4)
"""Heights of words, and their widths over their heights."""
_BLANK = 0.2
"""Share of places for a word that stay empty."""
_NUM_PHOTOS = 150

Box = tuple[float, float, float, float]


@cache
def _ink(word: str, font: str) -> Image.Image:
    """A word's ink, grey, 40 px high."""
    face = text_font(font, 56)
    left, top, right, bottom = ink_box(face, word)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), word, font=face, fill=255)
    return image


@cache
def _photo(number: int) -> np.ndarray:
    return np.asarray(background(Random(f"monkey-page/{number}"), (SIDE_PX, SIDE_PX), "train"))


def pages(rng: Random, eases: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A page for every ease: uint8[N, 3, 64, 64], and the class of every patch, int64[N, P]."""
    made = [_page(rng, ease) for ease in eases]
    pixels = torch.from_numpy(np.stack([page for page, _ in made])).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.stack([patch_words(boxes, PATCH_PX) for _, boxes in made]))


def _page(rng: Random, ease: float) -> tuple[np.ndarray, list[tuple[int, Box]]]:
    if rng.random() < 0.35:
        page = _photo(rng.randrange(_NUM_PHOTOS)).copy()
    else:
        page = np.empty((SIDE_PX, SIDE_PX, 3), np.uint8)
        page[:] = [rng.randint(25, 60)] * 3 if rng.random() < 0.3 else [rng.randint(215, 255)] * 3
    boxes: list[tuple[int, Box]] = []
    y = rng.uniform(0, 6) * (1 - ease)
    while y < SIDE_PX - 6:
        high = _HIGH_PX[0] + (rng.random() ** 2) * (_HIGH_PX[1] - _HIGH_PX[0])
        high = ease * PATCH_PX + (1 - ease) * high
        x = rng.uniform(0, 10) * (1 - ease)
        while True:
            wide = ease * 3 * PATCH_PX + (1 - ease) * high * rng.uniform(*_WIDE)
            if x + wide > SIDE_PX or y + high > SIDE_PX:
                break
            if rng.random() > _BLANK:
                boxes.append(_print(rng, page, x, y, wide, high))
            x += wide + ease * PATCH_PX + (1 - ease) * rng.uniform(3, 16)
        y += high + (1 - ease) * rng.uniform(2, 10)
    return page, boxes


def _print(rng: Random, page: np.ndarray, x: float, y: float, wide: float, high: float) -> tuple[int, Box]:
    """Print a word into a box of whole pixels."""
    number = rng.randrange(len(WORDS))
    x0, y0 = round(x), round(y)
    w, h = min(round(wide), SIDE_PX - x0), min(round(high), SIDE_PX - y0)
    how = rng.choice((Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    ink = np.asarray(_ink(WORDS[number], rng.choice(FONTS)).resize((w, h), how), np.float32) / 255
    style = rng.choice(("document", "screenshot", "natural"))
    colour, plate = colours(rng, style)
    if plate is None and (page[y0 : y0 + h, x0 : x0 + w].mean() < 150 or rng.random() < 0.3):
        plate = (255, 255, 255)
    if plate is not None:
        page[max(0, y0 - 1) : y0 + h + 1, max(0, x0 - 1) : x0 + w + 1] = plate
    room = page[y0 : y0 + h, x0 : x0 + w]
    room[:] = room + ink[:, :, None] * (np.array(colour, np.float32) - room)
    return number, (x0, y0, x0 + w, y0 + h)


def patch_words(boxes: list[tuple[int, Box]], patch_px: int) -> np.ndarray:
    """The word that covers most of every patch, int64[P], row by row."""
    side = SIDE_PX // patch_px
    edges = np.arange(side) * patch_px
    found, best = np.full((side, side), NOTHING), np.full((side, side), COVER)
    for number, (x0, y0, x1, y1) in boxes:
        across = np.clip(np.minimum(x1, edges + patch_px) - np.maximum(x0, edges), 0, None) / patch_px
        along = np.clip(np.minimum(y1, edges + patch_px) - np.maximum(y0, edges), 0, None) / patch_px
        cover = np.outer(along, across)
        found, best = np.where(cover > best, number, found), np.maximum(best, cover)
    return found.reshape(-1)
