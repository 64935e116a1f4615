"""From what a user asks of the sources to shares: integers that sum to ONE.

`resolve` turns weights, counts, repeats or schedules and the temperature into Shares; `cap` then cuts the shares of
sources that would be seen too often. Both are pure. Floating point is used only for operations that every machine
rounds alike (and powers, of which nine digits are kept).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import fsum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_modules.sources import SourceSpec

ONE = 1 << 40
"""The integer that stands for the whole."""
UNITS = ("samples", "tokens", "target_tokens")

Points = tuple[tuple[int, float], ...]
"""(step, weight), steps rising: linear in between, constant before and after. One point: a constant."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of a mix at every step, a pure function of the step.

    weights: one schedule a source, on one scale. temperature: shares are raised to 1 / temperature and brought back to
    a sum of one.
    """

    names: tuple[str, ...]
    weights: tuple[Points, ...]
    unit: str = "samples"
    temperature: float = 1.0

    @property
    def is_fixed(self) -> bool:
        """Whether the shares are the same at every step."""
        return all(len(points) == 1 for points in self.weights)

    def at(self, step: int) -> tuple[int, ...]:
        """Integers that sum to ONE; 0 only where the weight is 0 at this step."""
        weights = [_interpolate(points, step) for points in self.weights]
        return integers(tempered(weights, self.temperature))

    def told(self) -> list[Any]:
        """Each source's share, an integer, or its schedule as [[step, weight], ...]: plain JSON."""
        if self.is_fixed:
            return list(self.at(0))
        return [[list(point) for point in points] for points in self.weights]


def fixed(weights: Mapping[str, float], *, unit: str = "samples", temperature: float = 1.0) -> Shares:
    """Constant shares in proportion to `weights`; ValueError unless all are positive and finite."""
    bad = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
    if bad or not weights:
        raise ValueError(f"weights of sources must be positive numbers, these are not: {bad or 'no source at all'}")
    points = tuple(((0, float(weight)),) for weight in weights.values())
    return Shares(tuple(weights), points, unit, temperature)


@dataclass(frozen=True, slots=True)
class Use:
    """What a run takes, in the unit of the mix. rows: of the whole run. of_row, of_sample: mean amount of a row, and of
    a sample of each source.
    """

    rows: int
    of_row: float
    of_sample: tuple[float, ...]


def resolve(
    specs: Sequence[SourceSpec], sizes: Sequence[int], *, unit: str = "samples", temperature: float = 1.0
) -> Shares:
    """The shares that `specs` ask for, caps left aside; ValueError names `data.sources.<name>.<key>`.

    sizes: samples of each source; only `repeat` needs them.
    """
    relative = [spec.name for spec in specs if spec.count is None and spec.repeat is None]
    counted = [(spec.name, "count" if spec.count else "repeat") for spec in specs if spec.name not in relative]
    if counted and relative:
        name, key = counted[0]
        raise ValueError(
            f"data.sources.{name}.{key} is a number of samples, data.sources.{relative[0]} has a weight; "
            "give count or repeat to every source, or a weight to every source"
        )
    if counted and unit != "samples":
        name, key = counted[0]
        raise ValueError(f"data.sources.{name}.{key} is a number of samples; with data.unit={unit} give weights")
    weights: list[Points] = []
    for spec, size in zip(specs, sizes, strict=True):
        if spec.schedule:
            weights.append(spec.schedule)
        elif counted:
            weights.append(((0, float(spec.count or (spec.repeat or 0) * size)),))
        else:
            weights.append(((0, float(spec.weight or 1.0)),))
    shares = Shares(tuple(spec.name for spec in specs), tuple(weights), unit, temperature)
    _check_always_something(shares)
    if shares.is_fixed and temperature != 1.0:
        kept = tempered([points[0][1] for points in weights], temperature)
        if not all(kept):
            name = shares.names[kept.index(0.0)]
            raise ValueError(f"data.temperature={temperature:g} leaves source {name!r} no share at all; raise it")
        return replace(shares, weights=tuple(((0, weight),) for weight in kept), temperature=1.0)
    return shares


def cap(shares: Shares, specs: Sequence[SourceSpec], sizes: Sequence[int], use: Use) -> Shares:
    """Shares with no source over its `max_epochs`; what a source loses goes to the others in proportion.

    Shares that pass no cap come back as they are. ValueError where all sources together are not enough.
    """
    _check_can_cap(shares, specs)
    total = use.rows * use.of_row
    limits = {
        number: spec.max_epochs * size * amount / total
        for number, (spec, size, amount) in enumerate(zip(specs, sizes, use.of_sample, strict=True))
        if spec.max_epochs is not None
    }
    wanted = {number: share / ONE for number, share in enumerate(shares.at(0))}
    cut: dict[int, float] = {}
    while True:
        left, scale = 1 - fsum(cut.values()), fsum(wanted.values())
        over = [number for number, share in wanted.items() if share / scale * left > limits.get(number, 2.0)]
        if not over:
            break
        for number in over:
            cut[number] = limits[number]
            del wanted[number]
        if not wanted:
            steps = int(fsum(cut.values()) * use.rows)
            raise ValueError(
                f"data.sources: every source has max_epochs, and together they are enough for {steps:,} rows of the "
                f"{use.rows:,} that stage.max_steps asks for; raise max_epochs or lower stage.max_steps"
            )
    if not cut:
        return shares
    final = {**cut, **{number: share / scale * left for number, share in wanted.items()}}
    return replace(shares, weights=tuple(((0, final[number]),) for number in range(len(shares.names))))


def _check_can_cap(shares: Shares, specs: Sequence[SourceSpec]) -> None:
    if shares.is_fixed:
        return
    capped = next(spec.name for spec in specs if spec.max_epochs is not None)
    planned = next(spec.name for spec in specs if spec.schedule)
    raise ValueError(
        f"data.sources.{capped}.max_epochs cannot be kept where data.sources.{planned}.schedule changes the shares; "
        "let the schedule itself go down"
    )


def _check_always_something(shares: Shares) -> None:
    """Weights are linear between points, so if they are all 0 anywhere, they are so at a point."""
    for step in {step for points in shares.weights for step, _ in points}:
        if not any(_interpolate(points, step) for points in shares.weights):
            raise ValueError(f"data.sources: every schedule is 0 at step {step}; some source must have a share")


def tempered(weights: list[float], temperature: float) -> list[float]:
    """Weights to the power 1 / temperature, of shares; 0 stays 0.

    Nine digits are kept: the last ones of a power depend on the machine's library.
    """
    if temperature == 1.0:
        return weights
    total = fsum(weights)
    return [float(f"{(weight / total) ** (1 / temperature):.9g}") if weight else 0.0 for weight in weights]


def integers(weights: list[float]) -> tuple[int, ...]:
    """Shares in proportion to `weights` as integers that sum to ONE; at least 1 for a positive weight."""
    total = fsum(weights)
    shares = [max(1, round(weight / total * ONE)) if weight else 0 for weight in weights]
    shares[shares.index(max(shares))] += ONE - sum(shares)
    return tuple(shares)


def _interpolate(points: Points, step: int) -> float:
    if step <= points[0][0]:
        return points[0][1]
    for (start, first), (stop, last) in pairwise(points):
        if step < stop:
            return first + (last - first) * (step - start) / (stop - start)
    return points[-1][1]
