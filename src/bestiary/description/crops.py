"""Parts of a picture that captioners and matchers look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bestiary.description.words import Box, Mask

# Source: data_generation/sam_blip.py.
LARGEST_SEGMENTS = 20
_WHITE = 255


def largest(masks: Sequence[Mask]) -> list[Mask]:
    """At most LARGEST_SEGMENTS of the segments, the largest first; of equal ones in their order."""
    return sorted(masks, key=lambda mask: -mask.area)[:LARGEST_SEGMENTS]


def segment_crop(picture: np.ndarray, mask: Mask) -> np.ndarray:
    """The picture inside the segment's box, white outside the segment. uint8[h, w, 3]."""
    if mask.pixels.shape != picture.shape[:2]:
        raise ValueError(f"a mask of {mask.pixels.shape} on a picture of {picture.shape[:2]}; cut it from this picture")
    x1, y1, x2, y2 = mask.box
    inside = mask.pixels[y1:y2, x1:x2, None]
    return np.where(inside, picture[y1:y2, x1:x2], np.uint8(_WHITE))


def box_crop(picture: np.ndarray, box: Box) -> np.ndarray:
    """The picture inside a box of shares: every pixel it touches, at least one. uint8[h, w, 3]."""
    height, width = picture.shape[:2]
    x1, x2 = _span(box[0], box[2], width)
    y1, y2 = _span(box[1], box[3], height)
    return picture[y1:y2, x1:x2]


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(0, math.floor(low * size)), size - 1)
    return first, min(max(first + 1, math.ceil(high * size)), size)
