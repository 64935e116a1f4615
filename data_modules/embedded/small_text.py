"""Pictures with one word in every quarter, large or small: what a model of low resolution reads, and what it cannot.

Receipts, screens and signs on photographs (`document`, `screenshot`, `natural`), or a panel a quarter (`multi_panel`).
A small word is about 8 px high in a picture of 192 x 128 px: three by two windows of 64 px show it as it is, a single
window at a third of its width. Words are the same in both sizes, so that only reading tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from .assets import TEXT_FONTS, WORDS, Split, ink_box, text_font
from .document import INKS, PAPERS
from .natural import background
from .scene import PxBox, Scene, Thing, draw_labels
from .screenshot import ACCENTS

Color = tuple[int, int, int]

SIZE_PX = (192, 128)
"""Width and height of the pictures."""
SMALL_PX, LARGE_PX = (7.0, 9.0), (23.0, 30.0)
"""Heights of capitals in such a picture."""
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
QUESTION = "What is written in the {}?"
_BORDERS = (1 / 3, 1 / 2, 2 / 3)
"""Parts of the width that no small word crosses: borders of two and of three windows a row."""
FONTS = (TEXT_FONTS[0], TEXT_FONTS[2])
_CAPITALS = 0.72
"""Height of a capital over the size of its font."""
_PANELS = ("document", "screenshot", "natural")
_DARK: Color = (18, 20, 30)
_LIGHT: Color = (245, 247, 250)


def scene(domain: str, seed: int, index: int, split: Split) -> Scene:
    """A picture with two large and two small words, one a quarter, in the order of QUARTERS; `kind` tells the size."""
    rng = Random(f"small_text/{domain}/{split}/{seed}/{index}")
    kinds = rng.sample(["small", "small", "large", "large"], 4)
    heights = [rng.uniform(*(SMALL_PX if kind == "small" else LARGE_PX)) for kind in kinds]
    places = [(_quarter_box(place, SIZE_PX), _BORDERS if kind == "small" else ()) for place, kind in enumerate(kinds)]
    words = draw_labels(rng, [WORDS] * 4, split)
    image, boxes = draw(rng, domain, split, SIZE_PX, words, heights, places)
    things = tuple(Thing(word, kind, box) for word, kind, box in zip(words, kinds, boxes, strict=True))
    return Scene(image, things)


def draw(
    rng: Random,
    domain: str,
    split: Split,
    size_px: tuple[int, int],
    words: Sequence[str],
    heights_px: Sequence[float],
    places: Sequence[tuple[PxBox, Sequence[float]]],
) -> tuple[Image.Image, list[PxBox]]:
    """A picture (RGB) of words, and the boxes of their ink.

    heights_px: of capitals. places: for every word the box it stays in, and parts of the width that it does not cross.
    """
    image = _ground(rng, domain, split, size_px)
    canvas = ImageDraw.Draw(image)
    boxes = []
    for word, height, (room, borders) in zip(words, heights_px, places, strict=True):
        style = rng.choice(_PANELS) if domain == "multi_panel" else domain
        if domain == "multi_panel":
            x0, y0, x1, y1 = (round(edge) for edge in room)
            image.paste(_ground(rng, style, split, (x1 - x0, y1 - y0)), (x0, y0))
        boxes.append(_word(rng, canvas, style, word, height, room, [part * size_px[0] for part in borders]))
    return image, boxes


def _quarter_box(place: int, size_px: tuple[int, int]) -> PxBox:
    width, height = size_px[0] / 2, size_px[1] / 2
    x, y = place % 2 * width, place // 2 * height
    return x, y, x + width, y + height


def _ground(rng: Random, domain: str, split: Split, size_px: tuple[int, int]) -> Image.Image:
    """What lies behind the words."""
    if domain == "natural":
        return background(rng, size_px, split)
    if domain == "screenshot":
        shade = rng.randint(25, 60) if rng.random() < 0.4 else rng.randint(215, 240)
        return Image.new("RGB", size_px, (shade, shade, min(255, shade + 8)))
    return Image.new("RGB", size_px, rng.choice(PAPERS))


def _word(
    rng: Random,
    canvas: ImageDraw.ImageDraw,
    style: str,
    word: str,
    height_px: float,
    room: PxBox,
    borders_px: Sequence[float],
) -> PxBox:
    """Print one word somewhere in its room on what its style puts under it; the box of its ink."""
    edge = max(2, round(0.2 * height_px)) if style != "document" else 2
    name, size_px = rng.choice(FONTS), max(5, round(height_px / _CAPITALS))
    left, top, right, bottom = ink_box(text_font(name, size_px), word)
    while right - left > room[2] - room[0] - 2 * edge:
        size_px -= 1
        left, top, right, bottom = ink_box(text_font(name, size_px), word)
    width, height = right - left, bottom - top
    x = _free(rng, room[0] + edge, room[2] - edge - width, width, borders_px)
    y = round(rng.uniform(room[1] + edge, max(room[1] + edge, room[3] - edge - height)))
    ink, plate = colours(rng, style)
    if plate is not None:
        frame = (x - edge, y - edge, x + width + edge - 1, y + height + edge - 1)
        canvas.rounded_rectangle(frame, radius=edge if style == "screenshot" else 1, fill=plate)
    elif rng.random() < 0.6:
        rule = y + height + 2
        canvas.line((room[0] + 3, rule, room[2] - 3, rule), fill=(190, 190, 190))
    canvas.text((x - left, y - top), word, font=text_font(name, size_px), fill=ink)
    return x, y, x + width, y + height


def _free(rng: Random, low: float, high: float, width: float, borders_px: Sequence[float]) -> int:
    """A left edge between low and high where nothing of the word lies on a border."""
    for _ in range(100):
        x = round(rng.uniform(low, max(low, high)))
        if not any(x - 1 < border < x + width + 1 for border in borders_px):
            return x
    raise ValueError(f"a word of {width} px between {low} and {high} crosses a border in every place; print it smaller")


def colours(rng: Random, style: str) -> tuple[Color, Color | None]:
    """Ink, and the plate under it if there is one."""
    if style == "document":
        return rng.choice(INKS), None
    plate = rng.choice([*ACCENTS, _LIGHT, _DARK] if style == "natural" else [*ACCENTS, _LIGHT])
    return (_DARK if plate == _LIGHT else (255, 255, 255)), plate
