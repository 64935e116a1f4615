"""The mixture: shares are kept in every lane and over all lanes."""

from __future__ import annotations

import pytest

from data_modules.mixture import ONE, Mixture

MIXES = [(1.0,), (0.6, 0.4), (0.5, 0.3, 0.2), (7, 2, 1), (0.9, 0.09, 0.01), (0.55, 0.25, 0.15, 0.05)]


def drawn(weights: tuple[float, ...], num_lanes: int, steps: int) -> list[list[int]]:
    """draws[lane][step] = source."""
    mixture = Mixture({str(number): weight for number, weight in enumerate(weights)}, num_lanes)
    out = []
    for lane in range(num_lanes):
        draws = mixture.start(lane)
        out.append([])
        for _ in range(steps):
            out[-1].append(mixture.choose(draws))
            draws[out[-1][-1]] += 1
    return out


@pytest.mark.parametrize("weights", MIXES)
def test_shares_hold_in_a_lane_and_over_all_lanes(weights: tuple[float, ...]) -> None:
    num_lanes, steps = 12, 200
    lanes = drawn(weights, num_lanes, steps)
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        for lane in lanes:
            assert abs(lane.count(source) - share * steps) < 1.5
        for step in range(1, steps):
            seen = sum(lane[:step].count(source) for lane in lanes)
            assert abs(seen - share * step * num_lanes) < 3


def test_a_rare_source_comes_in_different_steps_of_the_lanes() -> None:
    lanes = drawn((0.9, 0.1), 10, 10)
    steps = sorted(lane.index(1) for lane in lanes)
    assert all(lane.count(1) == 1 for lane in lanes)
    assert steps == list(range(10))


def test_shares_are_integers_that_make_the_whole() -> None:
    assert sum(Mixture({"a": 1 / 3, "b": 1 / 3, "c": 1e-9}, 1).shares) == ONE


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Mixture({"a": 1.0, "b": weight}, 1)
