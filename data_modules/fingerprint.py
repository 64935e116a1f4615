"""What shapes the sequence of samples, and what was lost on the way: both readable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data_modules.lanes import ALGORITHM, LaneState
from data_modules.records import Reason
from data_modules.rows import Plan
from data_modules.shares import ONE
from data_modules.skiplist import pack_numbers, unpack_numbers

_NOT_SHAPING = ("bad_budget",)
"""Rules that may stop a run but never change what it sees."""
_TOLD_ELSEWHERE = ("chunk", "unit", "temperature")
"""Rules that stand with each source, or in the resolved mix."""


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Everything the rows depend on, as plain JSON; where the shards lie is not part of it.

    skip: the numbers of the samples on the skip list, about a byte each, so that one that only grew can be told.
    """
    left_out = [*_NOT_SHAPING, *_TOLD_ELSEWHERE]
    left_out += [] if plan.rules.packing else ["look_ahead"]
    # Runs that are older than these choices go on.
    left_out += [] if plan.order is not None else ["order"]
    left_out += [] if plan.rules.row_tokens > plan.rules.max_tokens else ["row_tokens"]
    shares = plan.mixture.told()
    told: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "rules": {name: value for name, value in asdict(plan.rules).items() if name not in left_out},
        "processor": processor_fingerprint(plan.processor),
        "order": list(plan.names),
        "mix": {"unit": plan.rules.unit},
        "sources": {
            spec.name: {
                "share": share,
                "samples": len(shards),
                "index_hash": shards.index_hash,
                "chunk": spec.chunk or plan.rules.chunk,
                "loss_weight": spec.loss_weight,
            }
            | ({"kind": spec.kind} if spec.kind else {})
            for spec, shards, share in zip(plan.specs, plan.sources, shares, strict=True)
        },
    }
    if not plan.mixture.resolved.is_fixed:  # fixed shares have it in them
        told["mix"]["temperature"] = plan.rules.temperature
    skipped = {name: pack_numbers(numbers) for name, numbers in zip(plan.names, plan.skipped, strict=True) if numbers}
    return told | ({"skip": skipped} if skipped else {})


def processor_fingerprint(processor: object) -> str:
    """What a processor says of itself (`fingerprint()`), else only the name of its class."""
    kind = f"{type(processor).__module__}.{type(processor).__qualname__}"
    tell = getattr(processor, "fingerprint", None)
    measured = "lengths" if hasattr(processor, "lengths") else "whole"
    return f"{kind}/{measured}/{tell()}" if tell is not None else f"{kind}/{measured}"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each thing that differs between two fingerprints; a source that came or went is one thing."""
    old, new = saved.get("sources", {}), now.get("sources", {})
    moved = [f"sources.{name} is gone" for name in old if name not in new]
    moved += [f"sources.{name} is new" for name in new if name not in old]
    before, after = dict(_flatten(saved)), dict(_flatten(now))
    for line in moved:  # its parts, and that the order is another, say nothing more
        hidden = (f"{line.split()[0]}.", "order")
        before, after = ({n: v for n, v in told.items() if not n.startswith(hidden)} for told in (before, after))
    names = [*before, *(name for name in after if name not in before)]
    return moved + [
        f"{name}: {_readable(name, before)} -> {_readable(name, after)}"
        for name in names
        if before.get(name, "absent") != after.get(name, "absent")
    ]


def losses(plan: Plan, states: Sequence[LaneState]) -> list[str]:
    """One line for each shard and reason under which samples were left out, over the given lanes."""
    total: Counter[tuple[int, int, int]] = Counter()
    for state in states:
        total.update(state.losses)
    return [
        f"{plan.names[source]}/{plan.sources[source].shards[shard].file}: {count} {Reason(reason).name.lower()}"
        for (source, shard, reason), count in sorted(total.items())
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _readable(name: str, told: Mapping[str, Any]) -> str:
    value = told.get(name, "absent")
    if name.endswith(".share") and isinstance(value, int):
        return f"{value / ONE:.6%}"
    if name.startswith("skip.") and name in told:
        return f"{len(unpack_numbers(value))} samples"
    return str(value)
