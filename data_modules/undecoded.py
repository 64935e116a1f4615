"""The stream's samples without a processor's work: the same order, mix, skip list and damage, nothing decoded.

For previews, statistics, exports and the read benchmark. One sample of every lane a step; budgets do not apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

from bestiary.schema import Lengths, Processor, Sample, SampleError
from data_modules.lanes import Ref
from data_modules.rows import Drawn, LaneReader, Plan, read_lanes

_UNMEASURED = Lengths(1, 0, 1)
_NO_BUDGET = 1 << 62


class SampleReader:
    """Endless iterable of steps; a step is one `Sample` of every lane, in lane order.

    Iterating goes on where the last iteration stopped. `refs` and `states()` tell of the step handed out last.
    """

    def __init__(self, plan: Plan, states: Sequence[bytes]) -> None:
        self._plan = _undecoded(plan)
        self._readers = read_lanes(self._plan, states)
        self._drawn: list[Drawn] = []

    def __iter__(self) -> Iterator[tuple[Sample, ...]]:
        while any(reader.state.waiting for reader in self._readers):  # left by a run that packed
            self._drawn = step = [_draw(reader) for reader in self._readers]
            yield tuple([drawn[0] for drawn in step])
        draws = [reader.draw for reader in self._readers]
        while True:
            self._drawn = step = [draw() for draw in draws]
            yield tuple([drawn[0] for drawn in step])

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Where each sample of the last step is: source, number, epoch. Its lengths are not told."""
        return tuple([Ref(source, index, epoch, 0, 0) for _, source, index, epoch in self._drawn])

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lane of each sample of a step."""
        return tuple(reader.state.lane for reader in self._readers)

    @property
    def sources(self) -> tuple[str, ...]:
        """The mix's name for the source of each sample of the last step; a sample's own `source` is its data set."""
        return tuple(self._plan.names[ref.source] for ref in self.refs)

    def states(self) -> dict[int, bytes]:
        """Lane -> its state after the last step; only here is it turned into bytes."""
        return {reader.state.lane: reader.state_bytes() for reader in self._readers}


def _draw(reader: LaneReader) -> Drawn:
    """A lane's next row of one sample; one that waited where a run packed, and is damaged by now, is replaced."""
    while True:
        row = reader.plan_next()
        reader.settle(row)
        (ref,) = row.refs
        try:
            return reader.sample(ref.source, ref.index), ref.source, ref.index, ref.epoch
        except SampleError as error:
            reader.lose(row, ref, error)


def _undecoded(plan: Plan) -> Plan:
    """The same plan with rows of one sample and no budget; measured only where the mix counts tokens."""
    plain = copy(plan)
    plain.rules = replace(plan.rules, packing=False, max_tokens=_NO_BUDGET, max_views=0, augment=False)
    if plan.rules.unit == "samples":
        plain.lengths = _unmeasured
    elif plan.lengths is None:
        plain.lengths = partial(_made, plan.processor)
    return plain


def _unmeasured(_: Sample) -> Lengths:
    return _UNMEASURED


def _made(processor: Processor, sample: Sample) -> Lengths:
    example = processor(sample)
    return Lengths(len(example), example.num_views, example.num_targets)
