"""How a picture becomes views: windows row by row, and the whole at a window's size behind them.

Pure functions on tensors. Source: reference/monkey.md, section 1.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_of(height_px: int, width_px: int, window_px: int) -> tuple[int, int]:
    """Rows and columns of windows that make up the picture; ValueError unless they cover it exactly."""
    if window_px < 1 or min(height_px, width_px) < window_px or height_px % window_px or width_px % window_px:
        raise ValueError(
            f"windows of {window_px} px do not divide a picture of {height_px} x {width_px} px (height x width); "
            "make both sides multiples of window_px"
        )
    return height_px // window_px, width_px // window_px


def windows(pixels_NCHW: Tensor, window_px: int) -> Tensor:
    """The windows of every picture, [W, N, C, window, window], row by row; what is left over right and below goes."""
    count, channels, height, width = pixels_NCHW.shape
    rows, columns = height // window_px, width // window_px
    whole = pixels_NCHW[:, :, : rows * window_px, : columns * window_px]
    cut = whole.reshape(count, channels, rows, window_px, columns, window_px)
    return cut.permute(2, 4, 0, 1, 3, 5).reshape(rows * columns, count, channels, window_px, window_px)


def overview(pixels_NCHW: Tensor, window_px: int) -> Tensor:
    """The whole picture as one more view, [N, C, window, window]: bicubic without antialias, of normalised pixels."""
    return F.interpolate(pixels_NCHW, size=(window_px, window_px), mode="bicubic", align_corners=False)


def views(pixels_NCHW: Tensor, window_px: int) -> Tensor:
    """All views of normalised pictures, [W + 1, N, C, window, window]: the windows, then the whole."""
    return torch.cat([windows(pixels_NCHW, window_px), overview(pixels_NCHW, window_px)[None]])
