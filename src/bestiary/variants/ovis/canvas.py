"""The canvases of one picture: its views resized, in the middle of a square, with a plane that says where they lie.

The published code pads with zeros AFTER normalisation, a colour that no whole number stands for: the fourth plane is
255 where the picture lies, and the model makes the rest zero. Source: reference/ovis.md, section 1.5; resampling is
Pillow's bicubic, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bestiary.variants.ovis.geometry import Box, fit_inside, paste_at
from bestiary.vision.resize import resize_bicubic

PLANES = 4
"""Of a view: red, green, blue, and where the picture lies."""


def canvas(pixels_HWC: np.ndarray, box: Box, side: int) -> np.ndarray:
    """One view: uint8[4, side, side] of the part of the picture inside `box`."""
    left, top, right, bottom = box
    size = fit_inside(right - left, bottom - top, side)
    resized_HWC = resize_bicubic(pixels_HWC[top:bottom, left:right], size)
    x, y = paste_at(size, side)
    planes = np.zeros((PLANES, side, side), dtype=np.uint8)
    planes[:3, y : y + size[1], x : x + size[0]] = resized_HWC.transpose(2, 0, 1)
    planes[3, y : y + size[1], x : x + size[0]] = 255
    return planes


def canvases(pixels_HWC: np.ndarray, boxes: Sequence[Box], side: int) -> np.ndarray:
    """A canvas for every box: uint8[N, 4, side, side]."""
    return np.stack([canvas(pixels_HWC, box, side) for box in boxes])


def views_on_one_canvas(pixels_HWC: np.ndarray, boxes: Sequence[Box], num_views: int, side: int) -> np.ndarray:
    """All views in the planes of one canvas, uint8[1, 4 * num_views, side, side]; missing ones are zero."""
    planes = np.zeros((num_views, PLANES, side, side), dtype=np.uint8)
    planes[: len(boxes)] = canvases(pixels_HWC, boxes, side)
    return planes.reshape(1, num_views * PLANES, side, side)
