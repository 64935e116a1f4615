"""Filling a row from a look-ahead of samples that are still undecoded.

The oldest waiting sample always goes first, so nothing waits forever. As long as everything that waits would fit, the
row takes samples in their order; the last step picks the subset of the look-ahead that fills the row best (an exact
subset sum on the bits of one integer, microseconds). Samples of one row never attend to one another, so which of them
share a row changes nothing but the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from data_modules.lanes import Ref


@dataclass(frozen=True, slots=True)
class Budget:
    """What a row may hold. tokens: positions. views: encoder views, 0 = no second budget."""

    tokens: int
    views: int = 0

    def holds(self, tokens: int, views: int) -> bool:
        """Whether a row of this budget may carry so much."""
        return tokens <= self.tokens and (not self.views or views <= self.views)


def fill_row(waiting: list[Ref], draw: Callable[[], Ref], budget: Budget, look_ahead: int) -> list[Ref]:
    """Take the samples of one row out of `waiting` (oldest first), drawing new ones while there is room to look.

    Every drawn sample must fit an empty row.
    """
    tokens = views = 0
    row: list[Ref] = []
    while True:
        while len(waiting) < look_ahead:
            waiting.append(draw())
        rest_tokens = sum(ref.tokens for ref in waiting)
        rest_views = sum(ref.views for ref in waiting)
        if row and not budget.holds(tokens + rest_tokens, views + rest_views):
            break
        oldest = waiting.pop(0)
        row.append(oldest)
        tokens, views = tokens + oldest.tokens, views + oldest.views
    chosen = best_subset(waiting, budget.tokens - tokens, budget.views - views if budget.views else None)
    row += [waiting[number] for number in chosen]
    for number in reversed(chosen):
        del waiting[number]
    return row


def best_subset(refs: list[Ref], tokens: int, views: int | None) -> list[int]:
    """Numbers of the refs that together come closest to `tokens` without passing it or `views` (None: unbounded).

    Of equally full subsets the one with fewer views, then the one made of older samples.
    Bit v * stride + t of `reach` says that some subset has t tokens and v views.
    """
    unit = gcd(*(ref.views for ref in refs)) or 1  # views come in equal lots: count lots
    stride = 2 * (tokens + 1)
    slots = 1 if views is None else views // unit + 1
    one_slot = (1 << (tokens + 1)) - 1
    allowed = sum(one_slot << (stride * slot) for slot in range(slots))
    reach = [1]
    shifts = []
    for ref in refs:
        fits = ref.tokens <= tokens and (views is None or ref.views <= views)
        shift = ref.tokens + (0 if views is None else ref.views // unit * stride)
        shifts.append(shift)
        reach.append(reach[-1] | (reach[-1] << shift & allowed) if fits else reach[-1])
        if views is None and reach[-1] >> tokens:
            break  # full to the last position, and younger samples would not be taken for older ones
    in_slots = [reach[-1] >> (stride * slot) & one_slot for slot in range(slots)]
    most = max(bits.bit_length() for bits in in_slots) - 1
    target = next(slot for slot, bits in enumerate(in_slots) if bits.bit_length() - 1 == most) * stride + most
    chosen = []
    for number in reversed(range(len(shifts))):
        if not reach[number] >> target & 1:
            chosen.append(number)
            target -= shifts[number]
    return chosen[::-1]
