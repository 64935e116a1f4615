"""Mix surgery: going on with a stream that is not the one that was saved, as an explicit act that is explained first.

`resume` is pure: saved states and their fingerprint in, states for the plan of now out, with the lines that say what
changes. What may change without being asked for: nothing, and samples added to the skip list. `remix` keeps the place
of every source that is untouched (same name, same shards, same chunk), so none of its samples comes twice before its
epoch ends; everything else begins at its first epoch, and the mixture begins at its shares, in all lanes at one step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from data_modules.fingerprint import differences, fingerprint
from data_modules.lanes import LaneState, Place, Ref
from data_modules.ledger import Loss
from data_modules.records import Reason
from data_modules.rows import LaneReader, Plan
from data_modules.rules import Rules
from data_modules.shares import ONE, Shares
from data_modules.skiplist import added_only
from data_modules.sources import StreamError

ON_CHANGE = ("refuse", "remix", "restart")
_FIXED_RULES = ("seed", "num_lanes")
_OPTIONS = {"num_lanes": "stage.batch_size", "seed": "seed"}
"""Where a rule is set, if not by its own name under `data`."""
_DEFAULTS = {rule.name: str(rule.default) for rule in fields(Rules)}
_MEASURING_RULES = ("max_tokens", "max_views", "too_long")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a stream goes on. states: lane -> bytes, of every lane. lines: what changes, for people; none = nothing."""

    step: int
    states: dict[int, bytes]
    lines: tuple[str, ...] = ()


def resume(states: Mapping[int, bytes], saved: Mapping[str, Any], plan: Plan, on_change: str = "refuse") -> Resumed:
    """Where `plan` goes on after `states` (lane -> bytes, of every lane), saved with the fingerprint `saved`.

    on_change: refuse, remix or restart; without a difference all three go on exactly. StreamError says what differs and
    what to do.
    """
    now = fingerprint(plan)
    changed = differences(saved, now)
    told = _by_options(changed)
    skip_changed = [line for line in changed if line.startswith("skip.")]
    added = added_only(saved.get("skip", {}), now.get("skip", {})) if skip_changed == changed else None
    if added is None and on_change == "refuse":
        raise StreamError(
            f"the stream is not the one that was saved; changed: {'; '.join(told)}{_why_shares(told, plan)}; a resume "
            f"needs the run's own options: undo it, or {_way_on(saved, now)}"
        )
    if added is None and on_change == "restart":
        return _restarted(states, plan, told)
    if added is None:
        _refuse_what_no_surgery_can_do(saved, now)
    lanes = _parsed(states, plan.rules.num_lanes)
    step = next(iter(lanes.values())).rows
    if not changed:
        return Resumed(step, dict(states))
    operation = Surgery(lanes, saved, plan)
    lines = operation.explain_skips(added, step) if added is not None else operation.explain(told, step)
    return Resumed(step, {lane: state.to_bytes() for lane, state in sorted(operation.lanes.items())}, tuple(lines))


