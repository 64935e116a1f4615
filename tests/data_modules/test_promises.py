"""What the stream promises about epochs and shares, for any sizes, lanes, chunks, weights and damage."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import fsum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestiary.schema import Lengths, Sample, SampleError
from data_modules.lanes import LaneState, Ref
from data_modules.rows import LaneReader, Plan
from data_modules.shares import ONE
from tests.data_modules.making import CharProcessor, source, stream

SIZES = {"one": 1, "three": 3, "seven": 7, "dozen": 12, "forty": 40, "hundred": 101}
DAMAGED = {"seven": (3,), "forty": (0, 18, 39), "hundred": (51,)}
"""Numbers of samples that have a picture."""
BOUND = 2.0
"""Largest samples a lane may be off where shares change or are of tokens: H(S) + 1 is proved, so much is seen."""


class Careful(CharProcessor):
    """Finds a cut picture before it is decoded, so that another sample takes its place."""

    def lengths(self, sample: Sample) -> Lengths:
        if any(len(image) <= 20 for image in sample.images):
            raise SampleError(sample.key, "its picture is cut")
        return super().lengths(sample)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every size once whole and, where numbers are given, once damaged."""
    root = tmp_path_factory.mktemp("promises")
    for name, size in SIZES.items():
        source(root / name, name, size)
        source(root / f"bad-{name}", name, size, bad=DAMAGED.get(name, ()))
    return root


def undamaged(name: str) -> set[int]:
    size = name.removeprefix("bad-")
    damaged = DAMAGED.get(size, ()) if name != size else ()
    return set(range(SIZES[size])) - set(damaged)


names = st.lists(st.sampled_from([*SIZES, *(f"bad-{name}" for name in DAMAGED)]), min_size=1, max_size=4, unique=True)


def plan_of(folders: Path, sources: dict[str, dict[str, Any]], **rules: Any) -> Plan:
    mix = {name: {"path": folders / name, **given} for name, given in sources.items()}
    return stream(mix, processor=Careful(), bad_budget=1.0, **rules).plan


def planned(plan: Plan, steps: int) -> tuple[list[list[list[Ref]]], list[LaneState]]:
    """(rows[step][lane], the states of all lanes after them)."""
    readers = [LaneReader(plan, plan.first_state(lane)) for lane in range(plan.rules.num_lanes)]
    rows = [[reader.plan_row() for reader in readers] for _ in range(steps)]
    return rows, [reader.state for reader in readers]


def check_epochs(plan: Plan, rows: list[list[list[Ref]]], states: list[LaneState]) -> int:
    """Every sample at most once an epoch, all of them once all lanes are past it; returns how many epochs are past."""
    drawn: Counter[tuple[int, int, int]] = Counter()
    refs = [ref for step in rows for row in step for ref in row] + [ref for state in states for ref in state.waiting]
    drawn.update((ref.source, ref.epoch, ref.index) for ref in refs)
    assert max(drawn.values(), default=1) == 1
    seen: dict[tuple[int, int], set[int]] = defaultdict(set)
    for number, epoch, index in drawn:
        seen[number, epoch].add(index)
    past = 0
    for number, name in enumerate(plan.names):
        deal = plan.deals[number]
        everyone = min((s.lane + s.places[number].j * plan.rules.num_lanes) // deal.num_chunks for s in states)
        for epoch in range(everyone):
            assert seen[number, epoch] == undamaged(name)
        past += everyone
    return past


def check_epochs_of(folders: Path, chosen: list[str], data: st.DataObject, most: int) -> None:
    given = {
        name: {"weight": data.draw(st.floats(0.05, 1)), "chunk": data.draw(st.sampled_from([None, 1, 2, 7]))}
        for name in chosen
    }
    plan = plan_of(
        folders, given, num_lanes=data.draw(st.integers(1, 14)), packing=data.draw(st.booleans()), look_ahead=4
    )
    check_epochs(plan, *planned(plan, data.draw(st.integers(1, most))))


fixture_is_read_only = [HealthCheck.function_scoped_fixture]


@settings(max_examples=25, deadline=None, suppress_health_check=fixture_is_read_only)
@given(names, st.data())
def test_an_epoch_deals_every_undamaged_sample_once(folders: Path, chosen: list[str], data: st.DataObject) -> None:
    check_epochs_of(folders, chosen, data, 16)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=fixture_is_read_only)
@given(names, st.data())
def test_an_epoch_deals_every_undamaged_sample_once_in_long_runs(
    folders: Path, chosen: list[str], data: st.DataObject
) -> None:
    check_epochs_of(folders, chosen, data, 60)


