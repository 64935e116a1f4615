"""Lanes: permutations, dealing, states."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.lanes import Deal, LaneState, Permutation, Place, Ref, hash_ints, hash_name, lanes_of, mix64
from data_modules.turns import Turns, permuted, turns


def test_the_order_of_samples_is_pinned() -> None:
    """Saved states mean places in these orders; if this test must change, raise lanes.ALGORITHM."""
    assert [mix64(0), mix64(1)] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert hash_ints(1, 2) != hash_ints(2, 1)
    permutation = Permutation(10, hash_ints(0, hash_name("a"), 0))
    assert [permutation[place] for place in range(10)] == [2, 4, 5, 1, 6, 0, 8, 9, 7, 3]
    large = Permutation(1_000_003, hash_ints(7, hash_name("toys"), 3))
    assert [large[place] for place in (0, 1, 2, 1_000_002)] == [17666, 120686, 943635, 939682]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_a_permutation_takes_every_value_once(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation[place] for place in range(size)) == list(range(size))


def test_every_permutation_of_few_things_occurs() -> None:
    seen = Counter(tuple(Permutation(4, hash_ints(key))[place] for place in range(4)) for key in range(2400))
    assert len(seen) == 24
    assert max(seen.values()) < 170


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))
def test_every_epoch_deals_every_sample_exactly_once(sizes: list[int], chunk: int, num_lanes: int, seed: int) -> None:
    deal = Deal("toys", sizes, chunk=chunk, seed=seed, num_lanes=num_lanes)
    dealt: Counter[tuple[int, int]] = Counter()
    turns = -(-3 * deal.num_chunks // num_lanes)
    for lane in range(num_lanes):
        for j in range(turns):
            epoch, numbers = deal.turn(lane, j)
            assert 1 <= len(numbers) <= chunk
            dealt.update((epoch, number) for number in numbers)
    for epoch in range(3):
        assert [dealt[epoch, number] for number in range(sum(sizes))] == [1] * sum(sizes)


def test_a_chunk_never_crosses_a_shard() -> None:
    deal = Deal("toys", [5, 3], chunk=2, seed=0, num_lanes=1)
    chunks = {tuple(deal.turn(0, j)[1]) for j in range(deal.num_chunks)}
    assert chunks == {(0, 1), (2, 3), (4,), (5, 6), (7,)}


def test_epochs_and_sources_have_orders_of_their_own() -> None:
    def order(name: str, epoch: int, seed: int = 0) -> list[int]:
        deal = Deal(name, [50], chunk=1, seed=seed, num_lanes=1)
        return [deal.turn(0, epoch * 50 + j)[1][0] for j in range(50)]

    orders = [order("a", 0), order("a", 1), order("b", 0), order("a", 0, seed=1)]
    assert len({tuple(one) for one in orders}) == 4


numbers = st.integers(0, 2**70)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(Place, numbers, numbers, numbers, numbers), min_size=1, max_size=4),
    st.lists(st.builds(Ref, numbers, numbers, numbers, numbers, numbers), max_size=4),
    st.dictionaries(st.tuples(numbers, numbers, numbers), numbers, max_size=3),
    st.lists(st.integers(-(2**60), 2**60), max_size=5),
)
def test_a_state_comes_back_from_its_bytes(
    places: list[Place], waiting: list[Ref], losses: dict[tuple[int, int, int], int], mix: list[int]
) -> None:
    state = LaneState(3, places, 77, waiting, losses, mix)
    data = state.to_bytes()
    assert LaneState.from_bytes(data) == state
    for broken in (data[:-1], data + b"\0"):
        with pytest.raises(ValueError, match="lane state"):
            LaneState.from_bytes(broken)


def test_a_state_is_small() -> None:
    waiting = [Ref(2, 900_000, 3, 1_700, 5) for _ in range(16)]
    assert len(LaneState(11, [Place(10_000, 0, 10_000, 4)] * 3, 5_000, waiting).to_bytes()) < 190


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.integers(0, 300),
)
def test_looking_ahead_gives_the_same_turns(sizes: list[int], chunk: int, num_lanes: int, j: int, seed: int) -> None:
    deal = Deal("toys", sizes, chunk=chunk, seed=seed, num_lanes=num_lanes)
    lane = seed % num_lanes
    expected: list[tuple[int, int]] = []
    for number in range(j, j + 60):
        epoch, samples = deal.turn(lane, number)
        expected += [(epoch, index) for index in samples]
    for ahead in (turns(deal, lane, j, 0), Turns(deal, range(num_lanes)).of(lane, j, 0)):
        assert [(epoch, index) for epoch, index, _, _ in islice(ahead, len(expected))] == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_many_places_of_a_permutation_are_those_one_by_one(size: int, key: int, first: int) -> None:
    permutation = Permutation(size, key)
    places = np.arange(40) + min(first, max(0, size - 40))
    places = places[places < size]
    assert permuted(size, key, places).tolist() == [permutation[place] for place in places.tolist()]


@pytest.mark.parametrize(("lanes", "parts"), [(12, 1), (12, 5), (3, 4), (7, 7), (1, 3)])
def test_parts_own_contiguous_blocks_that_cover_all_lanes(lanes: int, parts: int) -> None:
    blocks = [lanes_of(part, parts, range(5, 5 + lanes)) for part in range(parts)]
    assert [lane for block in blocks for lane in block] == list(range(5, 5 + lanes))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
