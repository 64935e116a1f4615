"""From (domain, seed, index, split) to a picture and to a Sample: pure functions, no state but cached assets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from PIL import Image

from bestiary.schema import Sample

from . import document, multi_panel, natural, screenshot
from .assets import Split
from .scene import LOOK, Look, Scene
from .tasks import KINDS, TASKS_OF_DOMAIN, Kind, facts, talk

Domain = Literal["natural", "screenshot", "document", "multi_panel"]
DOMAINS: tuple[Domain, ...] = ("natural", "screenshot", "document", "multi_panel")

ALL_TASKS: Mapping[str, float] = {"label": 4, "ocr": 4, "caption": 1, "relation": 1, "qa": 2}
"""Weights of the tasks; those that a domain does not have are left out."""

_SCENES = {
    "natural": natural.scene,
    "screenshot": screenshot.scene,
    "document": document.scene,
    "multi_panel": multi_panel.scene,
}


def scene(domain: Domain, seed: int, index: int, split: Split, *, look: Look = LOOK) -> Scene:
    """The picture (RGB PIL image) with everything markable in it: label, kind and pixel box."""
    return _SCENES[domain](Random(f"scene/{domain}/{split}/{seed}/{index}"), split, look)


def generate(
    domain: Domain,
    seed: int,
    index: int,
    split: Split,
    *,
    num_marks: tuple[int, int] = (1, 4),
    kinds: Sequence[Kind] = KINDS,
    tasks: Mapping[str, float] | Sequence[str] = ALL_TASKS,
    mixed: float = 0.05,
    two_turns: float = 0.2,
    source: str = "",
    look: Look = LOOK,
) -> Sample:
    """One sample: a picture, marks on it, a conversation, and all truth in `meta`.

    num_marks: smallest and largest number of marks (a relation always has two).
    tasks: weights by name, or names of equal weight; names a domain does not have are left out.
    mixed: share of samples whose marks are of several kinds. two_turns: share of questions with a second one.
    """
    rng = Random(f"talk/{domain}/{split}/{seed}/{index}")
    weights = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    offered = [task for task in TASKS_OF_DOMAIN[domain] if weights.get(task, 0) > 0]
    if not offered:
        raise ValueError(f"domain {domain} has none of the tasks {sorted(weights)}; it has {TASKS_OF_DOMAIN[domain]}")
    task = rng.choices(offered, [weights[name] for name in offered])[0]
    count = 2 if task == "relation" else rng.randint(*num_marks)
    low, high = look.num_objects
    picture = scene(domain, seed, index, split, look=replace(look, num_objects=(max(low, count), max(high, count))))
    told = talk(rng, picture, task=task, num_marks=count, kinds=kinds, mixed=mixed, two_turns=two_turns)
    return Sample(
        key=f"{domain}-{split}-{seed}-{index:08d}",
        source=source or f"{domain}_{split}",
        domain=domain,
        turns=told.turns,
        images=(encode(picture.image, look.jpeg_quality),),
        regions=tuple(mark.region for mark in told.marks),
        meta=facts(told, picture, split),
    )


def encode(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes without chroma subsampling (letters and icons keep their edges)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
