"""What happened at a step of a run: its numbers, every sample in it with its own loss, and what was left out so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bestiary.training.flight import SeenSample
from bestiary.training.run_dir import RunDir

WORST_SHARE = 0.1
"""Of a step's samples, the share with the largest losses that is marked; at least one."""


NUMBERS = ("loss", "weighted_loss", "lr", "grad_norm")
"""Fields of a metrics line that are told of a step."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One step. metrics: its line of metrics.jsonl. worst: places in `samples`."""

    step: int
    samples: tuple[SeenSample, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    worst: frozenset[int] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        numbers = {name: self.metrics[name] for name in NUMBERS if name in self.metrics}
        samples = [
            {
                "lane": s.lane,
                "source": s.source,
                "key": s.key,
                "tokens": s.tokens,
                "targets": s.targets,
                "loss": s.loss,
                "worst": place in self.worst,
            }
            for place, s in enumerate(self.samples)
        ]
        return {"step": self.step, **numbers, "samples": samples}


def explain(run: RunDir, first: int | None, last: int | None) -> Iterator[Explained]:
    """The recorded steps from `first` to `last`, both included (None: as far as the record goes), one after another.

    Only the frames and lines of these steps are read. ValueError names the steps that are there when others are asked.
    """
    if not run.exists:
        raise ValueError(f"{run.path} is not a run directory (no status.json)")
    low, high = _checked(run, first, last)
    metrics = run.metrics.steps(low, high)
    line = next(metrics, None)
    for flight in run.samples.steps(low, high):
        while line is not None and line["step"] < flight.step:
            line = next(metrics, None)
        known = line if line is not None and line["step"] == flight.step else {}
        yield Explained(flight.step, flight.samples, known, worst_of(flight.samples))


def worst_of(samples: tuple[SeenSample, ...]) -> frozenset[int]:
    """Places of the samples with the largest losses."""
    scored = [(sample.loss, place) for place, sample in enumerate(samples) if sample.loss is not None]
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    return frozenset(place for _, place in scored[: max(1, int(len(samples) * WORST_SHARE))])


def left_out(run: RunDir, step: int) -> tuple[int, list[str]]:
    """(step, lines): what was skipped or damaged as far as the checkpoints up to `step` know; (0, []) for nothing."""
    known: dict[str, Any] = {"step": 0, "lines": []}
    for record in run.left_out.steps(0, step):
        known = record
    return known["step"], known["lines"]


def _checked(run: RunDir, first: int | None, last: int | None) -> tuple[int, int]:
    """The asked range with its open ends filled in."""
    bounds = run.samples.bounds()
    if bounds is None:
        raise ValueError(f"{run.path} has recorded no step yet; the record grows every 50 steps and at checkpoints")
    low, high = (bounds[0] if first is None else first), (bounds[1] if last is None else last)
    if low > high:
        raise ValueError(f"steps {low}:{high} run backwards; give the earlier one first")
    if low < bounds[0] or high > bounds[1]:
        asked = f"step {low} is" if low == high else f"steps {low}:{high} are"
        at = run.status.step
        more = f"; the run is at step {at} and writes the rest soon" if at > bounds[1] else ""
        raise ValueError(f"{asked} not in {run.path}, which holds steps {bounds[0]} to {bounds[1]}{more}")
    return low, high
