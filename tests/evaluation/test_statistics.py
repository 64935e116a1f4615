from __future__ import annotations

import pytest

from bestiary.evaluation.statistics import bootstrap, paired_bootstrap


def test_an_interval_holds_its_score_and_narrows_with_pictures() -> None:
    few = bootstrap([1, 0] * 10, [1] * 20, seed=0)
    many = bootstrap([1, 0] * 500, [1] * 1000, seed=0)
    assert few.low < 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 4


def test_an_interval_is_a_function_of_its_seed() -> None:
    assert bootstrap([1, 0, 2], [1, 1, 3], seed=3) == bootstrap([1, 0, 2], [1, 1, 3], seed=3)


def test_regions_of_one_picture_are_drawn_together() -> None:
    one_by_one = bootstrap([1] * 20 + [0] * 20, [1] * 40, seed=0)
    in_fours = bootstrap([4] * 5 + [0] * 5, [4] * 10, seed=0)
    assert in_fours.high - in_fours.low > 1.5 * (one_by_one.high - one_by_one.low)


def test_pictures_without_scored_regions_weigh_nothing() -> None:
    assert bootstrap([2, 0], [2, 0], seed=0) == bootstrap([2], [2], seed=0)
    with pytest.raises(ValueError, match="not all zero"):
        bootstrap([0], [0], seed=0)


def test_a_paired_difference_sees_through_hard_pictures() -> None:
    hard = [0.0, 1.0] * 50
    ours, theirs, gain = paired_bootstrap([h + 0.1 for h in hard], hard, [1] * 100, seed=0)
    assert gain.low == pytest.approx(0.1) == gain.high
    assert theirs == bootstrap(hard, [1] * 100, seed=0)
    assert ours.low == pytest.approx(theirs.low + 0.1)
