"""The square canvas a tower sees, made from a decoded picture with as little work as gives the same pixels.

`geometry.square_canvas` says what a canvas is: pad to a square, then resize. Here the columns of a wide picture are
resized before rows are padded, which saves a quarter of the work and changes no pixel. A large JPEG is decoded at a few
eighths of its size (its decoder leaves high frequencies out); such a picture rarely ends on a whole pixel, so its
canvas is sampled at the exact fractions and stays where the full one is. torch is imported where used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bestiary.vision.geometry import MAX_SIDE_PX, PAD_RGB, square_of

FULL = 8
"""Eighths of a picture that was not decoded smaller."""

_MARGIN = 5 / 4
"""Decoded pixels for each of the canvas: with fewer, the decoder's own filter shows (below 35 dB from a full one)."""
_EARLY_LINES = 16
"""So many lines before the canvas are tried until one of them begins on a whole decoded pixel."""
_OFF_PX = 1 / 16
"""How far from a whole decoded pixel a picture may begin."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image.

    pixels_HWC: uint8[H, W, 3] in RGB, or [H, W, 4] with a byte that means nothing after each pixel (faster to resize),
        at `eighths` / 8 of the size it is stored at (sides rounded up).
    width, height: as stored, in pixels: what regions are fractions of.
    """

    pixels_HWC: np.ndarray  # noqa: N815  # the axes are part of what it says
    width: int
    height: int
    eighths: int = FULL


def eighths_for_square(width: int, height: int, side_px: int) -> int:
    """The smallest scale, in eighths, that a canvas of `side_px` can be made from; 8 below twice its size."""
    side, left, top = square_of(width, height)
    for eighths in (1, 2, 3, 4):
        if side * eighths >= FULL * side_px * _MARGIN:
            _, off_px = _early_lines(max(left, top), side, eighths, side_px)
            if off_px <= _OFF_PX:
                return eighths
    return FULL


def canvas_CHW(picture: Picture, side_px: int) -> np.ndarray:  # noqa: N802
    """The picture padded to a square of `side_px`: uint8[3, side_px, side_px].

    A picture at full size gives the very pixels of `geometry.square_canvas`. ValueError for strips whose square would
    be too large.
    """
    side, left, top = square_of(picture.width, picture.height)
    if side > MAX_SIDE_PX and picture.width != picture.height:
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"the image has {size} pixels, its square more than {MAX_SIDE_PX} a side; cut it")
    padded_axis = 0 if picture.width > picture.height else 1 if picture.width < picture.height else None
    lines_HWC = picture.pixels_HWC
    for axis in (1, 0):  # Pillow's order; in the other one overshoot is clipped elsewhere
        early = 0
        if axis == padded_axis:
            early, _ = _early_lines(max(left, top), side, picture.eighths, side_px)
            lines_HWC = _padded(lines_HWC, axis, picture, early, side_px)
        lines_HWC = _resize_lines(lines_HWC, axis, (side * picture.eighths, FULL * side_px), early, side_px)
    return _planes(lines_HWC)


def _planes(pixels_HWC: np.ndarray) -> np.ndarray:
    """uint8[3, H, W] of RGB, or of RGB and a byte that means nothing."""
    height, width, channels = pixels_HWC.shape
    if channels == 3:
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
    words_HW = pixels_HWC.view("<u4")[:, :, 0]  # shifting words takes half the time of picking bytes
    planes = np.empty((3, height, width), dtype=np.uint8)
    shifted_HW = np.empty((height, width), dtype=np.uint32)
    planes[0] = words_HW
    planes[1] = np.right_shift(words_HW, 8, out=shifted_HW)
    planes[2] = np.right_shift(words_HW, 16, out=shifted_HW)
    return planes


def _early_lines(pad: int, side: int, eighths: int, side_px: int) -> tuple[int, float]:
    """How many lines before the canvas to begin so that the picture starts on a whole pixel, and how far it is off.

    A canvas line is side * eighths / (8 * side_px) decoded pixels wide, the pad (pixels as stored) pad * eighths / 8.
    """
    whole = FULL * side_px

    def off(lines: int) -> int:
        part = (pad * side_px + lines * side) * eighths % whole
        return min(part, whole - part)

    best = min(range(_EARLY_LINES), key=off)
    return best, off(best) / whole


def _padded(lines_HWC: np.ndarray, axis: int, picture: Picture, early: int, side_px: int) -> np.ndarray:
    """The picture between its two pads along `axis`, from `early` lines before the canvas on."""
    side, left, top = square_of(picture.width, picture.height)
    whole = FULL * side_px
    start = round((max(left, top) * side_px + early * side) * picture.eighths / whole)
    stop = start + lines_HWC.shape[axis]
    # One more than the last line needs, where the canvas does not end on a whole one.
    length = -(-(early + side_px) * side * picture.eighths // whole) + bool(early or side * picture.eighths % FULL)
    shape = list(lines_HWC.shape)
    shape[axis] = max(length, stop)
    padded_HWC = np.empty(shape, dtype=np.uint8)
    fill = (*PAD_RGB, 0)[: shape[2]]
    row = np.empty((shape[1], shape[2]), dtype=np.uint8)  # whole rows copy many times faster than single pixels
    row[:] = fill
    if axis == 0:
        padded_HWC[:start] = padded_HWC[stop:] = row
        padded_HWC[start:stop], last = lines_HWC, padded_HWC[stop - 1]
    else:
        padded_HWC[:, :start], padded_HWC[:, stop:] = row[:start], row[stop:]
        padded_HWC[:, start:stop], last = lines_HWC, padded_HWC[:, stop - 1]
    covered = min(picture.width, picture.height) * picture.eighths % FULL / FULL
    if covered:  # the last line is the picture's in this share only
        last[:] = np.round(covered * last + (1 - covered) * row[0])
    return padded_HWC


def _resize_lines(lines_HWC: np.ndarray, axis: int, step: tuple[int, int], first: int, count: int) -> np.ndarray:
    """Lines `first` to `first + count` of a bicubic, antialiased resize along one axis.

    step: how many old lines make a new one, as numerator and denominator.
    """
    length = lines_HWC.shape[axis]
    is_whole = not first and count * step[0] == length * step[1]
    if is_whole and length == count:
        return lines_HWC
    import torch

    pixels_HWC = torch.from_numpy(np.require(lines_HWC, requirements=["C", "W"]))
    pixels_NCHW = pixels_HWC[None].permute(0, 3, 1, 2)  # channels_last in memory: the fast uint8 kernel
    resize = torch.nn.functional.interpolate
    if is_whole:
        size = [count if each == axis else old for each, old in enumerate(lines_HWC.shape[:2])]
        resized_NCHW = resize(pixels_NCHW, size, mode="bicubic", antialias=True)
    else:
        scale = [step[1] / step[0] if each == axis else 1.0 for each in (0, 1)]
        resized_NCHW = resize(pixels_NCHW, scale_factor=scale, mode="bicubic", antialias=True)
    resized_HWC: np.ndarray = resized_NCHW[0].permute(1, 2, 0).numpy()
    return resized_HWC[first : first + count] if axis == 0 else resized_HWC[:, first : first + count]
