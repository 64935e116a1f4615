"""The packer: budgets are kept, the oldest goes first, rows are nearly full."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.lanes import Ref
from data_modules.packing import Budget, best_subset, fill_row


def endless(lengths: Callable[[random.Random], tuple[int, int]]) -> Callable[[], Ref]:
    generator, counter = random.Random(1), itertools.count()
    return lambda: Ref(0, next(counter), 0, *lengths(generator))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=8),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(0, 6)),
)
def test_the_best_subset_is_the_best(sizes: list[tuple[int, int]], tokens: int, views: int | None) -> None:
    refs = [Ref(0, number, 0, *size) for number, size in enumerate(sizes)]
    chosen = best_subset(refs, tokens, views)
    total = sum(refs[number].tokens for number in chosen)
    assert chosen == sorted(set(chosen))
    assert total <= tokens
    assert views is None or sum(refs[number].views for number in chosen) <= views
    fitting = (
        sum(ref.tokens for ref in some)
        for count in range(len(refs) + 1)
        for some in itertools.combinations(refs, count)
        if views is None or sum(ref.views for ref in some) <= views
    )
    assert total == max(filled for filled in fitting if filled <= tokens)


def test_of_equal_subsets_the_older_samples_go() -> None:
    refs = [Ref(0, number, 0, 5, 0) for number in range(6)]
    assert best_subset(refs, 17, None) == best_subset(refs, 15, None) == [0, 1, 2]


def test_rows_keep_both_budgets_start_with_the_oldest_and_lose_nothing() -> None:
    budget, waiting, seen = Budget(100, 12), [], []
    draw = endless(lambda r: (r.randint(1, 60), r.randint(0, 5)))
    for _ in range(200):
        oldest = waiting[0].index if waiting else 0
        row = fill_row(waiting, draw, budget, 16)
        assert row[0].index == oldest
        assert budget.holds(sum(ref.tokens for ref in row), sum(ref.views for ref in row))
        seen += row
    everything = sorted(ref.index for ref in [*seen, *waiting])
    assert everything == list(range(len(everything)))


def test_rows_are_nearly_full() -> None:
    budget, waiting = Budget(8192), []
    draw = endless(lambda r: (min(8192, int(r.lognormvariate(6.5, 0.8))), 0))
    rows = [fill_row(waiting, draw, budget, 16) for _ in range(60)]
    assert sum(ref.tokens for row in rows for ref in row) / (8192 * len(rows)) > 0.995


def test_without_look_ahead_samples_keep_their_order() -> None:
    waiting: list[Ref] = []
    draw = endless(lambda r: (r.randint(1, 60), 0))
    order = [ref.index for _ in range(50) for ref in fill_row(waiting, draw, Budget(100), 1)]
    assert order == list(range(len(order)))
