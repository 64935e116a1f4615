"""Encoded image bytes to RGB pixels, safely.

JPEGs go through simplejpeg (bit-identical to Pillow, faster), everything else and what simplejpeg refuses through
Pillow. All that can be wrong with a file in a data set ends in one ValueError that says what and what to do.
Orientation tags are not applied and transparency is dropped, as in the references: regions are given on the stored
pixels.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Pillow's own limit (a quarter of a GiB of RGB): larger files are taken for decompression bombs."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may open; its readers that start other programs (EPS) or parse vector files stay out."""


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded image.

    Returns uint8[H, W, 3] in RGB. 16-bit greyscale keeps its upper byte; CMYK is converted by Pillow.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes); write the sample again")
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    return _decode_pil(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Pixels of a common JPEG, or None for Pillow to try (CMYK) or to say what is wrong with it."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(width, height, max_pixels)
        if colorspace not in ("YCbCr", "GRAY", "Gray", "RGB"):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except _RefusedError:
        raise
    except ValueError:
        return None
    return pixels


def _decode_pil(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _refuse_bomb(*image.size, max_pixels)
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
        raise ValueError(f"the image is none ({len(data)} bytes, {data[:8]!r}...); give a JPEG, PNG or WebP") from error
    except (OSError, SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError, TypeError, ValueError) as error:
        raise ValueError(f"the image is damaged ({len(data)} bytes, {error}); write the sample again") from error


class _RefusedError(ValueError):
    """An image we could read but will not."""


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _RefusedError(f"the image has {width}x{height} pixels, more than {max_pixels}; make it smaller")
