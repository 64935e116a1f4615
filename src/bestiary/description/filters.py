"""Which descriptions are kept: the published thresholds, and one of several equal captions of one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bestiary.description.words import Box, Described

# Source of all numbers: data_generation/add_all_json.py. A score must be larger, not equal.
REGION_SCORE = 0.4
TEXT_SCORE = 0.85
SEGMENT_SCORE = 0.5
SAME_PLACE_IOU = 0.6
"""An equal caption is dropped from this overlap with the first kept one on."""

Overlap = Literal["exact", "published"]
"""published counts one more in width and height, as for pixels that include both edges, though boxes are shares: places
apart overlap by 0.07, neighbours by far too much. Wrong, and what the published captions were made with."""


def iou(a: Sequence[float], b: Sequence[float], *, overlap: Overlap = "exact") -> float:
    """Intersection over union of two [x1, y1, x2, y2] boxes; 0 for two boxes without any area."""
    extra = 1.0 if overlap == "published" else 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + extra)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + extra)
    shared = width * height
    whole = sum((box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)) - shared
    return shared / whole if whole > 0 else 0.0


def above(described: Sequence[Described], threshold: float) -> list[Described]:
    """Those with a score above the threshold; ValueError for one that nobody scored."""
    for one in described:
        if one.score is None:
            raise ValueError(f"{one.caption!r:.60} has no score to compare with {threshold}; let a matcher score it")
    return [one for one in described if one.score is not None and one.score > threshold]


def without_repeats(
    described: Sequence[Described], *, threshold: float = SAME_PLACE_IOU, overlap: Overlap = "exact"
) -> list[Described]:
    """Without those whose caption was kept before at the same place.

    The place is that of the FIRST one kept with the caption: later ones are kept without becoming a place.
    """
    first: dict[str, Box] = {}
    kept = []
    for one in described:
        if one.caption not in first:
            first[one.caption] = one.box
        elif iou(first[one.caption], one.box, overlap=overlap) >= threshold:
            continue
        kept.append(one)
    return kept
