"""The mix as it was resolved, for reading before training starts."""

from __future__ import annotations

from collections.abc import Sequence

from data_modules.planning import Foreseen, foresee, fuller_rows
from data_modules.rows import Plan
from data_modules.shares import ONE, Shares, resolve
from data_modules.sources import SourceSpec

MANY_PASSES = 4.0
"""Beyond so many passes a source is marked: repeating it more teaches little (Muennighoff et al. 2023)."""
UNEVEN = 2.0
"""A source whose share of tokens differs from its share of samples by this factor is pointed out."""
_STEPS_TRIED = 64

_HEADER = (
    "source", "domains", "share", "asked", "of samples", "of tokens", "samples", "passes", "loss", "where",
)  # fmt: skip


def resolved_table(
    specs: Sequence[SourceSpec], plan: Plan | None, *, num_lanes: int, max_steps: int | None = None
) -> str:
    """What is wrong first, then a line a source, then what rows will hold.

    share: in the unit of the mix, first -> last where it is scheduled. asked: what the configuration says. of samples,
    of tokens: expected shares of both, from what the first rows of some lanes draw. passes: expected over `max_steps`.

    plan: None when a source is missing on disk; then only what the configuration says is shown.
    """
    if plan is None:
        return _align([_HEADER, *(_unopened(spec) for spec in specs)])
    seen = foresee(plan)
    passes = _passes(plan, seen, max_steps) if max_steps is not None else None
    lines = [_opened(plan, seen, passes, number) for number in range(len(specs))]
    per_row = sum(seen.samples) / seen.rows
    tempered = f", at temperature {plan.rules.temperature:g}" if plan.rules.temperature != 1 else ""
    fill = f"expected fill {seen.fill(plan.rules):.1%} of {plan.rules.budget.tokens:,}"
    last = (
        f"{num_lanes} rows a step, about {per_row:.2f} samples a row, {fill}; "
        f"shares are of {plan.rules.unit.replace('_', ' ')}{tempered}"
    )
    longer = fuller_rows(seen, plan.rules)
    hint = [] if longer is None else [f"rows of data.row_tokens={longer[0]} would be about {longer[1]:.1%} full"]
    return "\n".join([*_bad_news(plan, seen, passes, max_steps), _align([_HEADER, *lines]), last, *hint])


def _bad_news(plan: Plan, seen: Foreseen, passes: Sequence[float] | None, max_steps: int | None) -> list[str]:
    """One line for everything that should be looked at before the run."""
    news = []
    if plan.order is not None:
        news.append(
            f"! data.order=grouped: {plan.order.num_batches:,} steps an epoch; no epoch has the longest "
            f"{plan.order.num_dropped:,} samples, which fill no step of their kind"
        )
    for number, name in enumerate(plan.names):
        if passes is not None and passes[number] > MANY_PASSES:
            news.append(
                f"! {name}: its {len(plan.sources[number]):,} samples are seen {passes[number]:.1f} times in "
                f"{max_steps:,} steps; lower its share or set data.sources.{name}.max_epochs"
            )
        of_samples, of_tokens = _part(seen.drawn_samples, number), _part(seen.drawn_tokens, number)
        if of_samples and not 1 / UNEVEN < of_tokens / of_samples < UNEVEN:
            news.append(f"! {name}: {of_samples:.1%} of the samples are {of_tokens:.1%} of the tokens; see data.unit")
    return news


def _passes(plan: Plan, seen: Foreseen, max_steps: int) -> list[float]:
    """Expected passes over each source: its share over the run, in samples."""
    resolved, unit = plan.mixture.resolved, plan.rules.unit
    per_row = sum(seen.amounts(unit)) / seen.rows
    passes = []
    for number, share in enumerate(_mean_shares(resolved, max_steps)):
        amount, count = seen.amounts(unit)[number], seen.samples[number]
        per_sample = amount / count if count and amount else per_row * seen.rows / sum(seen.samples)
        drawn = share * per_row / per_sample * plan.rules.num_lanes * max_steps
        passes.append(drawn / len(plan.sources[number]))
    return passes


def _mean_shares(shares: Shares, max_steps: int) -> list[float]:
    steps = range(0, max_steps, max(1, max_steps // _STEPS_TRIED)) if not shares.is_fixed else range(1)
    at = [shares.at(step) for step in steps]
    return [sum(column) / len(at) / ONE for column in zip(*at, strict=True)]


def _opened(plan: Plan, seen: Foreseen, passes: Sequence[float] | None, number: int) -> tuple[str, ...]:
    spec, source, shares = plan.specs[number], plan.sources[number], plan.mixture.resolved
    repeats = "-"
    if passes is not None:
        repeats = f"{passes[number]:.2f}" + (" !" if passes[number] > MANY_PASSES else "")
    return (
        spec.name,
        ",".join(source.domains),
        _share(shares, number),
        _asked(spec, shares, number, [len(one) for one in plan.sources], plan),
        f"{_part(seen.drawn_samples, number):.2%}",
        f"{_part(seen.drawn_tokens, number):.2%}",
        f"{len(source):,}",
        repeats,
        f"{spec.loss_weight:g}",
        spec.shown,
    )


def _share(shares: Shares, number: int) -> str:
    first = shares.at(0)[number] / ONE
    if shares.is_fixed:
        return f"{first:.2%}"
    end = max(points[-1][0] for points in shares.weights)
    return f"{first:.2%} -> {shares.at(end)[number] / ONE:.2%}"


def _asked(spec: SourceSpec, shares: Shares, number: int, sizes: Sequence[int], plan: Plan) -> str:
    """What the configuration says, and whether a cap made it less."""
    asked = _words(spec)
    if spec.max_epochs is None:
        return asked
    wanted = resolve(plan.specs, sizes, unit=plan.rules.unit, temperature=plan.rules.temperature).at(0)[number]
    cut = f", cut from {wanted / ONE:.2%}" if shares.at(0)[number] < wanted else ""
    return f"{asked}, max_epochs {spec.max_epochs:g}{cut}"


def _words(spec: SourceSpec) -> str:
    if spec.schedule:
        (first, start), (last, end) = spec.schedule[0], spec.schedule[-1]
        return f"weight {start:g} (step {first:,}) -> {end:g} (step {last:,})"
    if spec.count is not None:
        return f"count {spec.count:,.10g}"
    return f"repeat {spec.repeat:g}" if spec.repeat is not None else f"weight {spec.weight or 1:g}"


def _unopened(spec: SourceSpec) -> tuple[str, ...]:
    where = f"{spec.shown} (missing)" if spec.is_missing else spec.shown
    return (spec.name, spec.domain or "-", "-", _words(spec), "-", "-", "-", "-", f"{spec.loss_weight:g}", where)


def _part(amounts: Sequence[int], number: int) -> float:
    return amounts[number] / max(1, sum(amounts))


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
