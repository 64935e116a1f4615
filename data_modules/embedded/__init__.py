"""Embedded data: four picture domains with true labels, made deterministically from small real assets.

`generate` gives one sample and `scene` one picture; `build` writes everything the demo needs as shards.
"""

from .build import build, part_sample, source_names
from .generate import DOMAINS, generate, scene
from .scene import LOOK, Look, Scene, Thing

__all__ = ["DOMAINS", "LOOK", "Look", "Scene", "Thing", "build", "generate", "part_sample", "scene", "source_names"]
