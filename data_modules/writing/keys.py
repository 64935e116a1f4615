"""Which keys a source already has, at 8 bytes a key."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_modules.index import Keys, Shard, key_hash


class KnownKeys:
    """Hashes of keys in a few sorted arrays, each at least twice as long as the next: few bisections a search."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def among(self, hashes: np.ndarray) -> set[int]:
        """Those of `hashes` (uint64) that are known."""
        known = np.zeros(len(hashes), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            known |= run[places] == hashes
        return set(hashes[known].tolist())

    def add(self, hashes: np.ndarray) -> None:
        """Remember these, too."""
        if not len(hashes):
            return
        self._runs.append(np.sort(hashes))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")


def known_keys(folder: Path, shards: Iterable[Shard]) -> KnownKeys:
    """The keys of finished shards, from their `.keys` files."""
    known = KnownKeys()
    for shard in shards:
        path = (folder / shard.file).with_suffix(".keys")
        keys = Keys(memoryview(path.read_bytes()), shard.samples, str(path))
        known.add(np.fromiter(map(key_hash, keys), np.uint64, shard.samples))
    return known
