"""The order in which SPHINX's fine-tuning sees its samples, for replicating a published run sample by sample.

Samples of one kind (text, image and text ...) form a group, sorted by length; every group is cut into consecutive
global batches, its tail is dropped, and an epoch shuffles whole global batches. So all ranks and accumulation steps of
an update have samples of one kind and similar length. The stream (stream.py) has another order: it drops nothing, mixes
kinds by shares and packs. The rule is FinetuneDistSampler's of LLaMA2-Accessory @ 3777c43 and Draw-and-Understand
@ 28a1bd1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def length_groups(kinds: Sequence[str], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """(sample numbers in the published order, sizes of the groups).

    kinds: the `type` of each sample's source; groups come in order of their first sample. lengths: characters of each
    sample's turns together. Equal lengths keep their order.
    """
    if len(kinds) != len(lengths):
        raise ValueError(f"{len(kinds)} kinds but {len(lengths)} lengths; every sample has one of each")
    groups: dict[str, list[int]] = {}
    for sample, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(sample)
    ordered = [sorted(group, key=lengths.__getitem__) for group in groups.values()]
    return [sample for group in ordered for sample in group], [len(group) for group in ordered]


@dataclass(frozen=True, kw_only=True)
class GroupedSampler:
    """Which samples each rank takes, in units of places: numbers in `length_groups`' order.

    group_sizes: samples of each group. batch_size: of one rank and micro step. accumulation: micro steps of an update.
    """

    group_sizes: Sequence[int]
    batch_size: int
    num_ranks: int = 1
    accumulation: int = 1
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_ranks", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it is at least 1")

    @property
    def global_batch_size(self) -> int:
        """Samples of one update over all ranks and micro steps."""
        return self.batch_size * self.num_ranks * self.accumulation

    def __len__(self) -> int:
        """Samples of one rank in an epoch."""
        return sum(size // self.global_batch_size for size in self.group_sizes) * self.batch_size * self.accumulation

    @property
    def num_dropped(self) -> int:
        """Samples at the long end of the groups that no epoch ever sees."""
        return sum(size % self.global_batch_size for size in self.group_sizes)

    def global_batches(self, epoch: int) -> list[range]:
        """The places of every update of an epoch; numpy's generator draws as the published code does."""
        batches, start = [], 0
        for size in self.group_sizes:
            whole = size - size % self.global_batch_size
            batches += [
                range(start + i, start + i + self.global_batch_size) for i in range(0, whole, self.global_batch_size)
            ]
            start += size
        if not self.shuffle:
            return batches
        order = list(range(len(batches)))
        np.random.default_rng(self.seed + epoch).shuffle(order)  # a list is shuffled by other draws than an array
        return [batches[number] for number in order]

    def places(self, rank: int, epoch: int, *, first_micro_step: int = 0) -> list[int]:
        """The places of a rank in an epoch, micro step after micro step, from `first_micro_step` on.

        Each micro step of an update holds the next num_ranks * batch_size places of its global batch, rank after rank.
        """
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank={rank} of {self.num_ranks}; ranks count from 0")
        all_ranks = self.num_ranks * self.batch_size
        mine = [
            place
            for batch in self.global_batches(epoch)
            for start in range(rank * self.batch_size, self.global_batch_size, all_ranks)
            for place in batch[start : start + self.batch_size]
        ]
        return mine[first_micro_step * self.batch_size :]
