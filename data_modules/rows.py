"""The rows of a lane: draw, measure, pack.

Row t of lane c is a pure function of the plan and (c, t). Nothing here knows of ranks, workers, torch or time. A row is
planned first (which samples it holds) and made afterwards (`decoding.py`), perhaps by threads while later rows are
being planned: planning never looks at what making found out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from bestiary.schema import Example, Lengths, Processor, Sample, SampleError, SampleTooLongError
from data_modules.grouped_order import GroupedOrder
from data_modules.lanes import Deal, LaneState, Place, Ref, hash_ints, hash_name
from data_modules.ledger import Ledger, Loss
from data_modules.mixture import Mixture
from data_modules.packing import fill_row
from data_modules.records import Reason
from data_modules.rules import Rules
from data_modules.shards import ShardSet
from data_modules.shares import Shares
from data_modules.sources import SourceSpec, StreamError
from data_modules.turns import Turns

FRUITLESS_DRAWS = 10_000
"""After so many samples of one source in a row that are all left out, something is wrong with the run."""
FRUITLESS_PASSES = 32
"""The same for a small source: a lane meets its samples by chance, the only good one of K within so many times K."""


class Plan:
    """Everything the lanes share, read-only: sources, whose turn it is, the mixture, the processor.

    skipped: name of a source -> numbers of its samples that are never drawn. order: in place of shares.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        sources: Sequence[ShardSet],
        shares: Shares,
        processor: Processor,
        rules: Rules,
        skipped: Mapping[str, frozenset[int]] | None = None,
        order: GroupedOrder | None = None,
    ) -> None:
        self.order = order
        self.specs = tuple(specs)
        self.names = tuple(spec.name for spec in specs)
        self.sources = tuple(sources)
        self.processor = processor
        self.rules = rules
        self.skipped = tuple((skipped or {}).get(name, frozenset()) for name in self.names)
        self.mixture = Mixture(shares, rules.num_lanes)
        self.deals = tuple(
            Deal(
                spec.name,
                [shard.samples for shard in source.shards],
                chunk=spec.chunk or rules.chunk,
                seed=rules.seed,
                num_lanes=rules.num_lanes,
            )
            for spec, source in zip(specs, sources, strict=True)
        )
        self.lengths: Callable[[Sample], Lengths] | None = getattr(processor, "lengths", None)
        if order is not None:  # what breaks only while the example is made must be replaced as well
            self.lengths = None
        self.reported: set[tuple[int, int]] = set()
        self._hashes = tuple(map(hash_name, self.names))

    def first_state(self, lane: int) -> LaneState:
        """A lane before its first row."""
        return LaneState(lane, [Place() for _ in self.names])

    def rng(self, ref: Ref) -> np.random.Generator | None:
        """Randomness of one sample in one epoch, whoever draws it; None without augmentation."""
        if not self.rules.augment:
            return None
        words = (self.rules.seed, self._hashes[ref.source], ref.index, ref.epoch)
        return np.random.Generator(np.random.Philox(key=[hash_ints(0, *words), hash_ints(1, *words)]))


Drawn = tuple[Sample, int, int, int]
"""(sample, its source, its number, epoch)."""


@dataclass(slots=True)
class PlannedRow:
    """What a row will hold, left to right, and what planning it left out.

    state: the lane's state after the row, losses still to be counted. failure: why the run ends at this row.
    """

    refs: list[Ref]
    state: LaneState
    losses: list[Loss] = field(default_factory=list)
    failure: StreamError | None = None


