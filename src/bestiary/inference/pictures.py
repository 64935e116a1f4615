"""What a caller points at: pictures as people have them, marks in pixels or fractions of the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from bestiary.schema import Region
from bestiary.vision.image import decode_rgb, image_size

Picture = Image.Image | bytes | str | Path
"""A PIL picture, encoded bytes (JPEG, PNG ...), or the path of such a file."""

Pictures = Picture | Sequence[Picture] | None
"""A picture, several, or none."""

Frame = Literal["pixels", "fractions"]
"""What coordinates count: pixels of the picture as stored, or fractions of it, [0, 1]; x to the right, y down."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
"""What PNG holds without loss; other modes (CMYK, YCbCr ...) become RGB first, as the references' `convert` does."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point, box or stroke whose frame the call says; marks are numbered in their order, from 1."""

    kind: Literal["point", "box", "stroke"]
    coords: tuple[float, ...]


def point(x: float, y: float) -> Mark:
    """A point."""
    return Mark("point", (float(x), float(y)))


def box(x0: float, y0: float, x1: float, y1: float) -> Mark:
    """A box by its left, upper, right and lower edge."""
    return Mark("box", (float(x0), float(y0), float(x1), float(y1)))


def stroke(*xy: float) -> Mark:
    """A line drawn by hand through x0, y0, x1, y1, ..."""
    return Mark("stroke", tuple(map(float, xy)))


def encoded(image: Picture) -> bytes:
    """A picture as a sample holds it: files and bytes as they are, a PIL picture as PNG, without loss."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise ValueError(f"picture {image}: no such file")
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        raise ValueError(f"a picture is a PIL image, encoded bytes or a path, not {type(image).__name__}")
    buffer = io.BytesIO()
    kept = image if image.mode in _PNG_MODES else image.convert("RGB")
    kept.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def check_file(path: Path) -> None:
    """ValueError that names the file unless it holds one picture, whole; what is read is not kept."""
    data = encoded(path)
    try:
        decode_rgb(data)
    except ValueError as error:
        raise ValueError(f"picture {path}: {error}") from error


def check_files(image: Pictures) -> None:
    """`check_file` of every path among the pictures."""
    for one in [image] if isinstance(image, str | Path) else image if isinstance(image, list | tuple) else []:
        if isinstance(one, str | Path):
            check_file(Path(one))


def all_encoded(image: Pictures) -> tuple[bytes, ...]:
    """A picture, several or none as a sample holds them."""
    if image is None:
        return ()
    several = [image] if isinstance(image, Image.Image | bytes | str | Path) else image
    if not isinstance(several, Sequence):
        raise ValueError(f"a picture is a PIL image, encoded bytes or a path, not {type(image).__name__}")
    return tuple(encoded(one) for one in several)


def only(images: Sequence[bytes], marks: Sequence[Mark | Region]) -> bytes | None:
    """The picture that marks lie on; several pictures have none."""
    if marks and len(images) > 1:
        raise ValueError(f"{len(marks)} marks on {len(images)} pictures: nobody can tell which; give one picture")
    return images[0] if len(images) == 1 else None


def regions_of(marks: Sequence[Mark | Region], frame: Frame | None, image: bytes | None) -> tuple[Region, ...]:
    """Marks as regions of a sample; ready regions (always fractions) pass as they are.

    frame: must be said where there are marks, because nobody can tell 0.5 pixels from half a picture.
    """
    if frame not in (None, "pixels", "fractions"):
        raise ValueError(f"frame={frame!r} is unknown; use pixels or fractions")
    ready = tuple(mark for mark in marks if isinstance(mark, Region))
    drawn = [mark for mark in marks if isinstance(mark, Mark)]
    if len(ready) + len(drawn) < len(marks) or (ready and drawn):
        raise ValueError("regions are marks made by point(), box() and stroke(), or all of them schema.Region")
    if ready and frame == "pixels":
        raise ValueError("frame='pixels' with regions, which are fractions always; give point(), box(), stroke()")
    if drawn and frame is None:
        raise ValueError(f"{len(drawn)} marks of no frame; say frame='pixels' or frame='fractions'")
    if drawn and frame == "pixels" and image is None:
        raise ValueError(f"{len(drawn)} marks in pixels but no picture; add the picture they lie on")
    # As stored: orientation tags are not applied, as in the processors.
    width, height = image_size(image) if drawn and frame == "pixels" and image is not None else (1, 1)
    return ready or tuple(_region(mark, number, width, height) for number, mark in enumerate(drawn, 1))


def _region(mark: Mark, number: int, width: int, height: int) -> Region:
    return Region(mark.kind, tuple(c / (height if i % 2 else width) for i, c in enumerate(mark.coords)), number)
