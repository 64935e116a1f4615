"""From weights, counts, repeats, temperature and caps to shares."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.shares import ONE, Shares, Use, cap, fixed, integers, resolve
from data_modules.sources import parse_sources


def parsed(**sources: Any) -> Any:
    return parse_sources({name: {"path": "x", **given} for name, given in sources.items()})


def percent(shares: Shares, step: int = 0) -> list[float]:
    return [round(100 * share / ONE, 2) for share in shares.at(step)]


class TestResolve:
    """What a user may ask for."""

    def test_weights_are_on_any_scale_and_none_is_one(self) -> None:
        assert percent(resolve(parsed(a={"weight": 6}, b={"weight": 3}, c={}), [1, 1, 1])) == [60, 30, 10]

    def test_counts_and_repeats_are_numbers_of_samples(self) -> None:
        specs = parsed(a={"count": 300}, b={"repeat": 2}, c={"repeat": 0.5})
        assert percent(resolve(specs, [7, 300, 200])) == [30, 60, 10]

    @pytest.mark.parametrize(
        ("sources", "unit", "message"),
        [
            (
                {"a": {"count": 5}, "b": {"weight": 1}},
                "samples",
                r"data\.sources\.a\.count .* data\.sources\.b has",
            ),
            ({"a": {}, "b": {"repeat": 1}}, "samples", r"data\.sources\.b\.repeat .* data\.sources\.a has a weight"),
            ({"a": {"repeat": 1}}, "tokens", r"data\.sources\.a\.repeat .* data\.unit=tokens"),
            ({"a": {"schedule": [[3, 0.0], [9, 1.0]]}}, "samples", "every schedule is 0 at step 3"),
        ],
    )
    def test_what_cannot_be_is_named(self, sources: Any, unit: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            resolve(parsed(**sources), [10] * len(sources), unit=unit)
        assert "\n" not in str(caught.value)

    def test_temperature_makes_shares_more_equal(self) -> None:
        specs = parsed(a={"weight": 9}, b={"weight": 1})
        assert percent(resolve(specs, [1, 1], temperature=2.0)) == [75, 25]
        assert percent(resolve(specs, [1, 1], temperature=1e6)) == [50, 50]

    def test_schedules_are_linear_between_points_and_constant_outside(self) -> None:
        specs = parsed(a={"schedule": [[10, 1], [20, 3]]}, b={"weight": 1})
        shares = resolve(specs, [1, 1])
        assert [percent(shares, step)[0] for step in (0, 10, 15, 20, 99)] == [50, 50, 66.67, 75, 75]
        assert not shares.is_fixed
        assert percent(resolve(specs, [1, 1], temperature=2.0), 20) == [63.4, 36.6]

    def test_a_source_may_come_and_go(self) -> None:
        shares = resolve(parsed(a={"schedule": [[0, 1], [10, 0]]}, b={}), [1, 1])
        assert shares.at(10) == (0, ONE)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=50).filter(any))
    def test_integers_sum_to_one_and_forget_nobody(self, weights: list[float]) -> None:
        shares = integers(weights)
        assert sum(shares) == ONE
        assert all((share > 0) == (weight > 0) for share, weight in zip(shares, weights, strict=True))

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_senseless_weights_are_refused(self, weight: float) -> None:
        with pytest.raises(ValueError, match="positive"):
            fixed({"a": 1.0, "b": weight})


class TestCaps:
    """No source more often than `max_epochs`."""

    def test_what_a_capped_source_loses_goes_to_the_others_in_proportion(self) -> None:
        specs = parsed(a={"weight": 50, "max_epochs": 2}, b={"weight": 30}, c={"weight": 20})
        shares = cap(resolve(specs, [100, 1, 1]), specs, [100, 1, 1], Use(1000, 1.0, (1.0, 1.0, 1.0)))
        assert percent(shares) == [20, 48, 32]

    def test_caps_that_push_others_over_theirs_are_kept_too(self) -> None:
        specs = parsed(a={"weight": 50, "max_epochs": 1}, b={"weight": 30, "max_epochs": 4}, c={"weight": 20})
        shares = cap(resolve(specs, [100, 100, 9]), specs, [100, 100, 9], Use(1000, 1.0, (1.0, 1.0, 1.0)))
        assert percent(shares) == [10, 40, 50]

    def test_a_cap_that_is_not_reached_changes_nothing(self) -> None:
        specs = parsed(a={"weight": 50, "max_epochs": 9}, b={"weight": 50})
        shares = resolve(specs, [100, 100])
        assert cap(shares, specs, [100, 100], Use(1000, 1.0, (1.0, 1.0))) is shares

    def test_tokens_count_where_the_unit_is_tokens(self) -> None:
        specs = parsed(a={"weight": 50, "max_epochs": 1}, b={"weight": 50})
        shares = resolve(specs, [100, 100], unit="tokens")
        assert percent(cap(shares, specs, [100, 100], Use(10, 2000.0, (20.0, 900.0)))) == [10, 90]

    def test_too_little_data_says_how_far_it_goes(self) -> None:
        specs = parsed(a={"max_epochs": 2}, b={"max_epochs": 1})
        with pytest.raises(ValueError, match=r"enough for 150 rows of the 1,000 .*max_epochs.*max_steps"):
            cap(resolve(specs, [100, 100]), specs, [100, 100], Use(1000, 2.0, (1.0, 1.0)))

    def test_caps_and_schedules_exclude_each_other(self) -> None:
        specs = parsed(a={"max_epochs": 2}, b={"schedule": [[0, 1], [9, 2]]})
        with pytest.raises(ValueError, match=r"sources\.a\.max_epochs .* data\.sources\.b\.schedule"):
            cap(resolve(specs, [1, 1]), specs, [1, 1], Use(10, 1.0, (1.0, 1.0)))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 99), st.floats(0.1, 9)), min_size=1, max_size=9))
    def test_no_cap_is_passed_and_order_by_share_is_kept(self, asked: list[tuple[float, int, float]]) -> None:
        given = {f"s{n}": {"weight": weight, "max_epochs": most} for n, (weight, _, most) in enumerate(asked)}
        specs = parsed(**given, rest={})
        sizes = [*(size for _, size, _ in asked), 1]
        before = resolve(specs, sizes)
        after = cap(before, specs, sizes, Use(100, 1.0, tuple(1.0 for _ in sizes)))
        for spec, size, share in zip(specs, sizes, after.at(0), strict=True):
            assert spec.max_epochs is None or share / ONE <= spec.max_epochs * size / 100 + 1e-6
        grown = [share for spec, share in zip(specs, after.at(0), strict=True) if spec.max_epochs is None]
        assert grown[0] >= before.at(0)[-1] - len(specs)


@pytest.mark.parametrize("key", ["weight", "count", "repeat"])
def test_shares_beyond_the_range_of_numbers_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"data.sources.a.{key}=1e\+308"):
        parse_sources({"a": {"path": "x", key: 1e308}, "b": {"path": "y", key: 1e308}})


def test_a_temperature_that_leaves_a_source_nothing_is_refused() -> None:
    specs = parse_sources({"a": {"path": "x", "weight": 1}, "b": {"path": "y", "weight": 9}})
    assert min(resolve(specs, [1, 1], temperature=0.05).at(0)) == 1
    with pytest.raises(ValueError, match=r"data\.temperature=0.001 leaves source 'a' no share at all"):
        resolve(specs, [1, 1], temperature=0.001)