class LaneReader:
    """One lane, row by row, from a state on. shared: what it looks up together with other lanes, see `read_lanes`."""

    def __init__(self, plan: Plan, state: LaneState, shared: Sequence[Turns] | None = None) -> None:
        if not 0 <= state.lane < plan.rules.num_lanes or len(state.places) != len(plan.names):
            raise StreamError(
                f"state of lane {state.lane} with {len(state.places)} sources does not belong to a stream of "
                f"{plan.rules.num_lanes} lanes and {len(plan.names)} sources"
            )
        self.plan = plan
        self.state = state
        self.ledger = Ledger(plan.names, plan.sources, plan.rules, state.lane, state.losses, plan.reported)
        self._cursor = plan.mixture.lane(state.lane, state.mix)
        turns = shared or [Turns(deal, [state.lane]) for deal in plan.deals]
        self._supplies = [
            (place, skipped, coming.of(state.lane, place.j, place.offset), shards.view)
            for place, skipped, coming, shards in zip(state.places, plan.skipped, turns, plan.sources, strict=True)
        ]
        self._is_alone = len(self._supplies) == 1
        self._counts_tokens = plan.rules.unit != "samples"
        self._examples: dict[tuple[int, int, int], Example] = {}
        self._last_source = self._last_index = -1
        self._last_sample: Sample
        self._max_tokens, self._max_views = plan.rules.max_tokens, plan.rules.max_views or sys.maxsize
        self._lengths = plan.lengths
        self._losses: list[Loss] = []

    def plan_row(self) -> list[Ref]:
        """What the next row will hold, without making it."""
        row = self.plan_next()
        self.settle(row)
        return row.refs

    def plan_next(self) -> PlannedRow:
        """Plan the next row; nothing is counted and nothing of it is made."""
        rules, state = self.plan.rules, self.state
        refs: list[Ref] = []
        failure = None
        try:
            if rules.packing:
                refs = fill_row(state.waiting, self._draw, rules.budget, rules.look_ahead)
            else:  # something waits only where a run that packed goes on without
                refs = [state.waiting.pop(0) if state.waiting else self._draw()]
        except StreamError as error:
            failure = error
        except _OverBudgetError:
            failure = StreamError(f"lane {state.lane}: the budget of damage is spent")
        state.rows += 1
        state.mix = self._cursor.state()
        losses, self._losses = self._losses, []
        return PlannedRow(refs, state, losses, failure)

    def draw(self) -> Drawn:
        """The next row where rows are one sample of any length, as it was read.

        It is settled at once; `state.mix` stays behind until `state_bytes`. Nothing may wait in the packer. Lengths are
        asked for only where the mix counts them. Reading a sample is little more than this, so it is written flat.
        """
        if self.plan.order is not None:
            return self._draw_settled(self.plan.order)
        state = self.state
        source = 0 if self._is_alone else self._cursor.choose(state.rows)
        place, skipped, coming, read = self._supplies[source]
        tokens = targets = 1
        fruitless = 0
        for epoch, index, place.j, place.offset in coming:  # endless
            try:
                if index not in skipped:
                    sample = read(index)
                    if self._counts_tokens:
                        tokens, _, targets = self._measure(sample, source, index, epoch)
                    break
                error = None
            except SampleError as damage:
                error = damage
            fruitless += 1
            try:
                self._leave_out(source, index, fruitless, error)
            except (StreamError, _OverBudgetError) as end:
                self._count_found()
                raise StreamError(str(end)) from end
        if fruitless:
            self._count_found()
        place.taken += 1
        if not self._is_alone:
            self._cursor.count(source, tokens, targets)
        state.rows += 1
        return sample, source, index, epoch

    def _draw_settled(self, order: GroupedOrder) -> Drawn:
        """`draw` in the grouped order."""
        try:
            ref = self._draw_in_groups(order)
        except (StreamError, _OverBudgetError) as end:
            self._count_found()
            raise StreamError(str(end)) from end
        self._count_found()
        self.state.rows += 1
        return self._last_sample, ref.source, ref.index, ref.epoch

    def state_bytes(self) -> bytes:
        """The state after the rows so far, all of them settled."""
        self.state.mix = self._cursor.state()
        return self.state.to_bytes()

    def settle(self, row: PlannedRow) -> None:
        """Count what planning left out; StreamError where the run must end. Rows are settled in their order."""
        for loss in row.losses:
            self.ledger.count(loss, foreseen=True)
        if row.failure is not None:
            raise row.failure

    def lose(self, row: PlannedRow, ref: Ref, error: SampleError) -> None:
        """Count a sample of a planned row that turned out damaged; StreamError where the run must end."""
        place = row.state.places[ref.source]
        loss = Loss(ref.source, ref.index, Reason.DECODE, place.taken + place.left_out, error)
        self.ledger.count(loss, foreseen=False)

    def part(self, ref: Ref) -> Example | Sample | SampleError:
        """What a planned sample is made from; the example itself where measuring already made it."""
        example = self._examples.pop((ref.source, ref.index, ref.epoch), None)
        if example is not None:
            return example
        try:
            return self.sample(ref.source, ref.index)
        except SampleError as error:
            return error

    def _count_found(self) -> None:
        losses, self._losses = self._losses, []
        for loss in losses:
            self.ledger.count(loss, foreseen=True)

    def measured(self, ref: Ref) -> Ref | Loss:
        """A waiting sample with the lengths it has now, or why it must go."""
        place = self.state.places[ref.source]
        try:
            sample = self.sample(ref.source, ref.index)
            lengths = self._measure(sample, ref.source, ref.index, ref.epoch)
            if lengths.tokens > self._max_tokens or lengths.views > self._max_views:
                lengths = self._shortened(ref.source, ref.index, *lengths)
        except SampleError as error:
            reason = getattr(error, "reason", Reason.PROCESSOR)
            return Loss(ref.source, ref.index, reason, place.taken + place.left_out, error)
        return ref._replace(tokens=lengths.tokens, views=lengths.views)

    def sample(self, source: int, index: int) -> Sample:
        """One sample; the last one read is kept."""
        if index == self._last_index and source == self._last_source:
            return self._last_sample
        sample = self.plan.sources[source].view(index)
        self._last_index, self._last_source, self._last_sample = index, source, sample
        return sample

    def _draw(self) -> Ref:
        """The next readable sample that fits a row, of the source whose turn it is."""
        if self.plan.order is not None:
            return self._draw_in_groups(self.plan.order)
        source = self._cursor.choose(self.state.rows)
        place, skipped, coming, read = self._supplies[source]
        fruitless = 0
        while True:
            epoch, index, place.j, place.offset = next(coming)
            error = None
            try:
                if index not in skipped:
                    self._last_sample = sample = read(index)
                    self._last_index, self._last_source = index, source
                    tokens, views, targets = self._measure(sample, source, index, epoch)
                    if tokens > self._max_tokens or views > self._max_views:
                        tokens, views, targets = self._shortened(source, index, tokens, views, targets)
                    break
            except SampleError as damage:
                self._examples.pop((source, index, epoch), None)
                error = damage
            fruitless += 1
            self._leave_out(source, index, fruitless, error)
        place.taken += 1
        self._cursor.count(source, tokens, targets)
        return Ref(source, index, epoch, tokens, views)

    def _draw_in_groups(self, order: GroupedOrder) -> Ref:
        """The sample of this row; where it cannot be used, the one before it in its group."""
        epoch, place = order.place(self.state.lane, self.state.rows)
        for fruitless in count(1):
            source, index = order.sample(place)
            error = None
            try:
                if index not in self.plan.skipped[source]:
                    lengths = self._measure(self.sample(source, index), source, index, epoch)
                    if lengths.tokens > self._max_tokens or lengths.views > self._max_views:
                        lengths = self._shortened(source, index, *lengths)
                    break
            except SampleError as damage:
                self._examples.pop((source, index, epoch), None)
                error = damage
            self._leave_out(source, index, fruitless, error)
            place = order.before(place)
        self.state.places[source].taken += 1
        return Ref(source, index, epoch, lengths.tokens, lengths.views)

    def _measure(self, sample: Sample, source: int, index: int, epoch: int) -> Lengths:
        return self._lengths(sample) if self._lengths else self._make(sample, source, index, epoch)

    def _make(self, sample: Sample, source: int, index: int, epoch: int) -> Lengths:
        """Lengths by a processor that cannot tell them ahead: the example is made now, and waits."""
        example = self.plan.processor(sample, rng=self.plan.rng(Ref(source, index, epoch, 0, 0)))
        self._examples[source, index, epoch] = example
        return Lengths(len(example), example.num_views, example.num_targets)

    def _shortened(self, source: int, index: int, tokens: int, views: int, targets: int) -> Lengths:
        """The lengths under the policy `truncate_text`; SampleTooLongError where a row cannot hold even that."""
        rules = self.plan.rules
        if rules.too_long == "truncate_text" and views <= self._max_views:
            return Lengths(rules.max_tokens, views, max(0, targets - (tokens - rules.max_tokens)))  # answers come last
        problem = (
            f"it needs {tokens} tokens and {views} views, the limits are max_tokens={rules.max_tokens}, "
            f"max_views={rules.max_views}; raise them, or set data.too_long to skip or truncate_text"
        )
        raise SampleTooLongError(self.plan.sources[source].key(index), problem, tokens, rules.max_tokens)

    def _leave_out(self, source: int, index: int, fruitless: int, error: SampleError | None) -> None:
        """Note a loss; it is counted when its row comes out, but planning ends where that is sure to stop the run.

        fruitless: samples left out one after another, this one with them. error: None = it is on the skip list.
        """
        place = self.state.places[source]
        reason = Reason.SKIPPED if error is None else getattr(error, "reason", Reason.PROCESSOR)
        loss = Loss(source, index, reason, place.taken + place.left_out, error)
        self._losses.append(loss)
        if not self.ledger.foresee(loss):
            raise _OverBudgetError
        place.left_out += 1
        if fruitless >= min(FRUITLESS_DRAWS, FRUITLESS_PASSES * len(self.plan.sources[source])):
            raise self._fruitless(source, fruitless)

    def _fruitless(self, source: int, draws: int) -> StreamError:
        rules = self.plan.rules
        return StreamError(
            f"source {self.plan.names[source]!r}: {draws} samples one after another were damaged, too long "
            f"(max_tokens={rules.max_tokens}, max_views={rules.max_views}) or on the skip list; "
            "nothing of it can be used"
        )


def read_lanes(plan: Plan, states: Iterable[bytes]) -> list[LaneReader]:
    """Readers of some lanes that look up their coming samples together."""
    lanes = [LaneState.from_bytes(state) for state in states]
    shared = [Turns(deal, [state.lane for state in lanes]) for deal in plan.deals]
    return [LaneReader(plan, state, shared) for state in lanes]


class _OverBudgetError(Exception):
    """Planning cannot go on: counting its last loss will raise the error that says why."""
