"""Rows of examples to one padded batch.

A row is what one lane emits at one step: the examples packed side by side. Padding goes to the longest row of the
micro-batch only, so a row's numbers never depend on which other rows it is collated with.

Shape letters as in `bestiary.schema`: B rows, T positions, N images, R region rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bestiary.schema import IGNORE, Batch, Example, RegionRows, Segment


def collate_rows(
    rows: Sequence[Sequence[Example]],
    *,
    lanes: Sequence[int] = (),
    states: Sequence[bytes] = (),
    step: int = 0,
    pad_to: int | None = None,
) -> Batch:
    """One micro-batch of packed rows.

    rows: the examples of each row, left to right; a row may be empty (every sample of it was damaged).
    lanes, states: one per row, or nothing. pad_to: width T; None means the longest row (at least 1).
    The label at the first position of a segment becomes IGNORE: nothing inside the segment predicts it.
    """
    for name, given in (("lanes", lanes), ("states", states)):
        if given and len(given) != len(rows):
            raise ValueError(f"{len(given)} {name} for {len(rows)} rows; give one per row or none")
    longest = max((sum(len(example) for example in row) for row in rows), default=0)
    width = max(longest, 1) if pad_to is None else pad_to
    if width < longest:
        raise ValueError(f"pad_to={width} is shorter than the longest row ({longest} positions)")
    shape = (len(rows), width)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    slots, positions, segment_ids = np.zeros(shape, np.uint8), np.zeros(shape, np.int64), np.zeros(shape, np.int32)
    segments: list[Segment] = []
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            length = len(example)
            span = slice(start, start + length)
            ids[b, span], slots[b, span] = example.ids, example.slots
            labels[b, start + 1 : start + length] = example.labels[1:]
            positions[b, span] = np.arange(length)
            segment_ids[b, span] = number
            segments.append(_segment(example, b, start))
            start += length
    examples = [example for row in rows for example in row]
    return Batch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        slots=torch.from_numpy(slots),
        positions=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segment_ids),
        segments=tuple(segments),
        pixels=torch.from_numpy(_join_pixels(examples)),
        regions=_join_regions(examples),
        lanes=tuple(lanes),
        states=tuple(states),
        step=step,
    )


def _segment(example: Example, row: int, start: int) -> Segment:
    """Where an example lies in a batch."""
    return Segment(
        key=example.key,
        source=example.source,
        domain=example.domain,
        row=row,
        start=start,
        length=len(example),
        num_targets=example.num_targets,
        loss_weight=example.loss_weight,
    )


def _join_pixels(examples: Sequence[Example]) -> np.ndarray:
    """uint8[N, 3, S, S] of all examples in order; [0, 3, S, S] without any image."""
    if not examples:
        return np.zeros((0, 3, 0, 0), np.uint8)
    with_images = [example for example in examples if len(example.pixels)] or [examples[0]]
    shapes = {example.pixels.shape[1:] for example in with_images}
    if len(shapes) > 1:
        keys = {example.pixels.shape[1:]: example.key for example in with_images}
        raise ValueError(f"canvases of different shapes in one batch: {keys}; one processor makes one canvas size")
    return np.concatenate([example.pixels for example in with_images])


def _join_regions(examples: Sequence[Example]) -> RegionRows | None:
    """The prompt slots of all examples in order, as tensors; None without any."""
    found = [example.regions for example in examples if example.regions is not None and len(example.regions.valid)]
    if not found:
        return None

    def join(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(getattr(rows, name)) for rows in found]))

    return RegionRows(coords=join("coords"), kinds=join("kinds"), valid=join("valid"), counts=join("counts"))
