"""Opening the pictures that annotations name: regular files below one folder, bounded, in formats shards hold."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data_modules.adapters.fields import shown
from data_modules.adapters.protocol import RejectedRecordError, Rejection

MAX_IMAGE_BYTES = 64 * 2**20
"""Larger files are refused before they are read."""
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may open: the formats of `records.IMAGE_EXTENSIONS`; its other readers are never asked."""


def read_image(folder: Path | None, name: object, where: str, *, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The encoded bytes of a picture below `folder`; RejectedRecordError where it is missing, too large or none.

    Names that climb with `..`, absolute ones outside the folder and addresses of the network are refused: an annotation
    file must not choose what is read. Links that stand in the folder are followed: their owner put them there. An
    absolute name may spell the folder in another way than the caller does (relative, through a link).
    """
    if folder is None:
        problem = f"names image {shown(name)}; give its folder with --images"
        raise RejectedRecordError(where, problem, Rejection.MISSING_IMAGE)
    data = _read(_inside(folder, name, where), folder, f"image {shown(name)}", where, max_bytes)
    image_size(data, where, name=str(name))
    return data


def image_size(data: bytes, where: str, *, name: str = "image") -> tuple[int, int]:
    """Width and height from the header, in pixels as stored; RejectedRecordError where the bytes are no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                return image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "is empty" if not data else f"starts with {data[:8]!r} and is no readable JPEG, PNG or WebP"
        raise RejectedRecordError(
            where, f"image {shown(name)} {reason}; encode it again", Rejection.NOT_AN_IMAGE
        ) from error


def image_names(found: object, where: str) -> tuple[str, ...]:
    """The picture names of a field: a name, a list of names, or nothing (missing, null, "" or [])."""
    if not found and (found is None or isinstance(found, str | list)):
        return ()
    names = found if isinstance(found, list) else [found]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise RejectedRecordError(where, f"image name {shown(name)} is not text")
    return tuple(names)


def _read(path: Path, folder: Path, told: str, where: str, max_bytes: int) -> bytes:
    try:
        facts = path.stat()
        data = path.read_bytes() if stat.S_ISREG(facts.st_mode) and facts.st_size <= max_bytes else None
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        problem = f"{told} cannot be read from {folder} ({getattr(error, 'strerror', None) or error})"
        raise RejectedRecordError(where, problem, Rejection.MISSING_IMAGE) from error
    if not stat.S_ISREG(facts.st_mode):
        raise RejectedRecordError(where, f"{told} is not a regular file; copy it here", Rejection.MISSING_IMAGE)
    if data is None:
        problem = f"{told} has {facts.st_size} bytes, more than {max_bytes}; shrink it"
        raise RejectedRecordError(where, problem, Rejection.LARGE_IMAGE)
    return data


def _inside(folder: Path, name: object, where: str) -> Path:
    (text,) = image_names([name], where)
    if "://" in text:
        problem = f"image {shown(name)} is an address; download it and name the file"
        raise RejectedRecordError(where, problem, Rejection.MISSING_IMAGE)
    path = Path(text)
    tops = _spellings(folder) if path.is_absolute() else (Path(),)
    above = next((top for top in tops if path.is_relative_to(top)), None)
    if above is None or ".." in path.parts:
        problem = f"image name {shown(name)} leaves the image folder; make it relative to --images"
        raise RejectedRecordError(where, problem, Rejection.MISSING_IMAGE)
    return folder / path.relative_to(above)


def _spellings(folder: Path) -> Iterator[Path]:
    """The absolute paths of a folder: as it is given, without any link, and from the root.

    Made of the folder alone: what only a name says is never looked at on the disk.
    """
    yield folder
    try:
        yield folder.resolve()
        plain = Path(os.path.abspath(folder))
        if plain.samefile(folder):  # a `..` behind a link leads elsewhere than the words say
            yield plain
    except (OSError, RuntimeError):  # not there, or a circle of links
        return
