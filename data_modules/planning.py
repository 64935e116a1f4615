"""From sources and rules to the plan that all lanes share; and what a plan lets foresee.

Foreseeing plans the first rows of a few lanes without making them: a pure function of the plan, the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import add
from statistics import fmean

from bestiary.schema import Example, Lengths, Processor, Sample, SampleError
from data_modules.grouped_order import GroupedOrder, check_grouped
from data_modules.lanes import Ref
from data_modules.packing import fill_row
from data_modules.rows import LaneReader, Plan
from data_modules.rules import Rules
from data_modules.shards import ShardSet
from data_modules.shares import Use, cap, resolve
from data_modules.sources import SourceSpec, StreamError
from data_modules.turns import turns

FORESEEN_LANES, FORESEEN_ROWS = 4, 24
"""Lanes, and first rows of each, that are planned to foresee a run."""
_MEASURED = 32
"""Samples of a source whose mean amount stands for all where the unit is not samples."""
WELL_FILLED = 0.985
LONGEST_ROW = 4
"""Times the row: longer ones are not proposed."""
_SMALL_GAIN, _LARGE_GAIN = 0.01, 0.05
_ROWS_TO_TELL, _SAMPLES_TO_TELL, _SHORT = 4, 2000, 8
_CAP_ROUNDS = 3
"""With packing, caps change how many samples a row holds, which changes the caps a little."""


def plan_mix(
    specs: Sequence[SourceSpec],
    sources: Sequence[ShardSet],
    processor: Processor,
    rules: Rules,
    *,
    max_steps: int | None = None,
    skipped: Mapping[str, frozenset[int]] | None = None,
) -> Plan:
    """The plan of a mix; StreamError names what the shares cannot be.

    sources: opened, in the order of `specs`. max_steps: length of the run; only caps (`max_epochs`) need it.
    """
    sizes = [len(source) for source in sources]
    order = None
    if rules.order == "grouped":
        check_grouped(specs, rules)
        specs = [replace(spec, weight=None, repeat=1.0) for spec in specs]  # as often as it has samples
        order = GroupedOrder(sources, [spec.kind for spec in specs], num_lanes=rules.num_lanes, seed=rules.seed)
    elif kinds := [spec.name for spec in specs if spec.kind]:
        raise StreamError(f"data.sources.{kinds[0]}.kind is a group of data.order=grouped; leave it out")
    try:
        shares = resolve(specs, sizes, unit=rules.unit, temperature=rules.temperature)
        if order is not None:
            return Plan(specs, sources, shares, processor, rules, skipped, order)
        plan = Plan(specs, sources, shares, processor, rules, skipped)
        if rules.unit == "target_tokens" and len(specs) > 1:
            for source in range(len(specs)):  # one without any would never have drawn its share, and be drawn for ever
                _mean(plan, source)
        capped = [spec.name for spec in specs if spec.max_epochs is not None]
        if not capped:
            return plan
        if max_steps is None:
            raise StreamError(f"data.sources.{capped[0]}.max_epochs needs the length of the run; set stage.max_steps")
        for _ in range(_CAP_ROUNDS):
            cut = cap(shares, specs, sizes, _use(plan, max_steps))
            if cut == plan.mixture.resolved:
                break
            plan = Plan(specs, sources, cut, processor, rules, skipped)
        return plan
    except ValueError as error:
        raise error if isinstance(error, StreamError) else StreamError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What the first rows of some lanes hold. samples, tokens, targets: of each source.

    drawn_samples, drawn_tokens: with what then waits in the look-ahead. Their shares are what a long run comes to; the
    first rows alone lack what the packer keeps for later.
    """

    rows: int
    samples: tuple[int, ...]
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    drawn_samples: tuple[int, ...]
    drawn_tokens: tuple[int, ...]
    row_samples: tuple[int, ...]
    """Positions of every sample in these rows, in their order."""

    def amounts(self, unit: str) -> tuple[int, ...]:
        """Of each source, in a unit."""
        return {"samples": self.samples, "tokens": self.tokens, "target_tokens": self.targets}[unit]

    def fill(self, rules: Rules) -> float:
        """Share of the positions a row may hold that are used; a batch is padded to its longest row alone."""
        return sum(self.tokens) / self.rows / rules.budget.tokens


