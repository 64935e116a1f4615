"""What a picture is made of, and which compositions belong to which split.

Lengths are in units u of the padded square: a picture's long side is always 128 u, whatever its pixels, so that things
keep their size on the model's canvas. `u` in function signatures is the pixels of one unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from .assets import Split, label_places

PxBox = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the picture; the right and lower edge are outside."""

SQUARE_U = 128
STRING_LETTERS = "ACEFHJKLMNPRTUXY23456789"
"""Letters and digits of printed strings: none looks like another (no 0 O D Q, 1 I, S, B, Z, G, V, W)."""
HELDOUT_STRINGS = 0.2
"""Share of all strings, by hash, that only held-out pictures print."""
PAIR_CLASSES = 7
"""One pair of labels in so many never stands in one training picture; every held-out picture has such a pair."""


@dataclass(frozen=True, slots=True)
class Look:
    """What may vary in the pictures. Lengths in u (see the module), ranges are inclusive.

    long_px: lengths of the long side to choose from. odd_share: share of pictures that are not square.
    aspect: short over long side of those. num_objects: markable things in a picture. num_names: 0 = all names of a set.
    """

    long_px: tuple[int, ...] = (128, 128, 160, 192)
    odd_share: float = 0.3
    aspect: tuple[float, float] = (0.7, 0.95)
    num_objects: tuple[int, int] = (3, 6)
    num_names: int = 0
    object_u: tuple[float, float] = (28, 46)
    icon_u: tuple[float, float] = (28, 36)
    letters_u: tuple[float, float] = (15, 19)
    string_length: tuple[int, int] = (3, 3)
    num_fonts: int = 4
    gap_u: float = 4
    jpeg_quality: int = 90


LOOK = Look()


@dataclass(frozen=True, slots=True)
class Thing:
    """One markable thing of a picture.

    label: its true name, or the string it prints. kind: object, icon, text, digit or chart.
    ink: grey mask of what belongs to it, the size of `box`; None = the whole box.
    """

    label: str
    kind: str
    box: PxBox
    ink: Image.Image | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        """Area of the box, square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture (RGB) with everything markable in it."""

    image: Image.Image
    things: tuple[Thing, ...]


def share(*words: str) -> float:
    """A number in [0, 1) that depends on nothing but the words."""
    digest = hashlib.blake2b("\x00".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_heldout_pair(a: str, b: str) -> bool:
    """Whether two labels may stand together in held-out pictures only.

    By their places in the list of all labels, not by hash: every label then has nearly the same number of such
    partners, and none is rare in training.
    """
    places = label_places()
    return (places[a] + places[b]) % PAIR_CLASSES == 0


def is_heldout_string(text: str) -> bool:
    """Whether a string is printed in held-out pictures only."""
    return share("string", text) < HELDOUT_STRINGS


def draw_labels(rng: Random, pools: Sequence[Sequence[str]], split: Split) -> list[str]:
    """One label from each pool, all different, as a composition of the split."""
    for _ in range(2000):
        labels = [rng.choice(pool) for pool in pools]
        if len(set(labels)) < len(labels):
            continue
        has_pair = any(is_heldout_pair(a, b) for i, a in enumerate(labels) for b in labels[:i])
        if has_pair == (split == "heldout"):
            return labels
    raise ValueError(f"no composition of {len(pools)} labels for split {split}; allow more names (num_names)")


def draw_string(rng: Random, look: Look, split: Split) -> str:
    """A string of the split."""
    while True:
        text = "".join(rng.choices(STRING_LETTERS, k=rng.randint(*look.string_length)))
        if is_heldout_string(text) == (split == "heldout"):
            return text


def draw_size(rng: Random, look: Look) -> tuple[int, int]:
    """Width and height of a picture, pixels."""
    long = rng.choice(look.long_px)
    if rng.random() >= look.odd_share:
        return long, long
    short = round(long * rng.uniform(*look.aspect))
    return (long, short) if rng.random() < 0.5 else (short, long)


def place(
    rng: Random, area: PxBox, sizes: Sequence[tuple[float, float]], gap: float
) -> list[tuple[float, float]] | None:
    """Left upper corners for boxes of the given sizes in `area`, at least `gap` apart; None if they did not fit."""
    done: list[PxBox] = []
    for width, height in sizes:
        for _ in range(40):
            x = rng.uniform(area[0], area[2] - width)
            y = rng.uniform(area[1], area[3] - height)
            if all(
                x + width + gap <= b[0] or b[2] + gap <= x or y + height + gap <= b[1] or b[3] + gap <= y for b in done
            ):
                done.append((x, y, x + width, y + height))
                break
        else:
            return None
    return [(b[0], b[1]) for b in done]


def whole(box: PxBox) -> tuple[int, int, int, int]:
    """The box in whole pixels, outwards."""
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
