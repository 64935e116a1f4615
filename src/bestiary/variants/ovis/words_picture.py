"""The picture of `words`: the canvas, its words and their entropy side by side, and a list of the words below.

Where patches are large enough their words stand in them; else a colour marks each of the most frequent words.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bestiary.variants.ovis.words import CanvasWords, PictureWords, shown, word_line

PANEL, GAP, HEAD = 480, 16, 28
"""Pixels: the least side of a panel, between panels, and the line above each."""
FONT, LINE = 13, 17
CELL_TEXT = 76
"""Patches of at least so many pixels carry text."""
LARGE_CELL = 120
MOST_CELLS = 10
"""Grids up to this many patches a side are drawn with cells that carry text."""
LISTED = 24
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac",
    "#1f77b4", "#2ca02c",
)  # fmt: skip
OTHER = "#e8e8e8"
LOW, HIGH = np.array([255, 250, 220]), np.array([128, 0, 60])
"""Colours of the least and the greatest entropy."""


def draw(found: PictureWords) -> Image.Image:
    """One strip a canvas, one below the other."""
    strips = [_strip(found, canvas, number) for number, canvas in enumerate(found.canvases, 1)]
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def _strip(found: PictureWords, canvas: CanvasWords, number: int) -> Image.Image:
    side = canvas.side
    cell = LARGE_CELL if side <= MOST_CELLS // 2 else CELL_TEXT + 20 if side <= MOST_CELLS else max(4, PANEL // side)
    panel = cell * side
    frequent = canvas.frequent()
    listed = frequent[:LISTED]
    height = HEAD + panel + GAP + LINE * (len(listed) + 2) + GAP
    strip = Image.new("RGB", (3 * panel + 4 * GAP, height), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(FONT)
    colours = {word: COLOURS[n] for n, (word, _, _) in enumerate(frequent[: len(COLOURS)])}
    places = [(GAP + n * (panel + GAP), HEAD) for n in range(3)]
    least, most = float(canvas.entropy.min()), float(canvas.entropy.max())
    heads = (
        f"canvas {number} of {len(found.canvases)}",
        f"most probable of {found.num_words:,} words" + ("" if cell >= CELL_TEXT else " (colours: see list)"),
        f"entropy {least:.2f} to {most:.2f} nats, pale to dark; all alike: {math.log(found.num_words):.2f}",
    )
    for (left, _), head in zip(places, heads, strict=True):
        pen.text((left, 6), head, "black", font)
    resized = Image.fromarray(canvas.rgb).resize((panel, panel), Image.Resampling.NEAREST)
    strip.paste(resized, places[0])
    _word_map(pen, canvas, found, places[1], cell, colours)
    heat = _heat(canvas.entropy, least, most).reshape(side, side, 3)
    strip.paste(Image.fromarray(heat).resize((panel, panel), Image.Resampling.NEAREST), places[2])
    for place in (places[0], places[2]) if cell >= 12 else ():
        _grid(pen, place, side, cell)
    if cell >= CELL_TEXT:
        _numbers(pen, canvas.entropy, places[2], side, cell, (least + most) / 2)
    _list(pen, found, listed, len(frequent), HEAD + panel + GAP, colours)
    return strip


def _word_map(
    pen: ImageDraw.ImageDraw,
    canvas: CanvasWords,
    found: PictureWords,
    place: tuple[int, int],
    cell: int,
    colours: dict[int, str],
) -> None:
    """Cells in their word's colour, with words, shares and the nearest text where there is room."""
    font = ImageFont.load_default(FONT - 1)
    lines = max(0, (cell - 8) // (LINE - 2))
    for patch, (words, shares) in enumerate(zip(canvas.words, canvas.shares, strict=True)):
        x, y = place[0] + patch % canvas.side * cell, place[1] + patch // canvas.side * cell
        colour = colours.get(int(words[0]), OTHER)
        has_text = cell >= CELL_TEXT
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill="white" if has_text else colour)
        if not has_text:
            continue
        pen.rectangle((x, y, x + cell - 1, y + 5), fill=colour)
        texts = [f"{word} {share:.0%}" for word, share in zip(words, shares, strict=True)][: max(1, lines - 1)]
        texts.insert(1, shown(found.nearest[int(words[0])][0][0]))
        for number, text in enumerate(texts[:lines]):
            fitting = _fitting(text, cell - 8, font)
            pen.text((x + 4, y + 8 + number * (LINE - 2)), fitting, "black" if number < 2 else "#777777", font)
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="#cccccc")


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _heat(values: np.ndarray, least: float, most: float) -> np.ndarray:
    share = (values - least) / (most - least) if most > least else np.zeros_like(values)
    mixed = LOW + np.clip(share, 0, 1)[:, None] * (HIGH - LOW)
    return np.asarray(mixed.round(), dtype=np.uint8)


def _grid(pen: ImageDraw.ImageDraw, place: tuple[int, int], side: int, cell: int) -> None:
    left, top = place
    for n in range(side + 1):
        pen.line((left + n * cell, top, left + n * cell, top + side * cell), "#999999")
        pen.line((left, top + n * cell, left + side * cell, top + n * cell), "#999999")


def _numbers(
    pen: ImageDraw.ImageDraw, values: np.ndarray, place: tuple[int, int], side: int, cell: int, middle: float
) -> None:
    font = ImageFont.load_default(FONT)
    for patch, value in enumerate(values):
        x, y = place[0] + patch % side * cell, place[1] + patch // side * cell
        pen.text((x + 6, y + 6), f"{value:.2f}", "white" if value > middle else "black", font)


def _list(
    pen: ImageDraw.ImageDraw,
    found: PictureWords,
    listed: list[tuple[int, int, float]],
    total: int,
    top: int,
    colours: dict[int, str],
) -> None:
    font = ImageFont.load_default(FONT)
    for number, (word, patches, share) in enumerate(listed):
        y = top + number * LINE
        pen.rectangle((GAP, y + 3, GAP + 10, y + 13), fill=colours.get(word, OTHER))
        pen.text((GAP + 18, y), word_line(found, word, patches, share), "black", font)
    more = f", {total - len(listed)} more are not listed" if total > len(listed) else ""
    text = f"{total} words are the most probable one of some patch{more}; near: text tokens by cosine to the word's row"
    pen.text((GAP, top + len(listed) * LINE), text, "#555555", font)
