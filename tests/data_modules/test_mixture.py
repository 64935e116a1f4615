"""The mixture: shares are kept in every lane and over all lanes, and a cursor goes on from its state."""

from __future__ import annotations

import pickle
from collections import Counter
from hashlib import sha256
from math import fsum
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.mixture import ONE, Mixture
from data_modules.shares import Shares, fixed

FIVE = (0.5, 0.25, 0.15, 0.07, 0.03)
RAGGED = tuple(Random(5).random() ** 3 for _ in range(47))
PINNED_ROW, PINNED = [0, 1, 0, 0, 0, 2, 0, 1, 0, 2, 0, 1], "bddc8480806e5f7e"
AWKWARD = [(1, 1), (1, 1, 2), (0.9, 0.09, 0.01), FIVE, (63, 1), (4093, 2, 1), (3, 5, 56), (0.618034, 0.381966), RAGGED]


def mixture(weights: tuple[float, ...], num_lanes: int, unit: str = "samples") -> Mixture:
    return Mixture(fixed({f"s{number}": weight for number, weight in enumerate(weights)}, unit=unit), num_lanes)


def drawn(made: Mixture, steps: int) -> list[list[int]]:
    """draws[step][lane] = source."""
    cursors = [made.lane(lane) for lane in range(made.num_lanes)]
    out = []
    for step in range(steps):
        row = [cursor.choose(step) for cursor in cursors]
        for cursor, source in zip(cursors, row, strict=True):
            cursor.count(source, 1, 1)
        out.append(row)
    return out


def off(made: Mixture, draws: list[list[int]]) -> tuple[float, float]:
    """(most that all lanes together, most that one lane is off its shares, at any step), in samples."""
    together: Counter[int] = Counter()
    alone = [[0] * len(made.shares) for _ in range(made.num_lanes)]
    worst_together = worst_alone = 0
    for step, row in enumerate(draws, start=1):
        together.update(row)
        for source, share in enumerate(made.shares):
            worst_together = max(worst_together, abs(together[source] * ONE - share * step * len(row)))
        for lane, source in enumerate(row):
            alone[lane][source] += 1
            if step % 5 == 0 or step == len(draws):
                counts = zip(alone[lane], made.shares, strict=True)
                worst_alone = max(worst_alone, *(abs(count * ONE - share * step) for count, share in counts))
    return worst_together / ONE, worst_alone / ONE


