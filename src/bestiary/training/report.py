"""What one optimiser step did, and the running totals: plain data between the step and everything that watches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bestiary.schema import Batch, Segment
from bestiary.training.flight import SeenSample

T = TypeVar("T")

NAMED_COUNTS = ("targets", "tokens", "positions", "samples", "images", "squares", "weighted")
"""Counts of a step over all ranks; `squares` is the sum of squared segment lengths (attention's share of the FLOPs),
`weighted` the number of samples whose loss weight is not 1."""

MASK_ELEMENTS = 1 << 22
"""Elements of the largest mask `sum_by_segment` makes at once (float64: 32 MB)."""


class Names:
    """An ordered set of labels (sources or domains) with stable positions.

    fixed: given up front, the same on every rank; an unknown label raises. Otherwise it grows as labels are met.
    """

    def __init__(self, names: Sequence[str] = (), *, what: str) -> None:
        self.names = list(dict.fromkeys(names))
        self.fixed = bool(names)
        self.what = what

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The label's position; a new label is added unless the set is fixed."""
        if name in self.names:
            return self.names.index(name)
        if self.fixed:
            raise ValueError(f"{self.what} {name!r} is not among those declared for training: {', '.join(self.names)}")
        self.names.append(name)
        return len(self.names) - 1


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimiser step over all ranks, as numbers of the host.

    step: completed steps, from 1. loss: mean over the target tokens of the global batch, whatever the loss weights.
    weighted_loss: what was minimised, sum(weight * token losses) / sum(weight * tokens); None where all weights are 1.
    *_by_source, *_by_domain: only those that occurred. stop_signals: (SIGINTs, SIGTERMs) seen by any rank.
    keys, states: lane -> sample keys, lane -> state after the step; samples: with their losses; this rank's lanes only.
    measured: what a variant measures beside, by its name in wandb.
    """

    step: int
    loss: float
    weighted_loss: float | None
    lr: float
    grad_norm: float
    counts: dict[str, int]
    loss_by_source: dict[str, float]
    loss_by_domain: dict[str, float]
    targets_by_source: dict[str, int]
    samples_by_source: dict[str, int]
    tokens_by_source: dict[str, int]
    stop_signals: tuple[int, int]
    keys: dict[int, list[str]]
    states: dict[int, bytes]
    samples: tuple[SeenSample, ...]
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def fill(self) -> float:
        """Share of positions that are not padding."""
        return self.counts["tokens"] / max(1, self.counts["positions"])


@dataclass(slots=True)
class Totals:
    """What a run has seen since its first step."""

    samples: int = 0
    tokens: int = 0
    targets: int = 0
    samples_by_source: dict[str, int] = field(default_factory=dict)
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    targets_by_source: dict[str, int] = field(default_factory=dict)

    def add(self, report: StepReport) -> None:
        """Count one more step."""
        self.samples += report.counts["samples"]
        self.tokens += report.counts["tokens"]
        self.targets += report.counts["targets"]
        for mine, theirs in (
            (self.samples_by_source, report.samples_by_source),
            (self.tokens_by_source, report.tokens_by_source),
            (self.targets_by_source, report.targets_by_source),
        ):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count


def shares(counts: dict[str, int]) -> dict[str, float]:
    """Counts to fractions of their sum."""
    total = max(1, sum(counts.values()))
    return {name: round(count / total, 6) for name, count in sorted(counts.items())}


def count_step(batches: Sequence[Batch], sources: Names, domains: Names) -> torch.Tensor:
    """The host's counts of a rank's micro-batches, as one float64 vector that may be summed over ranks.

    Order: NAMED_COUNTS, then samples, tokens and targets by source, then targets by domain; the last number is the sum
    of targets times loss weights.
    """
    segments = [s for batch in batches for s in batch.segments]
    places = [(sources.index(s.source), domains.index(s.domain)) for s in segments]
    per_source = [[0] * len(sources) for _ in range(3)]
    per_domain = [0] * len(domains)
    for segment, (source, domain) in zip(segments, places, strict=True):
        for row, value in zip(per_source, (1, segment.length, segment.num_targets), strict=True):
            row[source] += value
        per_domain[domain] += segment.num_targets
    named = {
        "targets": sum(s.num_targets for s in segments),
        "tokens": sum(s.length for s in segments),
        "positions": sum(batch.ids.numel() for batch in batches),
        "samples": len(segments),
        "images": sum(len(batch.pixels) for batch in batches),
        "squares": sum(s.length**2 for s in segments),
        "weighted": sum(s.loss_weight != 1 for s in segments),
    }
    weight = sum(s.num_targets * float(s.loss_weight) for s in segments)
    counts = [named[name] for name in NAMED_COUNTS]
    return torch.tensor([*counts, *chain(*per_source), *per_domain, weight], dtype=torch.float64)


def sum_losses(values: torch.Tensor, segment: torch.Tensor, labels: Sequence[int], num_labels: int) -> torch.Tensor:
    """Token losses summed by label, float64[num_labels].

    values: float[K]; segment: int64[K], each token's segment; labels: the label of every segment. A masked sum and
    no scatter: its order is fixed on every device, so a repeated step repeats the bits.
    """
    table = torch.tensor(list(labels) or [0], dtype=torch.int64, device=values.device)
    is_label = table[segment][:, None] == torch.arange(num_labels, device=values.device)
    return (values.detach().double()[:, None] * is_label).sum(0)


def sum_by_segment(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Token losses summed by segment, float64[num_segments]; values and segment as for `sum_losses`.

    Masked like there, and by parts, so that memory stays bounded; a token's NaN stays with its own segment.
    """
    doubles, part = values.detach().double()[:, None], max(1, MASK_ELEMENTS // max(1, len(values)))
    sums = []
    for start in range(0, num_segments, part):
        labels = torch.arange(start, min(start + part, num_segments), device=values.device)
        sums.append(torch.where(segment[:, None] == labels, doubles, 0.0).sum(0))
    return torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)


def loss_weights(batch: Batch, device: torch.device) -> torch.Tensor | None:
    """The loss weight of every segment, float64[S]; None where all are 1 and nothing needs multiplying."""
    weights = [float(segment.loss_weight) for segment in batch.segments]
    if all(weight == 1 for weight in weights):
        return None
    return torch.tensor(weights, dtype=torch.float64, device=device)


def seen_samples(batches: Sequence[Batch], sums: Iterator[float]) -> Iterator[SeenSample]:
    """A rank's samples with their mean losses; sums: of the token losses, one a segment, in the batches' order."""
    for lane, segment in _with_lanes(batches):
        total, targets = next(sums), segment.num_targets
        loss = total / targets if targets else None
        yield SeenSample(lane, segment.source, segment.key, segment.length, targets, loss)


def _with_lanes(batches: Sequence[Batch]) -> Iterator[tuple[int, Segment]]:
    """(lane, segment) in the batches' order; the row's number stands in where a batch has no lanes."""
    row_offset = 0
    for batch in batches:
        for segment in batch.segments:
            yield batch.lanes[segment.row] if batch.lanes else row_offset + segment.row, segment
        row_offset += len(batch.ids)


def keys_by_lane(batches: Sequence[Batch]) -> dict[int, list[str]]:
    """Sample keys of every lane (the row's number where a batch has no lanes)."""
    keys: dict[int, list[str]] = {}
    row_offset = 0
    for batch in batches:
        for row in range(len(batch.ids)):
            lane = batch.lanes[row] if batch.lanes else row_offset + row
            keys.setdefault(lane, []).extend(s.key for s in batch.segments if s.row == row)
        row_offset += len(batch.ids)
    return keys


def states_by_lane(batches: Sequence[Batch]) -> dict[int, bytes]:
    """The state after the step of every lane."""
    return {lane: state for batch in batches for lane, state in zip(batch.lanes, batch.states, strict=True)}


def gather_objects(mine: T) -> list[T]:
    """One small picklable object of every rank, in rank order; all ranks call."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def metrics_record(report: StepReport, totals: Totals) -> dict[str, Any]:
    """The part of a metrics line that an uninterrupted run would repeat bit for bit."""
    weighted = {} if report.weighted_loss is None else {"weighted_loss": report.weighted_loss}
    return {
        "step": report.step,
        "loss": report.loss,
        **weighted,
        "loss_by_domain": report.loss_by_domain,
        "loss_by_source": report.loss_by_source,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens": report.counts["tokens"],
        "targets": report.counts["targets"],
        "samples": report.counts["samples"],
        "fill": round(report.fill, 6),
        "samples_seen": totals.samples,
        "tokens_seen": totals.tokens,
        "targets_seen": totals.targets,
        "mix_samples": shares(totals.samples_by_source),
        "mix_tokens": shares(totals.tokens_by_source),
        "mix_targets": shares(totals.targets_by_source),
        **({"measured": report.measured} if report.measured else {}),
    }
