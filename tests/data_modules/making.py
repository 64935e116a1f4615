"""Small real parts for the tests of the stream: samples, sources and a processor that tokenises characters."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bestiary.schema import IGNORE, Example, Lengths, Region, RegionKind, RegionRows, Sample, SampleError, Slot, Turn
from data_modules.rules import Rules
from data_modules.shards import ShardSet, write_samples
from data_modules.stream import Stream

LANES = 12
SIDE = 4
IMAGE_POSITIONS = 3


def picture(number: int) -> bytes:
    """A tiny PNG."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number % 256, 7, 9)).save(file, "PNG")
    return file.getvalue()


def sample(source: str, number: int, *, domain: str = "natural", answer: str | None = None) -> Sample:
    """Every third is text only, every other picture has two prompts; answers have different lengths."""
    has_image = number % 3 != 2
    regions = (Region("point", (0.25, 0.5), 1), Region("box", (0.1, 0.2, 0.3, 0.4), 2))
    return Sample(
        key=f"{source}-{number:05d}",
        source=source,
        domain=domain,
        turns=(Turn("human", f"what {number}?"), Turn("assistant", answer or "ab" * (1 + number * 7 % 11))),
        images=(picture(number),) if has_image else (),
        regions=regions if has_image and number % 2 else (),
        meta={"number": number},
    )


def source(
    folder: Path, name: str, count: int, *, per_shard: int = 5, bad: Sequence[int] = (), domain: str = "natural"
) -> ShardSet:
    """A written source; the samples whose numbers are in `bad` have a picture that does not decode."""

    def make() -> Iterator[Sample]:
        for number in range(count):
            made = sample(name, number, domain=domain)
            if number in bad:
                made = Sample(made.key, name, domain, made.turns, (picture(0)[:20],), (), {})
            yield made

    return write_samples(folder, make(), source=name, samples_per_shard=per_shard)


class WholeProcessor:
    """Characters to ids; cannot tell lengths ahead."""

    def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
        slots, regions = self._visual(sample)
        question, answer = (turn.text for turn in sample.turns)
        ids = [0] * len(slots) + [ord(c) for c in question + answer]
        labels = [IGNORE] * (len(slots) + len(question)) + [ord(c) for c in answer]
        pixels = [self._decode(sample, data) for data in sample.images]
        if rng is not None and pixels:
            pixels[0] = pixels[0] + rng.integers(0, 256, pixels[0].shape, dtype=np.uint8)
        return Example(
            ids=np.array(ids, np.int64),
            labels=np.array(labels, np.int64),
            slots=np.array(slots + [Slot.TEXT] * len(question + answer), np.uint8),
            pixels=np.stack(pixels) if pixels else np.zeros((0, 3, SIDE, SIDE), np.uint8),
            regions=regions,
            num_views=2 * len(pixels),
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
        )

    def prompt(self, sample: Sample) -> Example:
        raise NotImplementedError

    def stop_sequences(self) -> list[list[int]]:
        return []

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def _visual(self, sample: Sample) -> tuple[list[int], RegionRows | None]:
        slots: list[int] = [Slot.IMAGE] * (IMAGE_POSITIONS * len(sample.images))
        if not sample.regions:
            return slots, None
        num = len(sample.regions)
        coords = np.array([(*r.coords, 0, 0)[:4] for r in sample.regions], np.float32)
        kinds = np.array([RegionKind.POINT if r.kind == "point" else RegionKind.BOX for r in sample.regions], np.int64)
        rows = RegionRows(coords, kinds, np.ones(num, bool), np.array([num], np.int64))
        return slots + [Slot.REGION] * num, rows

    def _decode(self, sample: Sample, data: bytes) -> np.ndarray:
        try:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        except OSError as error:
            raise SampleError(sample.key, f"image cannot be decoded: {error}") from error


class CharProcessor(WholeProcessor):
    """The same, telling lengths ahead."""

    def lengths(self, sample: Sample) -> Lengths:
        slots, _ = self._visual(sample)
        question, answer = (len(turn.text) for turn in sample.turns)
        return Lengths(len(slots) + question + answer, 2 * len(sample.images), answer)

    def fingerprint(self) -> str:
        return "characters"


def stream(mix: Mapping[str, Any], *, processor: Any = None, skip: Path | None = None, **changes: Any) -> Stream:
    rules = {"seed": 3, "num_lanes": LANES, "max_tokens": 96, "max_views": 8, "bad_budget": 0.5, **changes}
    return Stream(mix, processor or CharProcessor(), Rules(**rules), skip=skip)
