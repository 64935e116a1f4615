"""The words every floor speaks: Sample, Turn, Region, Example, Batch.

A `Sample` is what a shard record means, whatever the model. A variant's Processor turns it into an `Example`
(token ids, labels, pixels). Packing turns Examples into a `Batch`. Nothing here knows a model, a file or a framework
beyond numpy and torch tensors as containers.

Shape letters: B rows, T positions of a row, N images of the batch, S side of the square canvas in pixels,
R region rows (prompt slots) of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a position that carries no loss (torch's cross-entropy default)."""
IMAGE_TAG = "<image>"
"""Where a picture stands in a turn's text, in data that says so; the k-th tag is the k-th picture."""


class Slot(IntEnum):
    """What a position of a row holds: a text token, a row of visual embeddings, a row of prompt embeddings, or a mark.

    A mark is one of a few learned rows that stand around and between pictures; its id says which, from 0.
    """

    TEXT = 0
    IMAGE = 1
    REGION = 2
    MARK = 3


class RegionKind(IntEnum):
    """How the prompt encoder reads a region row. A stroke reaches the model as the box around it."""

    POINT = 0
    BOX = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Literal["human", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Region:
    """One visual prompt on the first image of a sample.

    kind: "point" (x, y), "box" (x0, y0, x1, y1) or "stroke" (x0, y0, x1, y1, x2, y2, ... a polyline).
    coords: fractions of the ORIGINAL image, [0, 1], x to the right, y down.
    mark: the number the text speaks of (`<Mark 1>`, `<Region 1>`), from 1.
    """

    kind: Literal["point", "box", "stroke"]
    coords: tuple[float, ...]
    mark: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The box around the region (a point's has no area), same frame as `coords`."""
        xs, ys = self.coords[0::2], self.coords[1::2]
        return (min(xs), min(ys), max(xs), max(ys))


@dataclass(frozen=True, slots=True)
class Sample:
    """One record of a data set, independent of any model.

    images: encoded bytes (JPEG, PNG); decoded by the processor, in the worker. A memoryview is a slice of a mapped
        shard that nobody copied yet.
    meta: JSON-like facts that no model needs (task, size of the original image, true labels by mark ...).
    """

    key: str
    source: str
    domain: str
    turns: tuple[Turn, ...]
    images: tuple[bytes | memoryview, ...] = ()
    regions: tuple[Region, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RegionRows:
    """The prompt slots of one example or one batch, in the order of their REGION positions.

    coords: float32[R, 4], fractions of the PADDED SQUARE: a point is (x, y, 0, 0), a box (x0, y0, x1, y1).
    kinds: int64[R] of RegionKind. valid: bool[R]; False marks an empty slot (coords 0).
    counts: int64[E], slots of each example, in order; empty tuple of examples without prompts are left out.
    """

    coords: np.ndarray | torch.Tensor
    kinds: np.ndarray | torch.Tensor
    valid: np.ndarray | torch.Tensor
    counts: np.ndarray | torch.Tensor


class Lengths(NamedTuple):
    """What a sample will take in a row: positions, encoder views, and positions that carry loss."""

    tokens: int
    views: int
    targets: int


@dataclass(frozen=True, slots=True)
class Example:
    """What a variant's Processor makes of a Sample.

    ids: int64[T] token ids; 0 where `slots` is IMAGE or REGION, the mark's number where it is MARK.
    labels: int64[T]: the id itself where the position is learned (NOT shifted), IGNORE elsewhere.
    slots: uint8[T] of Slot. The number of IMAGE positions equals the rows the vision part will return for `pixels`,
        the number of REGION positions the rows of the region encoder: the processor is the only author of both counts.
    pixels: uint8[N, 3, S, S] square canvases in RGB (N = 0 for text only); views are cut from them on the device.
        A variant may have other channels (Ovis: RGB and what the picture covers) and several canvases a picture.
    regions: the prompt slots, or None without prompts.
    num_views: views the encoders will see, the second budget of the packer.
    loss_weight: factor on every token's loss, the source's `loss_weight`.
    """

    ids: np.ndarray
    labels: np.ndarray
    slots: np.ndarray
    pixels: np.ndarray
    regions: RegionRows | None
    num_views: int
    key: str
    source: str
    domain: str
    loss_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Label positions that carry loss: position 0 has no predictor, so it never counts."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class Segment:
    """One example inside a packed batch: where it lies and what it was."""

    key: str
    source: str
    domain: str
    row: int
    start: int
    length: int
    num_targets: int
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows of one micro-batch.

    ids, labels: int64[B, T]; slots: uint8[B, T]; positions: int64[B, T], restarting at 0 in every segment;
    segment_ids: int32[B, T], 0 for padding, 1.. numbering the segments of a row from the left.
    segments: all segments in row-major order; segments never attend to one another.
    pixels: uint8[N, 3, S, S] and regions: in row-major order of their positions. regions is None without any prompt.
    lanes: the global lane number of every row; states: the lane's state after the row (opaque bytes).
    step: the optimiser step these rows belong to, from 0.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    segment_ids: torch.Tensor
    segments: tuple[Segment, ...]
    pixels: torch.Tensor
    regions: RegionRows | None
    lanes: tuple[int, ...] = ()
    states: tuple[bytes, ...] = ()
    step: int = 0

    @property
    def num_targets(self) -> int:
        """Positions that carry loss; known without touching the device."""
        return sum(s.num_targets for s in self.segments)

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return sum(s.length for s in self.segments)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(x: Any) -> Any:
            return x.to(device, non_blocking=non_blocking)

        regions = self.regions
        if regions is not None:
            regions = RegionRows(move(regions.coords), move(regions.kinds), move(regions.valid), move(regions.counts))
        return replace(
            self,
            ids=move(self.ids),
            labels=move(self.labels),
            slots=move(self.slots),
            positions=move(self.positions),
            segment_ids=move(self.segment_ids),
            pixels=move(self.pixels),
            regions=regions,
        )


class Processor(Protocol):
    """A variant's only author of sequences: picklable, holds no model, raises SampleError on bad input."""

    def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
        """A training example. `rng` drives augmentation (box jitter); None means none."""

    def prompt(self, sample: Sample, *, answer_start: str = "") -> Example:
        """The sequence up to and including the open assistant turn after the last human turn; labels all IGNORE.

        answer_start: the answer's first words, which the model is to continue (" The answer is").
        """

    def stop_sequences(self) -> list[list[int]]:
        """Token sequences that end an answer (the end-of-sequence id is one of them)."""

    def decode(self, ids: list[int]) -> str:
        """Generated ids to text, stripped."""


_HEAD, _TAIL = 320, 120
"""Characters that stay of a long problem, at its beginning and its end."""


class SampleError(ValueError):
    """Bad data in one sample: one line that names the key, the value and the remedy, long values cut in the middle."""

    def __init__(self, key: str, problem: str) -> None:
        problem = _shortened(problem)
        super().__init__(_one_line(f"sample {_shortened(key)}: {problem}"))
        self.key = key
        self.problem = problem

    def __reduce__(self) -> tuple[type[SampleError], tuple[Any, ...]]:
        return SampleError, (self.key, self.problem)


class SampleTooLongError(SampleError):
    """A sound sample that does not fit into a row of `max_tokens` positions."""

    def __init__(self, key: str, problem: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(key, problem)
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens

    def __reduce__(self) -> tuple[type[SampleError], tuple[Any, ...]]:
        return SampleTooLongError, (self.key, self.problem, self.num_tokens, self.max_tokens)


def _shortened(text: str) -> str:
    """The beginning (where and what) and the end (the remedy): a value may be a million numbers of somebody else's."""
    if len(text) <= _HEAD + _TAIL:
        return text
    return f"{text[:_HEAD]} ... {text[-_TAIL:]}"


def _one_line(text: str) -> str:
    """The text with what could break a line or speak to a terminal spelled out: keys and values are other people's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
