"""How full the packer's rows are, against packing the same lengths with everything known beforehand.

Beside it: best fit decreasing, which knows all lengths beforehand, and a fill no packing of them can pass.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_modules.lanes import Ref
from data_modules.packing import Budget, fill_row

IMAGE_TOKENS = 577
"""Positions of one CLIP ViT-L/14-336 picture in Ovis 1.0 (reference/ovis.md)."""


def mixes(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Lengths of samples like those of the systems' data: captions, conversations and text only."""
    rng = np.random.default_rng(seed)
    caption = IMAGE_TOKENS + np.clip(rng.lognormal(3.2, 0.5, num), 5, 200).astype(int)
    talk = IMAGE_TOKENS + np.clip(rng.lognormal(5.2, 0.8, num), 20, 1400).astype(int)
    text = np.clip(rng.lognormal(5.5, 1.0, num), 10, 1900).astype(int)
    chance = rng.random(num)
    return {
        "Ovis stage 2: captions and conversations": np.where(chance < 0.5, caption, talk),
        "Ovis stage 3: conversations and text": np.where(chance < 0.8, talk, text),
        "conversations with a picture": talk,
        "captions (near-constant lengths)": caption,
        "text only": text,
    }


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


def bound(lengths: np.ndarray, budget: int) -> float:
    """A share of positions used that no packing of these lengths can pass.

    The best of the dual feasible functions u(k) of Fekete and Schepers (Math. Program. 91, 2001): lengths rounded so
    that whatever fits one row still weighs at most one row; their sum is then a number of rows no packing undercuts.
    """
    shares = [lengths / budget]
    for k in range(1, 40):
        scaled = (k + 1) * lengths
        shares.append(np.where(scaled % budget == 0, lengths / budget, (scaled // budget) / k))
    return float(lengths.sum() / budget / max(share.sum() for share in shares))


def run(num: int = 50_000) -> list[dict[str, Any]]:
    """One line for each mix and budget."""
    table = []
    for name, lengths in mixes(num).items():
        for budget in (2048, 3072, 4096, 8192):
            cut = np.minimum(lengths, budget)
            fill, cost = packed_fill(cut, budget, look_ahead=16)
            offline = best_fit_decreasing(cut, budget)
            line = {"mix": name, "budget": budget, "fill": fill, "offline": offline, "ratio": fill / offline}
            table.append({**line, "bound": bound(cut, budget), "us": cost})
    return table
