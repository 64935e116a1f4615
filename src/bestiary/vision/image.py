"""Encoded image bytes to RGB pixels, safely.

JPEGs go through simplejpeg (bit-identical to Pillow, faster), everything else and what simplejpeg cannot read through
Pillow. All that can be wrong with a file in a data set ends in one ValueError that says what and what to do; Pillow's
warnings about what it could read go Python's way (`warnings`).

As in the references, orientation tags are not applied (regions are given on the stored pixels) and transparency is
dropped; CMYK is converted by Pillow, of 16 bits the upper 8 count. Unlike them, a file of several pictures (animated
GIF, WebP or PNG, TIFF with pages) is refused: nobody knows which frame its text speaks of. So is a JPEG that lost part
of its data, which Pillow fills with grey.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from bestiary.vision.canvas import FULL, Picture

MAX_PIXELS = 89_478_485
"""Pillow's own limit (a quarter of a GiB of RGB): larger files are taken for decompression bombs."""

MAX_BYTES = 3 * MAX_PIXELS
"""A file that takes more than the pixels it may hold is none that a picture needs."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may open; its readers that start other programs (EPS) or parse vector files stay out."""

_PIXELS_PER_BYTE = 1024
"""A JPEG's Huffman codes have at least one bit, for at most 8 x 8 pixels of each of 4 x 4 blocks a chroma block covers:
a byte never stands for as many pixels, so a header that says so lies."""

_MANY_SCANS = 16
"""Times the largest allowed picture that the scans of a progressive JPEG may walk over."""

_LOST_DATA = re.compile(r"Premature end of JPEG|premature end of data|bad Huffman code|found marker")
"""libjpeg's warnings after which it makes pixels up."""
_EXTRA_DATA = re.compile(r"(\d+) extraneous bytes")
"""The warning about bytes it skipped: a writer's quirk when few, a lost place when many."""
_EXTRA_SHARE = 0.01


def decode_rgb(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded image at full size: uint8[H, W, 3]."""
    return decode(data, max_pixels=max_pixels).pixels_HWC


def decode(
    data: bytes | memoryview,
    *,
    eighths: Callable[[int, int], int] | None = None,
    has_spare_byte: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """The picture in an encoded image.

    eighths: (width, height) as stored -> how many eighths of that size are needed, for example `eighths_for_square` of
        a canvas; JPEGs are then decoded no larger. None decodes every pixel.
    has_spare_byte: JPEGs come with four bytes a pixel, see `Picture`.
    """
    if not len(data):
        raise ValueError("the image is empty (0 bytes); write the sample again")
    if len(data) > MAX_BYTES:
        raise ValueError(f"the image file has {len(data)} bytes, more than {MAX_BYTES}; make it smaller")
    if data[:2] == b"\xff\xd8":
        picture = _decode_jpeg(data, eighths, "RGBX" if has_spare_byte else "RGB", max_pixels)
        if picture is not None:
            return picture
    pixels_HWC = _decode_pil(data, max_pixels)
    return Picture(pixels_HWC, pixels_HWC.shape[1], pixels_HWC.shape[0])


def image_size(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an encoded image as stored, from its header alone; ValueError where there is none."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, LookupError):  # Pillow may read it
            pass
        else:
            _refuse_bomb(width, height, max_pixels)
            return width, height
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except _DAMAGE as error:
        raise ValueError(
            f"the image is none or damaged ({len(data)} bytes, {error}); give a JPEG, PNG or WebP"
        ) from error
    _refuse_bomb(width, height, max_pixels)
    return width, height


def _decode_jpeg(
    data: bytes | memoryview, eighths: Callable[[int, int], int] | None, layout: str, max_pixels: int
) -> Picture | None:
    """A common JPEG, or None for Pillow to try (CMYK) or to say what is wrong with it."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, LookupError):  # the second: a layout of colours it has no name for
        return None
    _refuse_bomb(width, height, max_pixels)
    if width * height > _PIXELS_PER_BYTE * len(data):
        raise ValueError(
            f"the image is damaged ({len(data)} bytes cannot hold its {width}x{height} pixels); write the sample again"
        )
    _refuse_scans(data, width * height, max_pixels)
    if colorspace not in ("YCbCr", "GRAY", "Gray", "RGB"):
        return None
    scale = FULL if eighths is None else eighths(width, height)
    smaller = {}
    if scale < FULL:  # the smallest of libjpeg's scales that has so many pixels is the scale itself
        smaller = {"min_width": -(-width * scale // FULL), "min_height": -(-height * scale // FULL)}
    try:
        pixels_HWC: np.ndarray = simplejpeg.decode_jpeg(data, colorspace=layout, **smaller)
    except (ValueError, LookupError) as error:
        _refuse_lost_data(str(error), len(data))
        return None
    return Picture(pixels_HWC, width, height, scale)


def _refuse_lost_data(told: str, num_bytes: int) -> None:
    """Raises if what libjpeg warned of means that part of the picture is gone; Pillow would not say so."""
    extra = _EXTRA_DATA.search(told)
    if _LOST_DATA.search(told) or (extra and int(extra[1]) > _EXTRA_SHARE * num_bytes):
        raise ValueError(f"the image is damaged ({num_bytes} bytes, {told}); write the sample again")


def _refuse_scans(data: bytes | memoryview, num_pixels: int, max_pixels: int) -> None:
    """Raises for a progressive JPEG whose scans would keep a core busy for minutes."""
    if not _is_progressive(data):
        return
    num_scans = bytes(data).count(b"\xff\xda")  # an FF of the coded data is always followed by 00 or a restart marker
    if num_scans * num_pixels > _MANY_SCANS * max_pixels:
        raise ValueError(f"the image has {num_scans} scans of {num_pixels} pixels each; encode it again")


def _is_progressive(data: bytes | memoryview) -> bool:
    """Whether the first frame header of a JPEG is a progressive one; False where none is found."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0xDA or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return marker in (0xC2, 0xC6, 0xCA, 0xCE)
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def _decode_pil(data: bytes | memoryview, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _refuse_bomb(*image.size, max_pixels)
        if image.format in ("PNG", "WEBP", "GIF", "TIFF") and getattr(image, "is_animated", False):
            raise _RefusedError("the image is animated or has pages; write the one frame that the text speaks of")
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise _RefusedError(f"the image has {image.mode!r} pixels of 32 bits; convert it to 8-bit RGB")
        return np.array(image.convert("RGB"))
    except _RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large ({error}); make it smaller") from error
    except UnidentifiedImageError as error:
        head = bytes(data[:8])
        raise ValueError(f"the image is none ({len(data)} bytes, {head!r}...); give a JPEG, PNG or WebP") from error
    except _DAMAGE as error:
        raise ValueError(f"the image is damaged ({len(data)} bytes, {error}); write the sample again") from error


_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError, TypeError, ValueError),
    *(AttributeError, RuntimeError, struct.error, zlib.error, Warning),
)
"""What Pillow's readers raise over broken files; a warning only where the user made warnings errors."""


class _RefusedError(ValueError):
    """An image we could read but will not."""


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _RefusedError(f"the image has {width}x{height} pixels, more than {max_pixels}; make it smaller")
