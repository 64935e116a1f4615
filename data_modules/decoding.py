"""Making planned rows into examples, in this thread or in several.

Threads make examples only; drawing, packing and reading shards stay in one thread, which runs a bounded number of rows
ahead. Rows come out in their order with the states they would have without threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from bestiary.schema import Example, Sample, SampleError, SampleTooLongError, Slot
from data_modules.lanes import LaneState, Place, Ref
from data_modules.rows import LaneReader, Plan, PlannedRow

Row = tuple[list[Example], bytes]
"""The examples of a row, left to right, and the state after it."""
Outcome = Example | SampleError

ROWS_AHEAD = 2
"""Rows that are planned ahead for every thread."""


def rows_of(readers: Sequence[LaneReader], threads: int = 1) -> Iterator[list[Row]]:
    """The rows of some lanes, step by step, for ever. threads: that call the processor; 1 = this one alone.

    A sample found damaged only now leaves a hole: it is counted and nothing takes its place. `source` of an example is
    the name the mix gives it. StreamError ends the iteration at the same row whatever the number of threads.
    """
    if threads < 2:
        while True:
            yield [_next_row(reader) for reader in readers]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        rows = _threaded(readers, pool.submit, ROWS_AHEAD * threads)
        while True:
            yield [next(rows) for _ in readers]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _next_row(reader: LaneReader) -> Row:
    row = reader.plan_next()
    reader.settle(row)
    return _finish(reader, row, [make(reader.plan, ref, reader.part(ref)) for ref in row.refs])


def _threaded(readers: Sequence[LaneReader], submit: Callable[..., Future[Outcome]], ahead: int) -> Iterator[Row]:
    """Row by row, lane after lane, with `ahead` more rows under way."""
    waiting: deque[tuple[LaneReader, PlannedRow, list[Future[Outcome]]]] = deque()
    number = 0
    while True:
        while len(waiting) <= ahead and not (waiting and waiting[-1][1].failure):
            reader = readers[number % len(readers)]
            row = reader.plan_next()
            row.state = _frozen(row.state)
            waiting.append((reader, row, [submit(make, reader.plan, ref, reader.part(ref)) for ref in row.refs]))
            number += 1
        reader, row, futures = waiting.popleft()
        reader.settle(row)
        yield _finish(reader, row, [future.result() for future in futures])


def _finish(reader: LaneReader, row: PlannedRow, outcomes: Sequence[Outcome]) -> Row:
    """The row with its holes counted."""
    examples = []
    for ref, outcome in zip(row.refs, outcomes, strict=True):
        if isinstance(outcome, SampleError):
            reader.lose(row, ref, outcome)
        else:
            examples.append(outcome)
    return examples, row.state.to_bytes()


def _frozen(state: LaneState) -> LaneState:
    """The state as it is now; only its losses, which are counted later and in order, stay the lane's own."""
    places = [Place(place.j, place.offset, place.taken, place.left_out) for place in state.places]
    return LaneState(state.lane, places, state.rows, list(state.waiting), state.losses, state.mix)


def make(plan: Plan, ref: Ref, part: Example | Sample | SampleError) -> Outcome:
    """The example of a planned sample, or what is wrong with it. Safe in any thread if the processor is."""
    rules = plan.rules
    if isinstance(part, SampleError):
        return part
    try:
        example = plan.processor(part, rng=plan.rng(ref)) if isinstance(part, Sample) else part
        if rules.too_long == "truncate_text" and len(example.ids) > ref.tokens == rules.max_tokens:
            example = cut_text(example, ref.tokens)
    except SampleError as error:
        return error
    if (len(example.ids), example.num_views) != (ref.tokens, ref.views):
        raise RuntimeError(
            f"sample {example.key}: the processor announced {ref.tokens} tokens and {ref.views} views "
            f"but made {len(example)} and {example.num_views}; its lengths() and its call disagree"
        )
    return _named(example, plan.names[ref.source], plan.specs[ref.source].loss_weight)


def _named(example: Example, source: str, loss_weight: float) -> Example:
    """The example under its name in the mix."""
    if example.source == source and example.loss_weight == loss_weight:
        return example
    return Example(  # a third of the time of dataclasses.replace
        example.ids,
        example.labels,
        example.slots,
        example.pixels,
        example.regions,
        example.num_views,
        example.key,
        source,
        example.domain,
        loss_weight,
    )


def cut_text(example: Example, tokens: int) -> Example:
    """The first `tokens` positions; SampleTooLongError where that would cut through an image or a prompt."""
    if (example.slots[tokens:] != Slot.TEXT).any():
        problem = f"its image and prompts alone pass max_tokens={tokens}; raise max_tokens or set data.too_long=skip"
        raise SampleTooLongError(example.key, problem, len(example), tokens)
    return replace(example, ids=example.ids[:tokens], labels=example.labels[:tokens], slots=example.slots[:tokens])
