"""Small drawn scenes, and stand-ins for a model and its processor that answer from the scene."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from bestiary.schema import IGNORE, Example, Region, RegionKind, RegionRows, Sample, Slot, Turn

NAMES = ("cup", "fork", "lamp", "shoe", "book", "kite")
CENTRES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
KINDS = ("point", "box", "stroke")


@dataclass(frozen=True)
class Scene:
    """A picture with one named thing in each quarter."""

    sample: Sample
    names: tuple[str, ...]


def region(kind: str, centre: tuple[float, float], mark: int, half: float = 0.1) -> Region:
    x, y = centre
    match kind:
        case "point":
            return Region("point", (x, y), mark)
        case "box":
            return Region("box", (x - half, y - half, x + half, y + half), mark)
        case _:
            return Region("stroke", (x - half, y, x, y - half, x + half, y, x, y + half), mark)


def picture(names: Sequence[str], size: tuple[int, int] = (160, 120)) -> bytes:
    image = Image.new("RGB", size, (226, 232, 238))
    draw = ImageDraw.Draw(image)
    for i, (name, (x, y)) in enumerate(zip(names, CENTRES, strict=False)):
        shade = (90 + 30 * (i % 5), 130, 200 - 25 * (i % 5))
        box = ((x - 0.15) * size[0], (y - 0.15) * size[1], (x + 0.15) * size[0], (y + 0.15) * size[1])
        draw.ellipse(box, fill=shade)
        draw.text((x * size[0], y * size[1]), name, fill=(255, 255, 255), anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def scene(i: int, *, task: str = "label", num_marks: int | None = None) -> Scene:
    rng = np.random.default_rng(i)
    names = tuple(str(name) for name in rng.permutation(NAMES)[:4])
    marked = rng.permutation(4)[: num_marks or 1 + i % 3]
    kind = KINDS[i % 3]
    regions = tuple(region(kind, CENTRES[int(q)], mark) for mark, q in enumerate(marked, start=1))
    noun = "Mark" if kind == "point" else "Region"
    answer = "\n".join(f"{noun} {mark}: {names[int(q)]}" for mark, q in enumerate(marked, start=1))
    turns = (
        Turn("human", f"Please identify the labels of every {noun.lower()} in the image."),
        Turn("assistant", answer),
    )
    sample = Sample(
        key=f"scene-{i:03d}",
        source="drawn",
        domain=("natural", "document")[i % 2],
        turns=turns,
        images=(picture(names),),
        regions=regions,
        meta={"task": task},
    )
    return Scene(sample, names)


def example(sample: Sample) -> Example:
    """Text-free prompt that carries the regions as they were asked."""
    kinds = [RegionKind.POINT if r.kind == "point" else RegionKind.BOX for r in sample.regions]
    num = len(kinds)
    rows = RegionRows(
        coords=np.array([r.box for r in sample.regions], np.float32).reshape(num, 4),
        kinds=np.array(kinds, np.int64),
        valid=np.ones(num, bool),
        counts=np.array([num], np.int64),
    )
    return Example(
        ids=np.zeros(num, np.int64),
        labels=np.full(num, IGNORE, np.int64),
        slots=np.full(num, Slot.REGION, np.uint8),
        pixels=np.zeros((0, 3, 1, 1), np.uint8),
        regions=rows if num else None,
        num_views=0,
        key=sample.key,
        source=sample.source,
        domain=sample.domain,
    )


class StandInProcessor:
    """Letters are ids; keeps what it was asked to turn into examples and prompts, in order, and the first words."""

    def __init__(self) -> None:
        self.seen: list[Sample] = []
        self.starts: list[str] = []

    def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
        self.seen.append(sample)
        return example(sample)

    def prompt(self, sample: Sample, *, answer_start: str = "") -> Example:
        self.starts.append(answer_start)
        return self(sample)

    def stop_sequences(self) -> list[list[int]]:
        return [[0]]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids)).strip()


class StandInModel(torch.nn.Module):
    """Names what lies under each region of a known scene; a blind one names the picture's first things."""

    def __init__(self, scenes: Sequence[Scene], *, is_blind: bool = False, forget_last: bool = False) -> None:
        super().__init__()
        self._names = {s.sample.key: s.names for s in scenes}
        self._nouns = {s.sample.key: "Mark" if "mark" in s.sample.turns[0].text.split() else "Region" for s in scenes}
        self._is_blind = is_blind
        self._forget_last = forget_last
        self.part = torch.nn.Linear(1, 1)
        self.batch_sizes: list[int] = []
        self.was_training = False

    def generate(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[Sequence[int]] = (),
        seed: int = 0,
    ) -> list[list[int]]:
        self.batch_sizes.append(len(examples))
        self.was_training |= self.training or self.part.training
        return [[ord(letter) for letter in self._answer(e)] for e in examples]

    def _answer(self, prompt: Example) -> str:
        coords = np.zeros((0, 4)) if prompt.regions is None else np.asarray(prompt.regions.coords)
        centres = (coords[:, :2] + coords[:, 2:]) / 2
        distances = np.linalg.norm(centres[:, None] - np.array(CENTRES)[None], axis=-1)
        nearest = np.arange(len(coords)) if self._is_blind else distances.argmin(axis=1)
        noun, names = self._nouns[prompt.key], self._names[prompt.key]
        lines = [f"{noun} {i}: {names[int(q)]}" for i, q in enumerate(nearest, start=1)]
        return "\n".join(lines[: -1 if self._forget_last else None])
