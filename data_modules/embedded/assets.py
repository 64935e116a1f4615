"""The small real things that pictures are made of: named objects, icons, digits, photos and fonts.

Everything is read from `assets/` once a process; `make_assets.py` made the files, `ATTRIBUTIONS.md` tells their origin.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageFont

Split = Literal["train", "heldout"]

FOLDER = Path(__file__).parent / "assets"

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CHART_COLORS = {
    "red": (214, 40, 40),
    "blue": (40, 90, 220),
    "green": (40, 150, 60),
    "orange": (245, 140, 20),
    "purple": (135, 60, 190),
}
CHART_SHAPES = ("bars", "line", "pie")
CHART_NAMES = tuple(f"{color} {shape}" for color in CHART_COLORS for shape in CHART_SHAPES)

WORDS = (
    "BUS", "TAX", "OIL", "TEA", "HAM", "EGG", "JAM", "PIE", "GYM", "ZOO", "INN", "SKI", "RUN", "HOT", "KEY", "LAW",
)  # fmt: skip
"""What is printed where the size of print decides (`small_text`)."""

HELDOUT_FORMS = 3
"""Forms at the end of the digits set that only held-out pictures show."""
HELDOUT_PHOTO = "flower"
"""The photo that only held-out pictures show; of the others they show the right part."""
TRAIN_PART = 0.7
"""Share of a photo's width, from the left, that training pictures may show."""

TEXT_FONTS = ("sans", "mono", "grotesk", "typewriter", "serif")


@cache
def table(name: str) -> dict[str, Any]:
    """A JSON file of the assets."""
    value: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return value


@cache
def object_names() -> tuple[str, ...]:
    """Names of the object pictures, in sheet order."""
    return tuple(table("objects")["code_points"])


@cache
def icon_names() -> tuple[str, ...]:
    """Names of the icons."""
    return tuple(table("icons")["code_points"])


@cache
def label_places() -> dict[str, int]:
    """Place of every label (strings of documents apart) in the list of all."""
    return {name: i for i, name in enumerate((*object_names(), *icon_names(), *DIGIT_NAMES, *CHART_NAMES, *WORDS))}


@cache
def object_picture(name: str) -> Image.Image:
    """RGBA picture of an object, 64 x 64 px. Shared: copy before changing it."""
    side, columns = table("objects")["side_px"], table("objects")["columns"]
    place = object_names().index(name)
    x, y = place % columns * side, place // columns * side
    return _sheet("objects", "RGBA").crop((x, y, x + side, y + side))


@cache
def _sheet(name: str, mode: str) -> Image.Image:
    return Image.open(FOLDER / f"{name}.png").convert(mode)


@cache
def digit_places(split: Split) -> dict[str, tuple[int, ...]]:
    """For each digit name the places in the digits set that a split may show.

    The set has no writer column, but its labels repeat one sequence 14 times: filled-in forms, one after another.
    The last three forms are held out.
    """
    digits = table("digits")
    border = digits["form_starts"][-HELDOUT_FORMS]
    places: dict[str, list[int]] = {name: [] for name in DIGIT_NAMES}
    for place, label in enumerate(digits["labels"]):
        if (place >= border) == (split == "heldout"):
            places[DIGIT_NAMES[int(label)]].append(place)
    return {name: tuple(found) for name, found in places.items()}


@cache
def digit_ink(place: int) -> Image.Image:
    """Ink of one handwritten digit: grey 8 x 8 px, 0 is paper."""
    side, columns = table("digits")["side_px"], table("digits")["columns"]
    x, y = place % columns * side, place // columns * side
    return _sheet("digits", "L").crop((x, y, x + side, y + side))


@cache
def photos(split: Split) -> tuple[Image.Image, ...]:
    """The parts of the background photos that a split may show, RGB."""
    parts = []
    for path in sorted(FOLDER.glob("photo-*.jpg")):
        photo = Image.open(path).convert("RGB")
        whole = path.stem == f"photo-{HELDOUT_PHOTO}"
        border = round(photo.width * TRAIN_PART)
        if split == "train" and not whole:
            parts.append(photo.crop((0, 0, border, photo.height)))
        elif split == "heldout":
            parts.append(photo if whole else photo.crop((border, 0, photo.width, photo.height)))
    return tuple(parts)


@lru_cache(maxsize=256)
def text_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """One of `TEXT_FONTS`, bold, printable ASCII."""
    return ImageFont.truetype(FOLDER / f"font-{name}.ttf", size_px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def icon_font(size_px: int) -> ImageFont.FreeTypeFont:
    """The font whose glyphs are the icons."""
    return ImageFont.truetype(FOLDER / "icons.ttf", size_px, layout_engine=ImageFont.Layout.BASIC)


def icon_glyph(name: str) -> str:
    """The character of `icon_font` that draws an icon."""
    return chr(table("icons")["code_points"][name])


def ink_box(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int, int, int]:
    """Box of the visible pixels of `text` drawn at (0, 0): unlike `getbbox` it leaves out the advance."""
    mask, (x, y) = font.getmask2(text, "L")
    left, top, right, bottom = mask.getbbox()
    return left + x, top + y, right + x, bottom + y
