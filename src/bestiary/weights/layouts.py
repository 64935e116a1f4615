"""The published checkpoints there are: one line a variant, and the layouts of parts that its module lists."""

from __future__ import annotations

from pathlib import Path

from bestiary.variants.layouts import Layout
from bestiary.variants.monkey.layout import MONKEY_LAYOUT
from bestiary.variants.ovis.layout import OVIS_LAYOUT
from bestiary.variants.ovis.parts import OVIS_PARTS
from bestiary.variants.parts import Part
from bestiary.variants.sphinx.parts import sphinx_parts
from bestiary.variants.sphinx.weights import SPHINX_RULES
from bestiary.variants.sphinx_v.layout import SPHINX_LAYOUT
from bestiary.variants.sphinx_v.sam import SAM_PARTS

LAYOUTS: tuple[Layout, ...] = (SPHINX_LAYOUT, OVIS_LAYOUT, MONKEY_LAYOUT)
"""Of whole models; the first that recognises a path reads it."""
PARTS: tuple[Part, ...] = (*sphinx_parts(SPHINX_RULES), *SAM_PARTS, *OVIS_PARTS)
"""Public weights of single parts; the first that recognises a folder reads it."""
FORMATS = tuple(name for layout in LAYOUTS for name in layout.formats)
"""Words of `--layout`."""


def layout_of(path: Path) -> Layout | None:
    """The layout that recognises a path; None where no whole model lies there."""
    return next((layout for layout in LAYOUTS if layout.recognises(path)), None)


def layout_called(name: str) -> Layout:
    """The layout that writes this format."""
    for layout in LAYOUTS:
        if name in layout.formats:
            return layout
    raise ValueError(f"published.json names the layout {name!r}, which is none of {', '.join(FORMATS)}")
