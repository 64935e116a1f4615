"""Frames, squares, prompts: every geometric step between an image and what a model sees, as pure functions.

Frames, each named by the functions that use it:
- original: fractions of the image as stored, [0, 1], x right, y down (the frame of `schema.Region`);
- pixels: original times its size in pixels (the frame of published annotations);
- square: fractions of the image padded to a square (the frame of prompts and answers in SPHINX).

The published pad, resize and prompt rules are LLaMA2-Accessory accessory/data/transform.py @ 3777c43 and
Draw-and-Understand @ 28a1bd1. torch and Pillow are imported where used: coordinates cost neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PAD_RGB = (122, 116, 104)
"""CLIP's mean colour in 8 bits, truncated (accessory/data/transform.py PadToSquare)."""

MAX_SIDE_PX = 16_384
"""Longest side a square is made for: 800 MB of pixels. A thin strip of few pixels pads to very many."""

Box = tuple[float, float, float, float]


# Images


def pad_to_square(rgb_HWC: np.ndarray, fill: tuple[int, int, int] = PAD_RGB) -> np.ndarray:
    """The image in the middle of a square of its longer side; an odd remainder goes to the right or below.

    rgb_HWC: uint8[H, W, 3]. A square image is returned as it is, uncopied.
    """
    height, width = rgb_HWC.shape[:2]
    side = max(height, width)
    if height == width:
        return rgb_HWC
    if side > MAX_SIDE_PX:
        raise ValueError(f"the image has {width}x{height} pixels, its square more than {MAX_SIDE_PX} a side; cut it")
    square = np.empty((side, side, 3), dtype=np.uint8)
    row = np.array([fill] * side, dtype=np.uint8)  # whole rows copy many times faster than single pixels
    top, left = (side - height) // 2, (side - width) // 2
    square[:top] = square[top + height :] = row
    square[:, :left], square[:, left + width :] = row[:left], row[left + width :]
    square[top : top + height, left : left + width] = rgb_HWC
    return square


