"""Natural pictures: named objects pasted on photographs."""

from __future__ import annotations

from functools import cache
from random import Random

from PIL import Image, ImageOps

from .assets import Split, object_names, object_picture, photos
from .scene import Look, PxBox, Scene, Thing, draw_labels, draw_size, place

ANGLES = (-20, -15, -10, -5, 0, 5, 10, 15, 20)
"""Degrees an object may be turned by; few, so that turned pictures can be kept."""

_SAME = list(range(256))
_SOLID = [0] * 64 + [255] * 192
_SHADE = [value * 2 // 5 for value in range(256)]


def names(look: Look) -> tuple[str, ...]:
    """Object names in use."""
    return object_names()[: look.num_names or None]


def background(rng: Random, size: tuple[int, int], split: Split) -> Image.Image:
    """A crop of a photo at `size`, flipped, tinted and flattened a little at random."""
    photo = rng.choice(photos(split))
    width, height = size
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.5, 1.0)
    crop_w, crop_h = width * scale, height * scale
    x, y = rng.uniform(0, photo.width - crop_w), rng.uniform(0, photo.height - crop_h)
    picture = photo.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + crop_w, y + crop_h))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    tint = Image.new("RGB", size, tuple(rng.randint(90, 225) for _ in range(3)))
    return Image.blend(picture, tint, rng.uniform(0.1, 0.35))


@cache
def _turned(name: str, mirrored: bool, degrees: int) -> Image.Image:
    picture = object_picture(name)
    if mirrored:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return picture.crop(picture.getchannel("A").point(_SOLID).getbbox())


def turned(rng: Random, name: str) -> Image.Image:
    """An object turned, flipped and lit, cut tightly at the scale of the asset; RGBA."""
    picture = _turned(name, rng.random() < 0.5, rng.choice(ANGLES))
    light = rng.uniform(0.8, 1.12)
    return picture.point([min(255, int(value * light)) for value in range(256)] * 3 + _SAME)


def scaled(picture: Image.Image, longest_px: float) -> tuple[int, int]:
    """Size in whole pixels with the longer side at `longest_px`."""
    scale = longest_px / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def paste(image: Image.Image, picture: Image.Image, x: int, y: int, shadow_px: int = 0) -> tuple[PxBox, Image.Image]:
    """Paste a cut-out with a soft shadow; returns its box and its ink."""
    ink = picture.getchannel("A")
    if shadow_px:
        image.paste((0, 0, 0), (x + shadow_px, y + shadow_px), ink.point(_SHADE))
    image.paste(picture, (x, y), ink)
    return (x, y, x + picture.width, y + picture.height), ink


def scene(rng: Random, split: Split, look: Look) -> Scene:
    """A photograph with named objects on it."""
    width, height = draw_size(rng, look)
    u = max(width, height) / 128
    labels = draw_labels(rng, [names(look)] * rng.randint(*look.num_objects), split)
    image = background(rng, (width, height), split)
    pictures = [turned(rng, label) for label in labels]
    low, high = look.object_u
    area = (1.0, 1.0, width - 1.0, height - 1.0)
    for attempt in range(60):
        top = high - (high - low) * min(1.0, attempt / 20)
        sizes = [scaled(picture, rng.uniform(low, top) * u) for picture in pictures]
        corners = place(rng, area, sizes, look.gap_u * u)
        if corners is not None:
            break
    else:
        raise ValueError(f"{len(labels)} objects do not fit into {width} x {height} px; lower num_objects or object_u")
    things = []
    for label, picture, size, (x, y) in zip(labels, pictures, sizes, corners, strict=True):
        cut_out = picture.resize(size, Image.Resampling.BICUBIC)
        box, ink = paste(image, cut_out, round(x), round(y), round(1.2 * u))
        things.append(Thing(label, "object", box, ink))
    return Scene(image, tuple(things))