def foresee(plan: Plan, *, lanes: int = FORESEEN_LANES, rows: int = FORESEEN_ROWS) -> Foreseen:
    """Plan the first rows of some lanes, spread over all; StreamError as in a run."""
    num_sources, num_lanes = len(plan.names), plan.rules.num_lanes
    samples, tokens, targets, waiting, waiting_tokens = ([0] * num_sources for _ in range(5))
    row_samples: list[int] = []
    chosen = sorted({place * num_lanes // lanes for place in range(lanes)})
    for lane in chosen:
        reader = LaneReader(plan, plan.first_state(lane))
        for _ in range(rows):
            for ref in reader.plan_row():
                samples[ref.source] += 1
                tokens[ref.source] += ref.tokens
                row_samples.append(ref.tokens)
                if plan.rules.unit == "target_tokens":
                    targets[ref.source] += _lengths(plan, reader.part(ref)).targets
        for ref in reader.state.waiting:
            waiting[ref.source] += 1
            waiting_tokens[ref.source] += ref.tokens
    drawn, drawn_tokens = map(_sums, (samples, tokens), (waiting, waiting_tokens))
    held = (tuple(samples), tuple(tokens), tuple(targets))
    return Foreseen(rows * len(chosen), *held, drawn, drawn_tokens, tuple(row_samples))


def fuller_rows(seen: Foreseen, rules: Rules) -> tuple[int, float] | None:
    """A longer row that what was foreseen fills better, and how full: the shortest that it fills well, else the best.

    None where rows are well filled, or none of those tried is much better. How full rows of long samples can be is
    decided by their length: half multiples of the row are tried, and multiples of the typical and of a long sample.
    """
    now = seen.fill(rules)
    if not rules.packing or rules.max_views or now >= WELL_FILLED:
        return None
    row, coming = rules.budget.tokens, seen.row_samples[:_SAMPLES_TO_TELL]
    lengths = sorted(coming)
    typical = {lengths[len(lengths) * percent // 100] for percent in (50, 95)}
    typical = {length for length in typical if length * _SHORT > row}  # short samples fill any row
    tried = {row * halves // 2 for halves in range(3, 2 * LONGEST_ROW + 1)}
    tried |= {times * length for length in typical for times in range(1, LONGEST_ROW * row // length + 1)}
    best = (row, now)
    for row_tokens in sorted(one for one in tried if one > row):
        fill = _repacked(coming, replace(rules, row_tokens=row_tokens))
        if fill is not None and fill >= max(WELL_FILLED, now + _SMALL_GAIN):
            return row_tokens, fill
        if fill is not None and fill > best[1]:
            best = (row_tokens, fill)
    return best if best[1] >= now + _LARGE_GAIN else None


def _repacked(lengths: Sequence[int], rules: Rules) -> float | None:
    """Share of positions used when samples of these lengths are packed; None where they fill too few rows to tell."""
    coming = iter(lengths)
    waiting: list[Ref] = []
    full = []
    try:
        while True:
            row = fill_row(waiting, lambda: Ref(0, 0, 0, next(coming), 0), rules.budget, rules.look_ahead)
            full.append(sum(ref.tokens for ref in row) / rules.budget.tokens)
    except StopIteration:  # the row that found nothing more to look at is no row
        return fmean(full) if len(full) >= _ROWS_TO_TELL else None


def _sums(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(add, first, second))


def _use(plan: Plan, max_steps: int) -> Use:
    """What a run of so many steps takes of its sources."""
    rules = plan.rules
    rows = max_steps * rules.num_lanes
    ones = tuple(1.0 for _ in plan.names)
    if rules.unit == "samples":
        seen = foresee(plan) if rules.packing else None
        return Use(rows, sum(seen.samples) / seen.rows if seen is not None else 1.0, ones)
    seen = foresee(plan)
    means = tuple(_mean(plan, source) for source in range(len(plan.names)))
    return Use(rows, sum(seen.amounts(rules.unit)) / seen.rows, means)


def _mean(plan: Plan, source: int) -> float:
    """Mean amount of a source's first readable samples in the unit of the mix."""
    amounts: list[int] = []
    for index in islice(_first(plan, source), 2 * _MEASURED):
        try:
            lengths = _lengths(plan, plan.sources[source][index])
        except SampleError:  # counted when a lane draws it
            continue
        amounts.append(lengths.tokens if plan.rules.unit == "tokens" else lengths.targets)
        if len(amounts) == _MEASURED:
            break
    if not sum(amounts):
        raise StreamError(
            f"data.sources.{plan.names[source]}: none of its first {_MEASURED} samples has {plan.rules.unit} to count; "
            "leave it out, or choose another data.unit"
        )
    return sum(amounts) / len(amounts)


def _first(plan: Plan, source: int) -> Iterator[int]:
    """The numbers of a source's samples in the order of lane 0, those on the skip list left out."""
    order = (index for _, index, _, _ in turns(plan.deals[source], 0, 0, 0))
    return (index for index in order if index not in plan.skipped[source])


def _lengths(plan: Plan, part: Example | Sample | SampleError) -> Lengths:
    if isinstance(part, SampleError):
        raise part
    if isinstance(part, Sample) and plan.lengths is not None:
        return plan.lengths(part)
    example = plan.processor(part) if isinstance(part, Sample) else part
    return Lengths(len(example), example.num_views, example.num_targets)