def resize(rgb_HWC: np.ndarray, height: int, width: int, *, exact_pil: bool = False) -> np.ndarray:
    """Bicubic resize, antialiased when shrinking.

    exact_pil: Pillow's resampling, bit for bit what the published code does. Otherwise torch's on uint8, three times
        faster and at most two grey levels away.
    """
    if rgb_HWC.shape[:2] == (height, width):
        return rgb_HWC
    if exact_pil:
        from PIL import Image

        return np.array(Image.fromarray(rgb_HWC).resize((width, height), Image.Resampling.BICUBIC))
    import torch

    pixels_HWC = torch.from_numpy(np.require(rgb_HWC, requirements=["C", "W"]))
    pixels_NCHW = pixels_HWC[None].permute(0, 3, 1, 2)  # channels_last in memory: the fast uint8 kernel
    resized = torch.nn.functional.interpolate(pixels_NCHW, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def square_canvas(rgb_HWC: np.ndarray, side_px: int, *, exact_pil: bool = False) -> np.ndarray:
    """Pad to a square, then resize to `side_px`: uint8[side_px, side_px, 3]."""
    return resize(pad_to_square(rgb_HWC), side_px, side_px, exact_pil=exact_pil)


def resized_center_crop(rgb_HWC: np.ndarray, side_px: int, *, exact_pil: bool = False) -> np.ndarray:
    """Shorter side to `side_px`, then the middle square; the transform of the evaluations without prompts."""
    height, width = center_crop_size(rgb_HWC.shape[0], rgb_HWC.shape[1], side_px)
    resized = resize(rgb_HWC, height, width, exact_pil=exact_pil)
    top, left = round((height - side_px) / 2), round((width - side_px) / 2)
    return resized[top : top + side_px, left : left + side_px]


def center_crop_size(height: int, width: int, side_px: int) -> tuple[int, int]:
    """(height, width) after the shorter side became `side_px`; the longer one is truncated."""
    if height <= width:
        return side_px, int(side_px * width / height)
    return int(side_px * height / width), side_px


def random_crop(
    height: int,
    width: int,
    rng: torch.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of the asked area share and aspect ratio.

    Ten draws, then the largest middle crop within `ratio`: torchvision's RandomResizedCrop, draw for draw. Prompts and
    answers that hold coordinates do not survive this transform.
    """
    import torch

    log_ratio = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(scale[0], scale[1], generator=rng).item()
        aspect = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1], generator=rng)).item()
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top = int(torch.randint(0, height - crop_h + 1, (1,), generator=rng).item())
            left = int(torch.randint(0, width - crop_w + 1, (1,), generator=rng).item())
            return top, left, crop_h, crop_w
    crop_w = min(width, round(height * ratio[1]))
    crop_h = min(height, round(width / ratio[0]))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def random_resized_crop(
    rgb_HWC: np.ndarray, side_px: int, rng: torch.Generator, *, exact_pil: bool = False
) -> np.ndarray:
    """A random crop (see `random_crop`) resized to a square, its aspect ratio lost."""
    top, left, height, width = random_crop(rgb_HWC.shape[0], rgb_HWC.shape[1], rng)
    return resize(rgb_HWC[top : top + height, left : left + width], side_px, side_px, exact_pil=exact_pil)


# Coordinates


def original_to_pixels(coords: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Fractions (x, y, x, y, ...) of the original image in pixels.

    Undoes `pixels_to_original` exactly for pixel values of at most six decimals: the product is within 1e-11 px of such
    a value, and is then that value. Others keep the product.
    """
    return tuple(_snap(c * (height if k % 2 else width)) for k, c in enumerate(coords))


def pixels_to_original(coords: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Pixels (x, y, x, y, ...) of the original image as fractions of it."""
    return tuple(c / (height if k % 2 else width) for k, c in enumerate(coords))


def original_to_square(coords: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Fractions of the original image as fractions of its padded square, unrounded."""
    side, pad_x, pad_y = square_of(width, height)
    pixels = original_to_pixels(coords, width, height)
    return tuple((c + (pad_y if k % 2 else pad_x)) / side for k, c in enumerate(pixels))


def square_to_original(coords: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """Fractions of the padded square as fractions of the original image; may lie outside [0, 1] (on the pad)."""
    side, pad_x, pad_y = square_of(width, height)
    return pixels_to_original([c * side - (pad_y if k % 2 else pad_x) for k, c in enumerate(coords)], width, height)


def square_of(width: int, height: int) -> tuple[int, int, int]:
    """(side, left pad, top pad) in pixels of the square around a `width` x `height` image."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def point_row(point_px: Sequence[float], width: int, height: int) -> tuple[float, float]:
    """A point in pixels as (x, y) of the square, to three decimals as models were trained."""
    side, pad_x, pad_y = square_of(width, height)
    x, y = point_px
    return round((x + pad_x) / side, 3), round((y + pad_y) / side, 3)


def box_row(box_xywh_px: Sequence[float], width: int, height: int) -> Box:
    """A box (left, top, width, height) in pixels as (x0, y0, x1, y1) of the square, each to three decimals."""
    side, pad_x, pad_y = square_of(width, height)
    x, y, box_w, box_h = box_xywh_px
    return (
        round((x + pad_x) / side, 3),
        round((y + pad_y) / side, 3),
        round((x + box_w + pad_x) / side, 3),
        round((y + box_h + pad_y) / side, 3),
    )


def box_to_xywh_px(box: Box, width: int, height: int) -> Box:
    """A box in original fractions as (left, top, width, height) in pixels."""
    x0, y0, x1, y1 = original_to_pixels(box, width, height)
    return x0, y0, _snap(x1 - x0), _snap(y1 - y0)


def jitter_box(box_xywh_px: Sequence[float], rng: np.random.Generator | np.random.RandomState) -> Box:
    """A box shaken as in training: its corner by whole pixels up to an eighth of its size, its sizes by up to 15 %.

    Draws x, y, width, height in this order; a numpy RandomState draws as the published code does. The result may leave
    the image. This is what teaches a box prompt to stand for a free-form stroke.
    """
    x, y, box_w, box_h = box_xywh_px
    x += _whole(rng, int(box_w / 8))
    y += _whole(rng, int(box_h / 8))
    box_w *= 1 + rng.uniform(-0.15, 0.15)
    box_h *= 1 + rng.uniform(-0.15, 0.15)
    return float(x), float(y), max(0.0, float(box_w)), max(0.0, float(box_h))


def _whole(rng: np.random.Generator | np.random.RandomState, limit: int) -> int:
    if isinstance(rng, np.random.RandomState):
        return int(rng.randint(-limit, limit + 1))
    return int(rng.integers(-limit, limit, endpoint=True))


def _snap(pixel: float) -> float:
    """The value of at most six decimals within 1e-9 of `pixel`, else `pixel`."""
    near = round(pixel, 6)
    return near if abs(near - pixel) < 1e-9 else pixel


# Drawing: what a user's strokes and clicks mean


def stroke_boxes(layers_NHWC: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The box (x0, y0, x1, y1) of painted pixels of every drawn layer, corners included; empty layers give none.

    layers_NHWC: uint8[N, H, W, 4], one layer a region; a pixel is painted where any of its channels is not 0.
    """
    boxes = []
    for layer in layers_NHWC:
        painted = layer.any(axis=-1)
        if painted.any():
            columns, rows = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
            boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])))
    return boxes


def click_boxes(clicks: Iterable[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Boxes from clicks on any two opposite corners; a last odd click stays as a lone (x, y)."""
    marks: list[tuple[float, ...]] = []
    for x, y in clicks:
        if marks and len(marks[-1]) == 2:
            x0, y0 = marks.pop()
            marks.append((min(x0, x), min(y0, y), max(x0, x), max(y0, y)))
        else:
            marks.append((x, y))
    return marks