class Surgery:
    """States of one stream translated into another's; `lanes` holds the result, the given states are left alone.

    lanes: lane -> state, of every lane after one step. saved: the fingerprint they belong to.
    """

    def __init__(self, lanes: Mapping[int, LaneState], saved: Mapping[str, Any], plan: Plan) -> None:
        self._saved, self._now, self._plan = saved, fingerprint(plan), plan
        self._old_names: list[str] = saved["order"]
        self._kept = {name for name in plan.names if self._why_renewed(name) is None}
        self._is_same_mix = _mix(saved) == _mix(self._now)
        rules, new_rules = saved["rules"], self._now["rules"]
        self._measure = saved["processor"] != self._now["processor"] or any(
            rules[name] != new_rules[name] for name in _MEASURING_RULES
        )
        self.dropped: Counter[str] = Counter()
        self.measured = 0
        self.lanes = {lane: self._translated(state) for lane, state in lanes.items()}

    def explain(self, changed: list[str], step: int) -> list[str]:
        """What a remix changes, and how far what it keeps is."""
        old, new = _shares(self._saved, step), _shares(self._now, step)
        lines = [f"stream.on_change=remix: from step {step} on"]
        for name in self._old_names:
            if name not in self._plan.names:
                lines.append(f"  removed  {name}: its share was {old[name]:.2%}")
        for number, name in enumerate(self._plan.names):
            change = f"{old[name]:.2%} -> " if old.get(name, new[name]) != new[name] else ""
            share = f"share {change}{new[name]:.2%}"
            if name in self._kept:
                lines.append(f"  kept     {name}: {share}, goes on at {self._progress(number)}")
            else:
                verb = "renewed " if name in old else "added   "
                size = f"{len(self._plan.sources[number]):,} samples"
                lines.append(f"  {verb} {name}: {share}, {size}, begins its first epoch{self._why_renewed(name)}")
        lines += [f"  {line}" for line in changed if not line.startswith(("sources.", "order")) or _is_own_line(line)]
        lines += [f"  {_samples(count, 'waiting sample')} dropped: {why}" for why, count in self.dropped.items()]
        if self.measured:
            lines.append(f"  {_samples(self.measured, 'waiting sample')} measured again")
        return [*lines, *([] if self._is_same_mix else ["  the mixture begins again at its shares, in every lane"])]

    def explain_skips(self, added: Mapping[str, frozenset[int]], step: int) -> list[str]:
        """What a longer skip list changes."""
        lines = []
        for name, numbers in added.items():
            are = "is" if len(numbers) == 1 else "are"
            lines.append(f"skip list: {_samples(len(numbers))} of {name} {are} left out from step {step} on")
        return lines + [f"  {_samples(count, 'waiting sample')} dropped: {why}" for why, count in self.dropped.items()]

    def _why_renewed(self, name: str) -> str | None:
        """Why a source of now cannot keep its places; "" = it is new; None = it keeps them."""
        before, after = self._saved["sources"].get(name), self._now["sources"][name]
        if before is None:
            return ""
        if before["index_hash"] != after["index_hash"]:
            return "; its shards are not those that were saved"
        if before["chunk"] != after["chunk"]:
            return f"; its chunk was {before['chunk']}, now {after['chunk']}"
        return None

    def _translated(self, old: LaneState) -> LaneState:
        """One lane's state in terms of the new plan."""
        plan, numbers = self._plan, {name: number for number, name in enumerate(self._plan.names)}
        places = [Place() for _ in plan.names]
        kept = {number: numbers[name] for number, name in enumerate(self._old_names) if name in self._kept}
        for before, after in kept.items():
            places[after] = replace(old.places[before])
        losses = {(kept[of], shard, why): count for (of, shard, why), count in old.losses.items() if of in kept}
        state = LaneState(old.lane, places, old.rows, [], losses, list(old.mix) if self._is_same_mix else [])
        reader = LaneReader(plan, state)
        for ref in old.waiting:
            if ref.source not in kept:
                name = self._old_names[ref.source]
                self.dropped[f"{name} was {'renewed' if name in numbers else 'removed'}"] += 1
                continue
            found = self._still_fits(reader, ref._replace(source=kept[ref.source]))
            if found is not None:
                state.waiting.append(found)
        return state

    def _still_fits(self, reader: LaneReader, ref: Ref) -> Ref | None:
        """A waiting sample as the new plan sees it; None where it is left out now, and counted."""
        place, name = reader.state.places[ref.source], self._plan.names[ref.source]
        if ref.index in self._plan.skipped[ref.source]:
            loss = Loss(ref.source, ref.index, Reason.SKIPPED, place.taken + place.left_out)
            self.dropped[f"{name}, on the skip list"] += 1
        elif not self._measure:
            return ref
        else:
            self.measured += 1
            outcome = reader.measured(ref)
            if isinstance(outcome, Ref):
                return outcome
            loss = outcome
            self.dropped[f"{name}, damaged or too long"] += 1
        reader.ledger.count(loss, foreseen=False)
        place.taken, place.left_out = place.taken - 1, place.left_out + 1
        return None

    def _progress(self, number: int) -> str:
        """How far a source is, over all lanes."""
        chunks = sum(state.places[number].j for state in self.lanes.values())
        epoch, inside = divmod(chunks, self._plan.deals[number].num_chunks)
        return f"{inside / self._plan.deals[number].num_chunks:.1%} of its epoch {epoch + 1}"


def _samples(count: int, noun: str = "sample") -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _is_own_line(line: str) -> bool:
    """Whether a difference of a source is not said by its shares, its places or its absence."""
    return ".loss_weight: " in line and "absent" not in line


