"""The mix of a run as it was asked for, resolved and achieved (`mix.json`), and what a resume changed in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bestiary.training.report import Totals, shares
from bestiary.training.run_dir import RunDir, now, write_atomic

Asked = Callable[[int], Mapping[str, float]]
"""From a step, from 0, to the resolved share of every source, in the unit of the mix."""

_COUNTED = {"samples": "samples_by_source", "tokens": "tokens_by_source", "targets": "targets_by_source"}
_TRIED_STEPS = 1000


def change_of(step: int, lines: Sequence[str], totals: Totals, **told: str) -> dict[str, Any] | None:
    """What a resume at `step` changes in the stream (which said so itself), with the totals up to there."""
    return {"step": step, "time": now(), "lines": list(lines), **told, "totals": asdict(totals)} if lines else None


def write_changes(run: RunDir, step: int, lines: Sequence[str], totals: Totals) -> None:
    """Keep what a resume at `step` changes in the stream, unless opening the run did so."""
    if [list(lines)] != [record["lines"] for record in run.changes.steps(step, step)]:
        run.set_change(step, change_of(step, lines, totals))


def notes_of(run: RunDir) -> str:
    """Every change so far as text."""
    return "\n".join(line for record in run.changes.read() for line in [f"step {record['step']}:", *record["lines"]])


def write_mix(run: RunDir, step: int, totals: Totals, asked: Asked, data: Mapping[str, Any]) -> None:
    """Write mix.json: for each source what was asked, its resolved share, and the shares achieved after `step` steps.

    Counted from the last change of the mix on. data: the configuration's `data`, as far as there is one.
    """
    changes = run.changes.read()
    first = changes[-1]["step"] if changes else 0
    before = Totals(**changes[-1]["totals"]) if changes else Totals()
    achieved = {name: shares(_since(getattr(before, f), getattr(totals, f))) for name, f in _COUNTED.items()}
    resolved = mean_shares(asked, first, step)
    settings = data.get("sources", {})
    record = {
        "from_step": first,
        "to_step": step,
        "unit": data.get("unit", "samples"),
        "temperature": data.get("temperature", 1.0),
        "sources": {
            name: {
                "asked": _asked_of(settings.get(name, {})),
                "resolved": round(share, 6),
                "achieved": {unit: found.get(name, 0.0) for unit, found in achieved.items()},
            }
            for name, share in resolved.items()
        },
    }
    write_atomic(run.path / "mix.json", json.dumps(record, indent=1) + "\n")


def mean_shares(asked: Asked, first: int, last: int) -> dict[str, float]:
    """The mean of the resolved shares over steps [first, last), from at most a thousand of them; of no step: the next.

    Shares that do not change with the step come out as they are.
    """
    steps = range(first, max(last, first + 1))
    tried = [asked(step) for step in steps[:: -(-len(steps) // _TRIED_STEPS)]]
    if all(found == tried[0] for found in tried):
        return dict(tried[0])
    return {name: sum(found[name] for found in tried) / len(tried) for name in tried[0]}


def _asked_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """What a source's settings say of how much of it is wanted; weight 1 where they say nothing."""
    share = {key: source[key] for key in ("weight", "count", "repeat", "schedule") if source.get(key) not in (None, [])}
    cap = {"max_epochs": source["max_epochs"]} if source.get("max_epochs") is not None else {}
    return {**(share or {"weight": 1.0}), **cap}


def _since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What was counted in between."""
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
