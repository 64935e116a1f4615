"""A fill that no packing of given lengths can pass, by the linear program of cutting stock.

A pattern is a set of lengths that fits one row. Covering all samples with fractions of patterns takes at most as many
rows as any packing. Patterns are made on demand: the dual prices of the patterns known so far say what each length is
worth, a knapsack finds the row worth most, and while that is more than one row the prices divided by its worth still
bound the number of rows from below (Gilmore and Gomory, Operations Research 9, 1961; Farley, Operations Research 38,
1990). So the bound holds wherever the search stops.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_matrix

UNIT = 4
"""Lengths are rounded down to multiples of it: a little less to pack, far fewer different lengths."""
_EPSILON = 1e-9
Pattern = dict[int, int]
"""Number of a size -> how many of it share the row."""


def best_fill(lengths: np.ndarray, budget: int, *, unit: int = UNIT, rounds: int = 200) -> float:
    """Share of a row's positions that no packing of these lengths into rows of `budget` positions can pass."""
    rounded = lengths // unit
    sizes, wanted = np.unique(rounded[rounded > 0], return_counts=True)
    room = budget // unit
    patterns: list[Pattern] = [{number: room // int(size)} for number, size in enumerate(sizes)]
    rows = 0.0
    for _ in range(rounds):
        prices = _prices(patterns, wanted)
        worth, picked = _knapsack(sizes, prices, room)
        rows = max(rows, float(prices @ wanted) / max(1.0, worth[room]))
        new = _patterns(sizes, prices, worth, picked)
        if not new:
            break
        patterns += new
    return float(lengths.sum() / budget / rows)


def _prices(patterns: list[Pattern], wanted: np.ndarray) -> np.ndarray:
    """What one sample of each size is worth, in rows, where only these patterns exist."""
    entries = [(size, column, count) for column, pattern in enumerate(patterns) for size, count in pattern.items()]
    at, columns, counts = zip(*entries, strict=True)
    matrix = csc_matrix((counts, (at, columns)), shape=(len(wanted), len(patterns)))
    solved = linprog(np.ones(len(patterns)), A_ub=-matrix, b_ub=-wanted, method="highs")
    return np.maximum(-solved.ineqlin.marginals, 0)


def _knapsack(sizes: np.ndarray, prices: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(the most that 0 ... room positions can be worth, the size taken last for it or -1)."""
    worth, picked = np.zeros(room + 1), np.full(room + 1, -1)
    for positions in range(1, room + 1):
        worth[positions] = worth[positions - 1]
        fitting = np.searchsorted(sizes, positions, side="right")
        if fitting:
            reached = worth[positions - sizes[:fitting]] + prices[:fitting]
            best = int(reached.argmax())
            if reached[best] > worth[positions] + _EPSILON:
                worth[positions], picked[positions] = reached[best], best
    return worth, picked


def _patterns(sizes: np.ndarray, prices: np.ndarray, worth: np.ndarray, picked: np.ndarray) -> list[Pattern]:
    """For each size the best row that holds it, where that is worth more than one row."""
    room = len(worth) - 1
    found = []
    for number, size in enumerate(sizes.tolist()):
        left = room - size
        if prices[number] + worth[left] <= 1 + 1e-6:
            continue
        pattern = {number: 1}
        while left > 0:
            best = int(picked[left])
            if best < 0:
                left -= 1
            else:
                pattern[best] = pattern.get(best, 0) + 1
                left -= int(sizes[best])
        found.append(pattern)
    return found
