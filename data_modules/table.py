"""The mix as it was resolved, for reading before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_modules.mixture import ONE, Mixture
from data_modules.rows import LaneReader, Plan
from data_modules.sources import SourceSpec

TRIED_ROWS = 24
"""Rows of lane 0 that are planned, not made, to foresee fill and repeats."""

_HEADER = ("source", "domains", "share", "samples", "repeats", "where")


def resolved_table(
    specs: Sequence[SourceSpec], plan: Plan | None, *, num_lanes: int, max_steps: int | None = None
) -> str:
    """Shares, sizes, and (with a plan) expected repeats over `max_steps` and the expected fill of rows.

    plan: None when a source is missing on disk; then only what the configuration says is shown.
    """
    shares = Mixture({spec.name: spec.weight for spec in specs}, 1).shares
    lines = [_HEADER]
    samples, fill = _foresee(plan) if plan is not None else (None, None)
    for number, (spec, share) in enumerate(zip(specs, shares, strict=True)):
        size = domains = repeats = "-"
        if plan is not None:
            source = plan.sources[number]
            size, domains = f"{len(source):,}", ",".join(source.domains)
            if samples is not None and max_steps is not None:
                repeats = f"{share / ONE * samples * num_lanes * max_steps / len(source):.2f}"
        elif spec.domain:
            domains = spec.domain
        where = f"{spec.folder} (missing)" if spec.is_missing else str(spec.folder)
        lines.append((spec.name, domains, f"{share / ONE:.2%}", size, repeats, where))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if samples is not None and fill is not None:
        table.append(f"{num_lanes} rows a step, about {samples:.2f} samples a row, expected fill {fill:.1%}")
    return "\n".join(table)


def _foresee(plan: Plan) -> tuple[float, float]:
    """(samples a row, share of a row's tokens that are used), from the first rows of lane 0."""
    reader = LaneReader(plan, plan.first_state(0))
    rows = [reader.plan_row() for _ in range(TRIED_ROWS)]
    seen = Counter({"samples": sum(map(len, rows)), "tokens": sum(ref.tokens for row in rows for ref in row)})
    return seen["samples"] / len(rows), seen["tokens"] / len(rows) / plan.rules.max_tokens
