"""Where Ovis' pictures come to lie: the resized size and its place, S2 views, and the grid of tiles of version 1.6.

Pure arithmetic on sizes in pixels; boxes are (left, top, right, bottom), the last two outside.
Sources: reference/ovis.md, sections 1.5 (resize and pad), 5 "1.5" (views) and 5 "1.6" (grid).
"""

from __future__ import annotations

from itertools import product

Box = tuple[int, int, int, int]

WHOLE = -1
"""The number of a tile among `grid_pieces`; marks count from 0."""
MARK_START, MARK_OVERVIEW_END, MARK_COLUMN, MARK_ROW, MARK_END = range(5)
"""The five marks of 1.6, in the order of the table's last rows (section 5 "1.6")."""
GRID_MARKS = MARK_END + 1
"""Of version 1.6, whose configurations have no use_indicators (section 5 "1.6")."""

COVERED = 0.9
"""A grid whose tiles keep more than this share of the picture's pixels is good enough (section 5 "1.6")."""
ADAPTIVE = 1.5
"""Times the side a picture needs both ways before its quarters are looked at (section 5 "1.5", adaptive)."""


def fit_inside(width: int, height: int, side: int) -> tuple[int, int]:
    """Size of the picture with its long side at `side`, the short one cut to whole pixels as published.

    ValueError for a picture so thin that nothing would be left of its short side.
    """
    # Divided first, then rounded down, as published: another order gives another pixel now and then.
    is_wide = width >= height
    size = (side, int(height / width * side)) if is_wide else (int(width / height * side), side)
    if 0 in size:
        raise ValueError(
            f"the picture of {width}x{height} pixels is too thin: at {side} pixels its short side would be none; "
            "cut it, or leave it out"
        )
    return size


def paste_at(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Left upper corner of a picture of this size in the middle of the square canvas."""
    return (side - size[0]) // 2, (side - size[1]) // 2


def quarters(width: int, height: int) -> tuple[Box, ...]:
    """The four quarters, rows first, split at half the size rounded down."""
    return tiles(width, height, (2, 2))


def has_quarters(width: int, height: int, side: int) -> bool:
    """Whether the adaptive views look at the quarters: a picture large enough both ways."""
    return min(width, height) >= ADAPTIVE * side


def tiles(width: int, height: int, grid: tuple[int, int]) -> tuple[Box, ...]:
    """The tiles of a grid (rows, columns), rows first; whole pixels, the last row and column take the rest."""
    rows, columns = grid
    tops, lefts = _cuts(height, rows), _cuts(width, columns)
    return tuple((lefts[c], tops[r], lefts[c + 1], tops[r + 1]) for r, c in product(range(rows), range(columns)))


def best_grid(width: int, height: int, side: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns for a picture: the fewest tiles that keep enough of it, else those that keep most.

    max_tiles: tiles beside the whole picture, 9 in the published models.
    """
    if max_tiles < 1:
        raise ValueError(f"max_partition={max_tiles}: a picture has at least one tile")
    every = range(1, max_tiles + 1)
    grids = [(r, c) for r, c in product(every, every) if r * c <= max_tiles]
    shares = {grid: _covered_share(width, height, side, grid) for grid in grids}
    good = [grid for grid in grids if shares[grid] > COVERED]
    if good:
        return min(good, key=lambda grid: (grid[0] * grid[1], -shares[grid]))
    return min(grids, key=lambda grid: (-shares[grid], grid[0] * grid[1]))


def crops(width: int, height: int, grid: tuple[int, int]) -> tuple[Box, ...]:
    """The whole picture, and the tiles after it where there is more than one."""
    whole = (0, 0, width, height)
    return (whole,) if grid == (1, 1) else (whole, *tiles(width, height, grid))


def grid_pieces(grid: tuple[int, int]) -> tuple[int, ...]:
    """What stands for a picture of 1.6 in the row: marks by number, `WHOLE` for the rows of the next crop."""
    pieces = [MARK_START, WHOLE, MARK_OVERVIEW_END]
    rows, columns = grid
    if rows * columns > 1:
        for row, column in product(range(rows), range(columns)):
            pieces.append(WHOLE)
            if column < columns - 1:
                pieces.append(MARK_COLUMN)
            elif row < rows - 1:
                pieces.append(MARK_ROW)
    return (*pieces, MARK_END)


def plain_pieces(num_marks: int) -> tuple[int, ...]:
    """What stands for a picture of 1.0 and 1.5: its rows, between a begin and an end where the model has those."""
    return (0, WHOLE, 1) if num_marks else (WHOLE,)


def _cuts(length: int, parts: int) -> list[int]:
    return [part * (length // parts) for part in range(parts)] + [length]


def _covered_share(width: int, height: int, side: int, grid: tuple[int, int]) -> float:
    """Share of the picture's pixels left after every tile was shrunk to the side."""
    covered = 0.0
    for left, top, right, bottom in tiles(width, height, grid):
        long, short = max(right - left, bottom - top), min(right - left, bottom - top)
        covered += long * short if long <= side else side * (short / long * side)
    return covered / (width * height)
