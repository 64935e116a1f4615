from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.evaluation.control import shuffled
from bestiary.schema import Region, Sample

from .scenes import KINDS, region


def sample(i: int, kinds: list[str], domain: str = "natural") -> Sample:
    at = (0.2 + 0.6 * (i % 7) / 7, 0.2 + 0.6 * (i % 5) / 5)
    return Sample(f"s{i}", "drawn", domain, (), (), tuple(region(k, at, m) for m, k in enumerate(kinds, start=1)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.sampled_from(["a", "b"])),
        min_size=2,
        max_size=12,
    ),
    st.integers(0, 99),
)
def test_everything_but_the_places_stays(asked: list[tuple[list[str], str]], seed: int) -> None:
    samples = [sample(i, kinds, domain) for i, (kinds, domain) in enumerate(asked)]
    control = shuffled(samples, seed=seed)
    assert control == shuffled(samples, seed=seed)
    for own, other in zip(samples, control, strict=True):
        assert replace(other, regions=own.regions) == own
        assert [(r.mark, r.kind) for r in other.regions] == [(r.mark, r.kind) for r in own.regions]
        assert all(0 <= c <= 1 for r in other.regions for c in r.coords)


def test_donors_come_from_the_same_domain_and_kind_where_there_are_two() -> None:
    samples = [sample(i, ["point"], "a" if i < 3 else "b") for i in range(6)]
    places = {s.regions[0].coords: s for s in samples}
    for own, other in zip(samples, shuffled(samples, seed=1), strict=True):
        donor = places[other.regions[0].coords]
        assert donor.key != own.key
        assert donor.domain == own.domain


def test_a_lone_kind_borrows_the_place_and_keeps_its_shape() -> None:
    box = Sample("box", "d", "a", (), (), (Region("box", (0.1, 0.1, 0.3, 0.2), 1),))
    point = Sample("point", "d", "a", (), (), (Region("point", (0.95, 0.5), 1),))
    moved_box, moved_point = shuffled([box, point], seed=0)
    assert moved_box.regions[0].coords == pytest.approx((0.8, 0.45, 1.0, 0.55))
    assert moved_point.regions[0].coords == pytest.approx((0.2, 0.15))


def test_a_donor_with_fewer_regions_repeats_them() -> None:
    two, one = sample(1, ["point", "point"]), sample(2, ["point"])
    moved, _ = shuffled([two, one], seed=0)
    assert [r.coords for r in moved.regions] == [one.regions[0].coords] * 2


def test_a_single_picture_has_no_control() -> None:
    with pytest.raises(ValueError, match="at least two"):
        shuffled([sample(0, ["point"])], seed=0)
