"""SPHINX-V's processor: SPHINX's sequence with visual prompts between the image and the text.

[BOS] [image_rows] [start_vp, slots, end_vp] [text]. There are `num_slots` slots, some of them empty, or more when the
sample has more prompts; a sample without prompts has none of these positions. Published rules: Draw-and-Understand
@ 28a1bd1 (coordinates of the padded square to three decimals, jitter of boxes in training).
"""

from __future__ import annotations

import math
import re

import numpy as np

from bestiary.schema import Region, RegionKind, RegionRows, Sample, Turn
from bestiary.variants.sphinx.processor import Rng, SphinxProcessor
from bestiary.vision.geometry import box_row, box_to_xywh_px, jitter_box, original_to_pixels, point_row

_MARK = re.compile(r"<(?:Mark|Region) (\d+)>|\b(?:Mark|Region) (\d+):")
_OUTSIDE = 1e-6
"""How far beyond the image, in fractions of it, a coordinate may lie: rounding, not a mistake."""


class SphinxVProcessor(SphinxProcessor):
    """Sample -> Example for SPHINX-V: SPHINX's, with points, boxes and strokes as prompt slots.

    num_slots: slots of a sample with prompts, empty ones included; a sample with more prompts gets that many.
    jitter: shake boxes and strokes in training, when an rng is given.
    reference_quirks: besides SPHINX's, what the published prompt path does: only `num_slots` prompts are kept, a point
        at (0, 0) is an empty slot, one box makes all points of the sample boxes, coordinates and prompt numbers in the
        text are not checked.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        canvas_px: int,
        image_rows: int,
        num_views: int,
        max_tokens: int,
        num_slots: int = 10,
        template: str = "current",
        too_long: str = "error",
        reference_quirks: bool = False,
        exact_pil: bool = False,
        jitter: bool = True,
    ) -> None:
        self.num_slots = num_slots
        self.jitter = jitter
        super().__init__(
            tokenizer=tokenizer,
            canvas_px=canvas_px,
            image_rows=image_rows,
            num_views=num_views,
            max_tokens=max_tokens,
            template=template,
            too_long=too_long,
            reference_quirks=reference_quirks,
            exact_pil=exact_pil,
        )
        self._require_room(image_rows + num_slots + 2)

    def _num_region_rows(self, sample: Sample) -> int:
        return self._slots_for(len(sample.regions)) + 2 if sample.regions else 0

    def _slots_for(self, num_prompts: int) -> int:
        return self.num_slots if self.reference_quirks else max(self.num_slots, num_prompts)

    def _region_rows(self, sample: Sample, width: int, height: int, rng: Rng | None) -> RegionRows | None:
        if not sample.regions:
            return None
        regions = sorted(sample.regions, key=lambda region: region.mark)[: self._slots_for(len(sample.regions))]
        coords = np.zeros((self._slots_for(len(regions)), 4), dtype=np.float32)
        # An empty slot is of the first prompt's kind: an empty point beside points, an empty box beside boxes.
        kinds = np.full(len(coords), _kind(regions[0]), dtype=np.int64)
        for row, region in enumerate(regions):
            kinds[row] = _kind(region)
            coords[row, : 2 if kinds[row] == RegionKind.POINT else 4] = self._row(region, width, height, rng)
        valid = np.arange(len(coords)) < len(regions)
        if self.reference_quirks:
            coords, kinds, valid = _as_published(coords, kinds)
        return RegionRows(coords, kinds, valid, np.array([len(coords)], dtype=np.int64))

    def _row(self, region: Region, width: int, height: int, rng: Rng | None) -> tuple[float, ...]:
        if region.kind == "point":
            return point_row(original_to_pixels(region.coords, width, height), width, height)
        box = box_to_xywh_px(region.box, width, height)
        if self.jitter and rng is not None:
            box = jitter_box(box, rng)
        return box_row(box, width, height)

    def _check_regions(self, sample: Sample) -> None:
        if sample.regions and not sample.images:
            raise ValueError(f"{len(sample.regions)} regions but no image; add the image they lie on")
        for region in sample.regions:
            _check_region(region, anywhere=self.reference_quirks)
        marks = sorted(region.mark for region in sample.regions)
        if marks != list(range(1, len(marks) + 1)):
            raise ValueError(f"regions have the marks {marks}; number them 1 to {len(marks)}, each once")
        if not self.reference_quirks:
            for turn in sample.turns:
                _check_marks(turn, len(marks))


def _kind(region: Region) -> RegionKind:
    return RegionKind.POINT if region.kind == "point" else RegionKind.BOX


def _check_marks(turn: Turn, num_regions: int) -> None:
    if turn.role != "human" or not isinstance(turn.text, str):
        return
    for match in _MARK.finditer(turn.text):
        if not 1 <= int(match[1] or match[2]) <= num_regions:
            has = f"the marks 1 to {num_regions}" if num_regions else "no regions"
            raise ValueError(f"the question speaks of {match[0]!r} but the sample has {has}; add the region or reword")


def _check_region(region: Region, *, anywhere: bool) -> None:
    """Raises unless the region is whole and lies on the image; `anywhere` only wants finite numbers."""
    told = f"region {region.mark} ({region.kind} {' '.join(f'{c:.6g}' for c in region.coords)})"
    size = {"point": len(region.coords) == 2, "box": len(region.coords) == 4}
    if not size.get(region.kind, region.kind == "stroke" and len(region.coords) >= 4 and len(region.coords) % 2 == 0):
        raise ValueError(f"{told} has {len(region.coords)} numbers; a point has 2, a box 4, a stroke 4, 6, 8 ...")
    if not all(math.isfinite(c) for c in region.coords):
        raise ValueError(f"{told} is not finite; give fractions of the original image")
    if anywhere:
        return
    if min(region.coords) < -_OUTSIDE or max(region.coords) > 1 + _OUTSIDE:
        raise ValueError(f"{told} lies outside the image; give fractions of it in [0, 1], clip what sticks out")
    if region.kind == "box" and not (region.coords[0] < region.coords[2] and region.coords[1] < region.coords[3]):
        raise ValueError(f"{told} has no size or a negative one; give x0 < x1 and y0 < y1")
    if region.kind == "stroke" and region.box[:2] == region.box[2:]:
        raise ValueError(f"{told} has no length; make it a point")


def _as_published(coords: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slots as the published encoder reads them: one kind a sample, and zeros mean empty.

    A point is (x, y, -1, -1) there. Beside one box it is taken for a box with that second corner, and so is the empty
    slot of a sample that begins with a point.
    """
    is_point = kinds == RegionKind.POINT
    if not is_point.all():
        coords[is_point, 2:] = -1
        kinds = np.full_like(kinds, RegionKind.BOX)
    return coords, kinds, (coords != 0).any(axis=1)