class TestFixedShares:
    """Weights that do not change, one draw one sample."""

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8), st.integers(1, 40))
    def test_all_lanes_together_stay_within_one_sample(self, weights: list[float], num_lanes: int) -> None:
        made = mixture(tuple(weights), num_lanes)
        together, alone = off(made, drawn(made, 400 // num_lanes + 10))
        assert together < 1
        assert alone < 3

    @pytest.mark.parametrize("weights", AWKWARD, ids=lambda weights: f"{len(weights)} sources")
    @pytest.mark.parametrize("num_lanes", [1, 2, 12])
    def test_awkward_mixes_keep_their_shares(self, weights: tuple[float, ...], num_lanes: int) -> None:
        made = mixture(weights, num_lanes)
        together, alone = off(made, drawn(made, 960 // num_lanes))
        assert together < 1
        assert alone < 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("weights", "num_lanes"),
        [(FIVE, 12), (FIVE, 64), (RAGGED, 12), ((1, 1, 2), 2), ((4093, 2, 1), 64)],
        ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} sources",
    )
    def test_a_single_lane_does_not_drift(self, weights: tuple[float, ...], num_lanes: int) -> None:
        made = mixture(weights, num_lanes)
        together, alone = off(made, drawn(made, max(2_000, 60_000 // num_lanes)))
        assert together < 1
        assert alone < 3

    def test_a_rare_source_visits_the_lanes_in_turn(self) -> None:
        rare = [
            lane for row in drawn(mixture((0.8, 0.18, 0.02), 12), 600) for lane, source in enumerate(row) if source == 2
        ]
        assert len(rare) == 144
        for start in range(0, 144, 12):
            assert len(set(rare[start : start + 12])) >= 9
        assert max(Counter(rare).values()) - min(Counter(rare).values()) <= 2

    def test_the_order_is_pinned(self) -> None:
        """Saved states mean places in this order; if this test must change, raise lanes.ALGORITHM."""
        draws = drawn(mixture(FIVE, 12), 40)
        assert draws[0] == PINNED_ROW
        assert sha256(bytes(source for row in draws for source in row)).hexdigest()[:16] == PINNED

    def test_lanes_apart_draw_what_lanes_together_draw(self) -> None:
        together = drawn(mixture(FIVE, 12), 60)
        for lane in (0, 5, 11):
            cursor = mixture(FIVE, 12).lane(lane)
            for step in range(60):
                source = cursor.choose(step)
                cursor.count(source, 1, 1)
                assert source == together[step][lane]

    def test_lanes_far_behind_draw_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data_modules.dealing.KEPT", 64)
        together = drawn(mixture(FIVE, 12), 60)
        made = mixture(FIVE, 12)
        for lane in range(12):  # one after another, so that all of the first one's work is forgotten
            cursor = made.lane(lane)
            for step in range(60):
                source = cursor.choose(step)
                cursor.count(source, 1, 1)
                assert source == together[step][lane]

    def test_lanes_in_different_rounds_stay_near_their_shares(self) -> None:
        made = mixture(FIVE, 16)
        random = Random(1)
        counts: Counter[int] = Counter()
        for lane in range(16):
            cursor = made.lane(lane)
            for step in range(random.randrange(300, 340)):
                source = cursor.choose(step)
                cursor.count(source, 1, 1)
                counts[source] += 1
        for source, share in enumerate(made.shares):
            assert abs(counts[source] - share / ONE * counts.total()) < 2 * 16**0.5

    def test_a_state_is_small(self) -> None:
        cursor = mixture(FIVE, 64).lane(17)
        for step in range(1000):
            cursor.count(cursor.choose(step), 1, 1)
        state = cursor.state()
        assert sum(max(1, -(-(2 * number).bit_length() // 7)) for number in state) < 32

    def test_one_source_needs_no_state(self) -> None:
        cursor = mixture((3.0,), 5).lane(2)
        assert cursor.choose(0) == 0
        cursor.count(0, 7, 7)
        assert cursor.state() == []


def changing(unit: str = "samples") -> Mixture:
    """One source goes, one comes, one stays."""
    points = (((0, 6.0), (100, 0.0)), ((20, 0.0), (60, 3.0)), ((0, 1.0),))
    return Mixture(Shares(("a", "b", "c"), points, unit), 12)


class TestCredits:
    """Schedules and units: the source that is owed most."""

    @pytest.mark.parametrize("unit", ["samples", "tokens", "target_tokens"])
    @pytest.mark.parametrize("num_lanes", [1, 12])
    def test_a_lane_stays_within_its_bound_of_tokens(self, unit: str, num_lanes: int) -> None:
        rising = Shares(("a", "b"), (((0, 1.0), (99, 2.0)), ((0, 1.0),)))
        made = Mixture(rising, num_lanes) if unit == "samples" else mixture((*FIVE, 0.0004), num_lanes, unit)
        sources = len(made.shares)
        random = Random(3)
        sizes = [random.randrange(20, 900) for _ in range(sources)]
        for lane in range(num_lanes):
            cursor = made.lane(lane)
            owed, largest = [0.0] * sources, 0
            for step in range(400):
                source = cursor.choose(step)
                tokens = sizes[source] + random.randrange(100)
                cursor.count(source, tokens, tokens // 3)
                amount = {"samples": 1, "tokens": tokens, "target_tokens": tokens // 3}[unit]
                largest = max(largest, amount)
                for number, share in enumerate(made.resolved.at(step)):
                    owed[number] += share / ONE * amount - amount * (number == source)
            harmonic = fsum(1 / number for number in range(1, sources + 1))
            assert -2 * largest <= min(owed)
            assert max(owed) <= (1 + harmonic) * largest

    def test_schedules_are_followed_over_all_lanes(self) -> None:
        made = changing()
        draws = drawn(made, 140)
        owed = [0.0, 0.0, 0.0]
        for step, row in enumerate(draws):
            for number, share in enumerate(made.resolved.at(step)):
                owed[number] += share / ONE * 12 - row.count(number)
            assert max(map(abs, owed)) <= 1.5 * 12
        assert not any(1 in row for row in draws[:21])
        assert not any(0 in row for row in draws[100:])

    def test_lanes_take_a_new_source_one_after_another(self) -> None:
        draws = drawn(Mixture(Shares(("a", "b"), (((0, 1.0),), ((0, 0.0), (50, 0.0), (51, 0.1)))), 20), 120)
        first = [next(step for step, row in enumerate(draws) if row[lane] == 1) for lane in range(20)]
        assert max(Counter(first).values()) <= 4

    def test_a_rare_source_comes_in_different_steps_of_the_lanes(self) -> None:
        draws = drawn(Mixture(fixed({"a": 0.9, "b": 0.1}, unit="tokens"), 10), 10)
        assert 9 <= sum(map(sum, draws)) <= 11
        assert max(map(sum, draws)) <= 2

    def test_very_rare_sources_start_at_once(self) -> None:
        made = mixture((1.0, 1e-9), 256, "tokens")
        assert made.lane(255).choose(0) == 0


@pytest.mark.parametrize("made", [mixture(FIVE, 12), mixture(FIVE, 7), changing(), mixture(FIVE, 12, "tokens")])
def test_a_cursor_goes_on_from_its_state(made: Mixture) -> None:
    expected: list[int] = []
    states = []
    cursor = made.lane(4)
    for step in range(50):
        states.append(cursor.state())
        source = cursor.choose(step)
        assert cursor.state() == states[-1]
        cursor.count(source, 10 + step, 5)
        expected.append(source)
    for step in (0, 1, 17, 49):
        again = pickle.loads(pickle.dumps(made)).lane(4, states[step])
        assert again.state() == states[step]
        for later in range(step, 50):
            source = again.choose(later)
            assert source == expected[later]
            again.count(source, 10 + later, 5)


def test_a_state_of_another_mix_is_refused() -> None:
    state = mixture(FIVE, 12).lane(0).state()
    others = [mixture(FIVE, 64), mixture((1.0,), 12), mixture((1, 1), 12, "tokens")]
    for other in others:
        with pytest.raises(ValueError, match=r"lane 0: mixture state .* belongs to another mix"):
            other.lane(0, state)
