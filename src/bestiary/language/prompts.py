"""Examples side by side in one row: what generation and scoring run on, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bestiary.schema import Batch, Example, RegionRows, Segment


def side_by_side(examples: Sequence[Example], device: torch.device) -> tuple[Batch, Tensor | None]:
    """Examples side by side in one row; equal images are kept once, and the index says which is whose."""
    lengths = [len(example) for example in examples]
    starts = np.cumsum([0, *lengths])
    segments = tuple(
        Segment(e.key, e.source, e.domain, 0, int(start), len(e), e.num_targets)
        for e, start in zip(examples, starts, strict=False)
    )
    pixels, image_index = _unique_images(examples)
    batch = Batch(
        ids=_row([e.ids for e in examples], np.int64),
        labels=_row([e.labels for e in examples], np.int64),
        slots=_row([e.slots for e in examples], np.uint8),
        positions=_row([np.arange(n) for n in lengths], np.int64),
        segment_ids=_row([np.full(n, i) for i, n in enumerate(lengths, start=1)], np.int32),
        segments=segments,
        pixels=pixels,
        regions=_joined([e.regions for e in examples if e.regions is not None]),
    )
    return batch.to(device), None if image_index is None else image_index.to(device)


def _row(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))[None]


def _joined(regions: Sequence[RegionRows]) -> RegionRows | None:
    """The prompts of several examples as one."""
    if not regions:
        return None

    def join(parts: Sequence[np.ndarray | Tensor]) -> Tensor:
        return torch.cat([torch.as_tensor(part) for part in parts])

    return RegionRows(
        join([r.coords for r in regions]),
        join([r.kinds for r in regions]),
        join([r.valid for r in regions]),
        join([r.counts for r in regions]),
    )


def _unique_images(examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
    """The different images [U, 3, S, S] and, where some are equal, the place of each image among them."""
    images = [image for example in examples for image in example.pixels]
    places: dict[bytes, int] = {}
    index = []
    unique: list[np.ndarray] = []
    for image in images:
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        if digest not in places:
            places[digest] = len(unique)
            unique.append(image)
        index.append(places[digest])
    if not images:
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), None
    pixels = torch.from_numpy(np.stack(unique))
    return pixels, torch.tensor(index) if len(unique) < len(images) else None
