"""Embedded data: four picture domains with true labels, made deterministically from small real assets.

`generate` gives one sample with marks and `scene` one picture; `build` writes all marked sources as shards.
`plain_sample` gives one sample without marks, or without a picture; `build_plain` writes such sources.
"""

from .build import build, part_sample, source_names
from .generate import DOMAINS, generate, scene
from .plain import build_plain, plain_sample, plain_source_names
from .scene import LOOK, Look, Scene, Thing

__all__ = [
    "DOMAINS",
    "LOOK",
    "Look",
    "Scene",
    "Thing",
    "build",
    "build_plain",
    "generate",
    "part_sample",
    "plain_sample",
    "plain_source_names",
    "scene",
    "source_names",
]
