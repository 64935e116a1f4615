"""How full the packer's rows are, against best fit decreasing, which knows all lengths beforehand.

No sample is longer than Ovis allows in training; rows may be.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_modules.lanes import Ref
from data_modules.packing import Budget, fill_row
from experiments.throughput.bound import best_fill

LONGEST = 2048
"""Positions of Ovis' longest training sample (reference/ovis.md 2)."""
ROWS = (2048, 3072, 4096, 8192)
LOOK_AHEAD, FAR_AHEAD = 16, 256
"""Samples the packer sees: by default, and where fill is worth more of its time (`data.look_ahead`)."""
IMAGE_TOKENS = 577
"""Positions of one CLIP ViT-L/14-336 picture in Ovis 1.0 (reference/ovis.md)."""


def mixes(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Lengths of samples like those of the systems' data: captions, conversations and text only."""
    rng = np.random.default_rng(seed)
    caption = IMAGE_TOKENS + np.clip(rng.lognormal(3.2, 0.5, num), 5, 200).astype(int)
    talk = IMAGE_TOKENS + np.clip(rng.lognormal(5.2, 0.8, num), 20, 1400).astype(int)
    text = np.clip(rng.lognormal(5.5, 1.0, num), 10, 1900).astype(int)
    chance = rng.random(num)
    found = {
        "Ovis stage 2: captions and conversations": np.where(chance < 0.5, caption, talk),
        "Ovis stage 3: conversations and text": np.where(chance < 0.8, talk, text),
        "conversations with a picture": talk,
        "captions (near-constant lengths)": caption,
        "text only": text,
    }
    return {name: np.minimum(lengths, LONGEST) for name, lengths in found.items()}


def packed_fill(lengths: np.ndarray, budget: int, look_ahead: int) -> tuple[float, float]:
    """(share of positions used, microseconds a sample) of the stream's own packer."""
    rest: Iterator[int] = iter(lengths.tolist())
    waiting: list[Ref] = []
    used, rows, start = 0, 0, time.process_time()
    try:
        while True:
            row = fill_row(waiting, lambda: Ref(0, 0, 0, next(rest), 1), Budget(budget), look_ahead)
            used += sum(ref.tokens for ref in row)
            rows += 1
    except StopIteration:  # the row that found nothing more to look at is no row
        pass
    return used / rows / budget, (time.process_time() - start) / len(lengths) * 1e6


def best_fit_decreasing(lengths: np.ndarray, budget: int) -> float:
    """Share of positions used when the longest go first, each into the fullest row that still takes it."""
    room: list[int] = []  # what each row still takes, ascending
    for length in sorted(lengths.tolist(), reverse=True):
        place = bisect.bisect_left(room, length)
        left = budget - length if place == len(room) else room.pop(place) - length
        bisect.insort(room, left)
    return float(lengths.sum() / len(room) / budget)


def run(num: int = 50_000) -> list[dict[str, Any]]:
    """One line for each mix and row."""
    table = []
    for name, lengths in mixes(num).items():
        for budget in ROWS:
            fill, cost = packed_fill(lengths, budget, LOOK_AHEAD)
            offline = best_fit_decreasing(lengths, budget)
            line = {"mix": name, "budget": budget, "fill": fill, "offline": offline, "ratio": fill / offline}
            table.append({**line, "us": cost})
    return table


def bounds(num: int = 50_000, *, short_of: float = 0.985) -> list[dict[str, Any]]:
    """One line for each mix that fills its shortest rows less: what no packing of the same lengths could pass."""
    table = []
    for name, lengths in mixes(num).items():
        fills = {look_ahead: packed_fill(lengths, ROWS[0], look_ahead)[0] for look_ahead in (LOOK_AHEAD, FAR_AHEAD)}
        if fills[LOOK_AHEAD] < short_of:
            limit = best_fill(lengths, ROWS[0])
            of_limit = {look_ahead: fill / limit for look_ahead, fill in fills.items()}
            table.append({"mix": name, "budget": ROWS[0], "bound": limit, "fill": fills, "of bound": of_limit})
    return table
