"""Bicubic resizing by Pillow, antialiased, on bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Passes = Literal["columns_first", "pillow"]
PASSES: tuple[Passes, ...] = ("columns_first", "pillow")
"""In which order the two passes come: as Pillow did before 13, or as the installed one picks."""


def resize_bicubic(pixels_HWC: np.ndarray, size: tuple[int, int], *, passes: Passes = "columns_first") -> np.ndarray:
    """uint8[height, width, 3] of RGB pixels; size: (width, height), the sides keep no ratio.

    Pillow 13 picks the order of its passes by itself, several grey levels away from what was published before it: for
    columns first there are two calls. "pillow" makes one.
    """
    image = Image.fromarray(pixels_HWC)
    if passes == "columns_first":
        image = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
