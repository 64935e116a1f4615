from __future__ import annotations

import pytest

from data_modules.grouped_sampler import GroupedSampler, length_groups


def test_groups_follow_their_first_sample_and_are_sorted_by_length() -> None:
    order, sizes = length_groups(["a", "b", "a", "b", "a"], [3, 9, 1, 2, 3])
    assert order == [2, 0, 4, 3, 1] and sizes == [3, 2]


def test_kinds_and_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 kinds but 1 lengths"):
        length_groups(["a", "b"], [1])


def test_every_update_is_of_one_group_and_ranks_share_it_out() -> None:
    sampler = GroupedSampler(group_sizes=[53, 30, 7], batch_size=3, num_ranks=2, accumulation=2, seed=1)
    first_of_group = [0, 53, 83, 90]
    for epoch in range(3):
        batches = sampler.global_batches(epoch)
        for batch in batches:
            assert len({sum(place >= first for first in first_of_group) for place in batch}) == 1
        ranks = [sampler.places(rank, epoch) for rank in range(2)]
        assert all(len(places) == len(sampler) for places in ranks)
        assert sorted(ranks[0] + ranks[1]) == sorted(place for batch in batches for place in batch)
    assert 2 * len(sampler) + sampler.num_dropped == 90


def test_epochs_differ_and_a_start_skips_own_micro_steps() -> None:
    sampler = GroupedSampler(group_sizes=[40], batch_size=2, accumulation=2)
    assert sampler.places(0, 0) != sampler.places(0, 1)
    assert sampler.places(0, 0, first_micro_step=3) == sampler.places(0, 0)[6:]
    assert sampler.places(0, 0, first_micro_step=99) == []


def test_groups_below_one_global_batch_are_dropped_whole() -> None:
    sampler = GroupedSampler(group_sizes=[3, 5], batch_size=4, shuffle=False)
    assert sampler.places(0, 0) == [3, 4, 5, 6] and sampler.num_dropped == 4


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulation=0"):
        GroupedSampler(group_sizes=[3], batch_size=1, accumulation=0)
    with pytest.raises(ValueError, match="rank=2 of 2"):
        GroupedSampler(group_sizes=[3], batch_size=1, num_ranks=2).places(2, 0)