def test_epochs_do_pass_in_these_tests(folders: Path) -> None:
    plan = plan_of(folders, {"bad-seven": {}, "one": {}, "forty": {"chunk": 3}}, num_lanes=5)
    assert check_epochs(plan, *planned(plan, 40)) > 30


@settings(max_examples=15, deadline=None, suppress_health_check=fixture_is_read_only)
@given(st.sampled_from(list(SIZES)), st.integers(1, 14))
def test_one_whole_source_is_used_once_but_for_the_rest_of_a_step(folders: Path, name: str, num_lanes: int) -> None:
    plan = plan_of(folders, {name: {}}, num_lanes=num_lanes, packing=False)
    size = SIZES[name]
    rows, _ = planned(plan, size // num_lanes)
    used = {row[0].index for step in rows for row in step}
    assert len(used) == sum(map(len, rows)) == size - size % num_lanes


def check_shares(folders: Path, chosen: list[str], data: st.DataObject, most: int) -> None:
    given = {name: {"weight": data.draw(st.floats(0.01, 1))} for name in chosen}
    plan = plan_of(folders, given, num_lanes=data.draw(st.integers(1, 14)), packing=False)
    rows, _ = planned(plan, most)
    counts: Counter[int] = Counter()
    for step, lanes in enumerate(rows, start=1):
        counts.update(row[0].source for row in lanes)
        for number, share in enumerate(plan.mixture.shares):
            assert abs(counts[number] * ONE - share * step * plan.rules.num_lanes) < ONE


@settings(max_examples=15, deadline=None, suppress_health_check=fixture_is_read_only)
@given(names, st.data())
def test_shares_are_kept_within_one_sample_at_every_step(folders: Path, chosen: list[str], data: st.DataObject) -> None:
    check_shares(folders, chosen, data, 16)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=fixture_is_read_only)
@given(names, st.data())
def test_shares_are_kept_within_one_sample_in_long_runs(folders: Path, chosen: list[str], data: st.DataObject) -> None:
    check_shares(folders, chosen, data, 120)


def test_one_percent_of_damage_does_not_touch_the_shares(folders: Path) -> None:
    mix = {"bad-hundred": {"weight": 7.0}, "forty": {"weight": 3.0}}
    plan = plan_of(folders, mix, num_lanes=6, packing=False)
    rows, states = planned(plan, 60)
    assert sum(sum(state.losses.values()) for state in states) >= 2
    drawn = Counter(row[0].source for step in rows for row in step)
    assert abs(drawn[0] - 0.7 * 360) < 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("unit", ["tokens", "target_tokens", "samples"])
def test_tokens_and_schedules_stay_within_a_few_samples_of_what_is_owed(
    folders: Path, unit: str, packing: bool
) -> None:
    """Over all lanes: within N times the bound of one lane, which is BOUND of its largest samples."""
    last = {"schedule": [[0, 0.0], [15, 2.0]]} if unit == "samples" else {"weight": 1.0}
    mix: dict[str, dict[str, Any]] = {"hundred": {"weight": 2.0}, "bad-forty": {"weight": 1.0}, "dozen": last}
    plan = plan_of(folders, mix, num_lanes=6, packing=packing, unit=unit)
    owed = [[0.0] * 3 for _ in range(6)]
    largest = 0
    readers = [LaneReader(plan, plan.first_state(lane)) for lane in range(6)]
    for step in range(30):
        for reader in readers:
            waited = list(reader.state.waiting)
            row = reader.plan_row()
            for ref in drawn_between(waited, row, reader.state.waiting):
                amount = amount_of(plan, ref, unit)
                largest = max(largest, amount)
                for number, share in enumerate(plan.mixture.resolved.at(step)):
                    owed[reader.state.lane][number] += share / ONE * amount - amount * (number == ref.source)
    assert max(abs(amount) for lane in owed for amount in lane) <= BOUND * largest
    together = [abs(fsum(column)) for column in zip(*owed, strict=True)]
    assert max(together) <= 6 * BOUND * largest / 2


def drawn_between(before: list[Ref], row: list[Ref], after: list[Ref]) -> list[Ref]:
    """What a lane drew in a row: what left or waits, but did not wait before."""
    left = Counter(row + after)
    left.subtract(before)
    return list(left.elements())


def amount_of(plan: Plan, ref: Ref, unit: str) -> int:
    if unit == "samples":
        return 1
    lengths = Careful().lengths(plan.sources[ref.source][ref.index])
    return lengths.tokens if unit == "tokens" else lengths.targets
