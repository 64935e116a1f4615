"""What one optimiser step did, and the running totals: plain data between the step and everything that watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bestiary.schema import Batch

T = TypeVar("T")

NAMED_COUNTS = ("targets", "tokens", "positions", "samples", "images", "squares")
"""Counts of a step over all ranks; `squares` is the sum of squared segment lengths (attention's share of the FLOPs)."""


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

    step: completed steps, from 1. loss: mean over the target tokens of the global batch.
    *_by_source, *_by_domain: only those that occurred. stop_signals: (SIGINTs, SIGTERMs) seen by any rank.
    keys, states: lane -> sample keys, lane -> state after the step; this rank's lanes only.
    """

    step: int
    loss: float
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

    def add(self, report: StepReport) -> None:
        """Count one more step."""
        self.samples += report.counts["samples"]
        self.tokens += report.counts["tokens"]
        self.targets += report.counts["targets"]
        for mine, theirs in (
            (self.samples_by_source, report.samples_by_source),
            (self.tokens_by_source, report.tokens_by_source),
        ):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count


def shares(counts: dict[str, int]) -> dict[str, float]:
    """Counts to fractions of their sum."""
    total = max(1, sum(counts.values()))
    return {name: round(count / total, 6) for name, count in sorted(counts.items())}


def count_step(batches: Sequence[Batch], sources: Names, domains: Names) -> torch.Tensor:
    """The host's counts of a rank's micro-batches, as one float64 vector that may be summed over ranks.

    Order: NAMED_COUNTS, then samples, tokens and targets by source, then targets by domain.
    """
    segments = [s for batch in batches for s in batch.segments]
    for segment in segments:
        sources.index(segment.source)
        domains.index(segment.domain)
    per_source = torch.zeros(3, len(sources), dtype=torch.float64)
    per_domain = torch.zeros(len(domains), dtype=torch.float64)
    for segment in segments:
        values = torch.tensor([1.0, segment.length, segment.num_targets], dtype=torch.float64)
        per_source[:, sources.index(segment.source)] += values
        per_domain[domains.index(segment.domain)] += segment.num_targets
    named = {
        "targets": sum(s.num_targets for s in segments),
        "tokens": sum(s.length for s in segments),
        "positions": sum(batch.ids.numel() for batch in batches),
        "samples": len(segments),
        "images": sum(len(batch.pixels) for batch in batches),
        "squares": sum(s.length**2 for s in segments),
    }
    head = torch.tensor([float(named[name]) for name in NAMED_COUNTS], dtype=torch.float64)
    return torch.cat([head, per_source.flatten(), per_domain])


def sum_losses(values: torch.Tensor, segment: torch.Tensor, labels: Sequence[int], num_labels: int) -> torch.Tensor:
    """Token losses summed by label, float64[num_labels].

    values: float[K]; segment: int64[K], each token's segment; labels: the label of every segment. A masked sum and
    no scatter: its order is fixed on every device, so a repeated step repeats the bits.
    """
    table = torch.tensor(list(labels) or [0], dtype=torch.int64, device=values.device)
    is_label = table[segment][:, None] == torch.arange(num_labels, device=values.device)
    return (values.detach().double()[:, None] * is_label).sum(0)


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
    return {
        "step": report.step,
        "loss": report.loss,
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
    }