def _restarted(states: Mapping[int, bytes], plan: Plan, changed: list[str]) -> Resumed:
    """The beginning of the data at the step that was reached."""
    step = _only_step({_head(data)[2] for data in states.values()})
    lines = [
        f"stream.on_change=restart: at step {step} the data begins again; samples seen before will be seen again",
        *(f"  {line}" for line in changed),
    ]
    fresh = {lane: replace(plan.first_state(lane), rows=step).to_bytes() for lane in range(plan.rules.num_lanes)}
    return Resumed(step, fresh, tuple(lines))


def _by_options(changed: list[str]) -> list[str]:
    """Differences by the names and defaults of the options that make them."""
    found = []
    for line in changed:
        name, _, values = line.partition(": ")
        group, _, rule = name.partition(".")
        if group in ("rules", "mix") and rule in _DEFAULTS:
            before, after = (_DEFAULTS[rule] if one == "absent" else one for one in values.split(" -> "))
            if before != after:  # else only whether it matters differs, which another line says
                found.append(f"{_OPTIONS.get(rule, f'data.{rule}')}: {before} -> {after}")
        else:
            found.append(line)
    return found or changed


def _why_shares(told: list[str], plan: Plan) -> str:
    """Where a person may have changed no share: what else moves them."""
    if not any(".share: " in line for line in told) or not any(spec.max_epochs for spec in plan.specs):
        return ""
    return " (shares of sources with max_epochs follow stage.max_steps)"


def _way_on(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to set in order to go on with a change."""
    if _is_grouped(saved, now) or _fixed(saved, now):
        return "set stream.on_change=restart to begin the data again at this step"
    return "set stream.on_change=remix to go on with what is unchanged"


def _is_grouped(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return "order" in saved["rules"] or "order" in now["rules"]


def _fixed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs and can be restarted alone."""
    pairs = [(_OPTIONS[name], saved["rules"].get(name), now["rules"][name]) for name in _FIXED_RULES]
    pairs.append(("algorithm", saved["algorithm"], now["algorithm"]))
    return [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]


def _refuse_what_no_surgery_can_do(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if _is_grouped(saved, now):
        raise StreamError(
            "stream.on_change=remix cannot change anything with data.order=grouped: its steps are those of all samples "
            "together; undo the change, or set stream.on_change=restart to go on at this step of the new order"
        )
    if fixed := _fixed(saved, now):
        raise StreamError(
            f"stream.on_change=remix cannot change {', '.join(fixed)}: a lane's places in a source are those of its "
            "number among all lanes in the order of the seed, so every sample would change hands; undo the change, or "
            "set stream.on_change=restart to begin the data again at this step"
        )


def _parsed(states: Mapping[int, bytes], num_lanes: int) -> dict[int, LaneState]:
    """The states of all lanes; StreamError unless there is one of each, all after the same step."""
    lanes = {lane: LaneState.from_bytes(state) for lane, state in states.items()}
    if sorted(lanes) != list(range(num_lanes)) or any(lane != state.lane for lane, state in lanes.items()):
        raise StreamError(f"states of lanes {sorted(lanes)}; one each of 0..{num_lanes - 1} is needed")
    _only_step({state.rows for state in lanes.values()})
    return lanes


def _only_step(steps: set[int]) -> int:
    if len(steps) != 1:
        raise StreamError(f"states of different steps {sorted(steps)}; save all lanes after the same step")
    return next(iter(steps))


def _head(data: bytes) -> list[int]:
    """Version, lane and rows of a state of any version."""
    numbers, shift = [0], 0
    for byte in data:
        numbers[-1] |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if len(numbers) == 3:
                return numbers
            numbers.append(0)
            shift = 0
    raise StreamError(f"lane state of {len(data)} bytes is cut off")


def _mix(told: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a place in the mixture belongs to."""
    return told["mix"], [(name, told["sources"][name]["share"]) for name in told["order"]]


def _shares(told: Mapping[str, Any], step: int) -> dict[str, float]:
    """Share of each source of a fingerprint at a step."""
    names = tuple(told["order"])
    given = [told["sources"][name]["share"] for name in names]
    if not any(isinstance(share, list) for share in given):
        return {name: share / ONE for name, share in zip(names, given, strict=True)}
    points = tuple(tuple((int(at), float(weight)) for at, weight in one) for one in given)
    shares = Shares(names, points, told["mix"]["unit"], told["mix"]["temperature"]).at(step)
    return {name: share / ONE for name, share in zip(names, shares, strict=True)}
