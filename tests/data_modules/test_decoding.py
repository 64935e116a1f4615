"""Threads that decode change nothing: rows, states, holes and errors are those of one thread."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestiary.schema import Example, Sample
from data_modules.decoding import Row, rows_of
from data_modules.lanes import LaneState
from data_modules.rows import LaneReader
from data_modules.sources import StreamError
from data_modules.stream import Stream
from tests.data_modules.making import CharProcessor, WholeProcessor, source, stream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def told(rows: list[Row]) -> list[Any]:
    """Rows in comparable form."""
    return [
        ([(e.key, e.source, e.ids.tobytes(), e.pixels.tobytes(), e.loss_weight) for e in examples], state)
        for examples, state in rows
    ]


def some_rows(made: Stream, steps: int, threads: int, lanes: range = range(3)) -> tuple[list[Any], str]:
    """Rows of some lanes, and the error that ended them."""
    readers = [LaneReader(made.plan, LaneState.from_bytes(made.first_states()[lane])) for lane in lanes]
    found = []
    try:
        for rows in itertools.islice(rows_of(readers, threads), steps):
            found.append(told(rows))
    except StreamError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("processor", [CharProcessor(), WholeProcessor()], ids=["lengths", "whole"])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_states_and_holes_do_not_depend_on_threads(mix: Any, packing: bool, processor: Any) -> None:
    made = stream(mix, packing=packing, processor=processor)
    steps = 12 if packing else 30
    expected = some_rows(made, steps, 1)
    assert expected[1] == ""
    for threads in (2, 5):
        assert some_rows(made, steps, threads) == expected
    assert any(LaneState.from_bytes(state).losses for _, state in expected[0][-1])  # the damaged source was met


@pytest.mark.parametrize("processor", [CharProcessor(), WholeProcessor()], ids=["lengths", "whole"])
@pytest.mark.parametrize("packing", [True, False])
def test_an_overdrawn_budget_ends_every_number_of_threads_at_the_same_row(
    mix: Any, packing: bool, processor: Any
) -> None:
    made = stream(mix, packing=packing, processor=processor, bad_budget=0.002)
    expected = some_rows(made, 200, 1)
    assert len(expected[0]) > 3
    assert "3 damaged samples" in expected[1]
    for threads in (2, 5):
        assert some_rows(made, 200, threads) == expected


def test_a_spent_source_ends_every_number_of_threads_at_the_same_row(tmp_path: Path, mix: Any) -> None:
    source(tmp_path, "ruin", 20, bad=range(20))
    ruined = {**mix, "ruin": {"path": tmp_path, "weight": 0.5}}
    made = stream(ruined, processor=WholeProcessor(), bad_budget=1.0, packing=False)
    expected = some_rows(made, 50, 1)
    assert expected[0]
    assert "640 samples one after another" in expected[1]
    assert some_rows(made, 50, 3) == expected


class Meeting(CharProcessor):
    """Makes no example before another thread is at it too."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)

    def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
        self.barrier.wait()
        return super().__call__(sample, rng=rng)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_threads_make_examples_at_the_same_time(mix: Any) -> None:
    found, error = some_rows(stream({"big": mix["big"]}, processor=Meeting(), packing=False), 4, 2)
    assert len(found) == 4
    assert error == ""


def test_workers_beyond_the_lanes_become_threads_of_one_process(mix: Any) -> None:
    made = stream(mix)
    expected = [step[0] for step in itertools.islice(made.loader(range(4, 5)), 6)]
    loader = made.loader(range(4, 5), num_workers=4)
    assert loader.num_processes == 1
    assert made.loader(range(3), num_workers=2).num_processes == 2
    for batch, (other,) in zip(expected, itertools.islice(loader, 6), strict=True):
        assert batch.states == other.states
        assert batch.ids.tolist() == other.ids.tolist()
        assert batch.segments == other.segments
