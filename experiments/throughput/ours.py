"""The project's own stream in the benchmark: the whole of it, never a bare loop over shards.

`read` hands out samples undecoded through `Stream.samples`: order, mixture, damage rules and states included.
`prepare` runs rows through the loader with a processor that decodes, pads and resizes as the variants' processors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.schema import IGNORE, Example, Lengths, Sample, Slot
from data_modules.rules import Rules
from data_modules.stream import Stream

SIDE = 448
LANES = 8
"""Divides every number of samples here, so that the first epoch ends with a step."""


class NumberProcessor:
    """One position a sample: what the stream itself costs."""

    num_views = 0

    def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
        ids = np.ones(2, np.int64)
        return Example(
            ids=ids,
            labels=np.full(2, IGNORE),
            slots=np.full(2, Slot.TEXT, np.uint8),
            pixels=self.pixels(sample),
            regions=None,
            num_views=self.num_views,
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
        )

    def pixels(self, sample: Sample) -> np.ndarray:
        """uint8[N, 3, S, S]."""
        return np.zeros((0, 3, 1, 1), np.uint8)

    def lengths(self, sample: Sample) -> Lengths:
        """Two positions."""
        return Lengths(2, self.num_views, 0)


class PictureProcessor(NumberProcessor):
    """The picture of a sample as the encoders' canvas."""

    num_views = 1

    def pixels(self, sample: Sample) -> np.ndarray:
        """uint8[1, 3, 448, 448]."""
        return canvas_of(sample.images[0], SIDE)[None]


def canvas_of(image: bytes | memoryview, side: int) -> np.ndarray:
    """A picture decoded, padded and resized as the variants' processors do it: uint8[3, side, side]."""
    from bestiary.vision.canvas import canvas_CHW, eighths_for_square
    from bestiary.vision.image import decode

    picture = decode(image, eighths=lambda width, height: eighths_for_square(width, height, side), has_spare_byte=True)
    return canvas_CHW(picture, side)


def rules(num_lanes: int, *, seed: int = 0) -> Rules:
    """One sample a row."""
    return Rules(seed=seed, num_lanes=num_lanes, max_tokens=2, packing=False)


def stream_over(folder: Path, *, num_lanes: int = LANES, processor: Any = None, seed: int = 0) -> Stream:
    """A stream over one source."""
    return Stream({"photos": {"path": str(folder)}}, processor or NumberProcessor(), rules(num_lanes, seed=seed))


def open_contender(
    task: str, folder: str, *, copy: bool = False, lanes: int = 1
) -> Callable[[], Iterator[tuple[Any, ...]]]:
    """Epochs of the stream over `<folder>/ours`.

    copy: turn the pictures, slices of a map, into bytes of their own. lanes: rows of a step; must divide the samples.
    """
    if task != "read":
        return _prepare(Path(folder) / "ours")
    stream = stream_over(Path(folder) / "ours", num_lanes=lanes)
    steps = len(stream.plan.sources[0]) // lanes
    reader = iter(stream.samples())

    def read() -> Iterator[tuple[Any, ...]]:
        for samples in islice(reader, steps):
            for sample in samples:
                image = sample.images[0]
                yield sample.key, sample, bytes(image) if copy else image

    return read


def _prepare(folder: Path) -> Callable[[], Iterator[tuple[Any, ...]]]:
    stream = stream_over(folder, processor=PictureProcessor())
    steps = len(stream.plan.sources[0]) // LANES
    batches = iter(stream.loader(range(LANES)))

    def prepare() -> Iterator[tuple[Any, ...]]:
        for (batch,) in islice(batches, steps):
            for segment, pixels in zip(batch.segments, batch.pixels, strict=True):
                yield segment.key, pixels

    return prepare
