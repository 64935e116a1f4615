"""The rows of a lane: draw, measure, pack, decode.

Row t of lane c is a pure function of the plan and (c, t). Nothing here knows of ranks, workers, torch or time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bestiary.schema import Example, Processor, Sample, SampleError, SampleTooLongError, Slot
from data_modules.lanes import Deal, LaneState, Place, Ref, hash_ints, hash_name
from data_modules.mixture import Mixture
from data_modules.packing import Budget, fill_row
from data_modules.records import Reason
from data_modules.shards import ShardSet
from data_modules.sources import StreamError

log = logging.getLogger(__name__)

BUDGET_WINDOW = 1000
"""The share of damaged samples is taken of at least so many: three samples are no statistic."""
FRUITLESS_DRAWS = 10_000
"""After so many samples of one source in a row that are all too long, the budget is wrong."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers that shape rows; the names are those of the configuration's `data`."""

    seed: int
    num_lanes: int
    max_tokens: int
    max_views: int = 0
    packing: bool = True
    look_ahead: int = 16
    chunk: int = 1
    too_long: str = "error"
    bad_budget: float = 0.01
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("num_lanes", "max_tokens", "look_ahead", "chunk"):
            if getattr(self, name) < 1:
                raise StreamError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.seed < 0 or self.max_views < 0:
            raise StreamError(f"seed={self.seed} and max_views={self.max_views} must not be negative")
        if self.too_long not in ("error", "skip", "truncate_text"):
            raise StreamError(f"too_long={self.too_long!r}; choose error, skip or truncate_text")
        if not 0 <= self.bad_budget <= 1:
            raise StreamError(f"bad_budget={self.bad_budget}; it is a share, from 0 to 1")

    @property
    def budget(self) -> Budget:
        """What a row may hold."""
        return Budget(self.max_tokens, self.max_views)


class Plan:
    """Everything the lanes share, read-only: sources, whose turn it is, the mixture, the processor."""

    def __init__(self, sources: Sequence[tuple[str, ShardSet, float]], processor: Processor, rules: Rules) -> None:
        self.names = tuple(name for name, _, _ in sources)
        self.sources = tuple(shards for _, shards, _ in sources)
        self.processor = processor
        self.rules = rules
        self.mixture = Mixture({name: weight for name, _, weight in sources}, rules.num_lanes)
        self.deals = tuple(
            Deal(
                name, [s.samples for s in shards.shards], chunk=rules.chunk, seed=rules.seed, num_lanes=rules.num_lanes
            )
            for name, shards, _ in sources
        )
        self.lengths: Callable[[Sample], tuple[int, int]] | None = getattr(processor, "lengths", None)

    def first_state(self, lane: int) -> LaneState:
        """A lane before its first row."""
        return LaneState(lane, [Place() for _ in self.names])

    def rng(self, ref: Ref) -> np.random.Generator | None:
        """Randomness of one sample in one epoch, whoever draws it; None without augmentation."""
        if not self.rules.augment:
            return None
        words = (self.rules.seed, hash_name(self.names[ref.source]), ref.index, ref.epoch)
        return np.random.Generator(np.random.Philox(key=[hash_ints(0, *words), hash_ints(1, *words)]))


class LaneReader:
    """One lane, row by row, from a state on."""

    def __init__(self, plan: Plan, state: LaneState) -> None:
        if not 0 <= state.lane < plan.rules.num_lanes or len(state.places) != len(plan.names):
            raise StreamError(
                f"state of lane {state.lane} with {len(state.places)} sources does not belong to a stream of "
                f"{plan.rules.num_lanes} lanes and {len(plan.names)} sources"
            )
        self._plan = plan
        self._state = state
        starts = plan.mixture.start(state.lane)
        self._draws = [start + place.taken for start, place in zip(starts, state.places, strict=True)]
        self._examples: dict[tuple[int, int, int], Example] = {}
        self._last: tuple[int, int, Sample] | None = None

    def next_row(self) -> tuple[list[Example], bytes]:
        """The examples of the next row, left to right, and the state after it.

        A sample found damaged only now leaves a hole: it is counted and nothing takes its place. `source` of an
        example is the name the mix gives it.
        """
        refs = self.plan_row()
        examples = [example for ref in refs if (example := self._example(ref)) is not None]
        return examples, self._state.to_bytes()

    def plan_row(self) -> list[Ref]:
        """What the next row will hold, without making it."""
        rules = self._plan.rules
        if rules.packing:
            row = fill_row(self._state.waiting, self._draw, rules.budget, rules.look_ahead)
        else:
            row = [self._draw()]
        self._state.rows += 1
        return row

    def _draw(self) -> Ref:
        """The next readable sample that fits a row, of the source whose turn it is."""
        source = self._plan.mixture.choose(self._draws)
        place = self._state.places[source]
        fruitless = 0
        while True:
            epoch, index = self._advance(source)
            lengths = self._lengths(source, index, epoch)
            if lengths is not None:
                break
            place.left_out += 1
            fruitless += 1
            if fruitless >= min(FRUITLESS_DRAWS, 2 * len(self._plan.sources[source])):
                raise StreamError(
                    f"source {self._plan.names[source]!r}: {fruitless} samples one after another were damaged or too "
                    f"long (max_tokens={self._plan.rules.max_tokens}, max_views={self._plan.rules.max_views}); "
                    "nothing of it can be used"
                )
        place.taken += 1
        self._draws[source] += 1
        return Ref(source, index, epoch, *lengths)

    def _advance(self, source: int) -> tuple[int, int]:
        """(epoch, number) of the lane's next sample of a source."""
        place = self._state.places[source]
        epoch, numbers = self._plan.deals[source].turn(self._state.lane, place.j)
        index = numbers[place.offset]
        place.offset += 1
        if place.offset == len(numbers):
            place.j, place.offset = place.j + 1, 0
        return epoch, index

    def _lengths(self, source: int, index: int, epoch: int) -> tuple[int, int] | None:
        """Tokens and views a sample will take in a row; None if it is left out."""
        try:
            tokens, views = self._measure(source, index, epoch)
            return self._within_budget(source, index, tokens, views)
        except SampleError as error:
            self._examples.pop((source, index, epoch), None)
            self._lose(source, index, getattr(error, "reason", Reason.PROCESSOR), error)
            return None

    def _measure(self, source: int, index: int, epoch: int) -> tuple[int, int]:
        """What the processor says; one that cannot tell ahead makes the example, which then waits."""
        if self._plan.lengths is not None:
            return self._plan.lengths(self._sample(source, index))
        ref = Ref(source, index, epoch, 0, 0)
        example = self._plan.processor(self._sample(source, index), rng=self._plan.rng(ref))
        self._examples[source, index, epoch] = example
        return len(example), example.num_views

    def _within_budget(self, source: int, index: int, tokens: int, views: int) -> tuple[int, int]:
        """The lengths after the policy `truncate_text`; SampleTooLongError where a row cannot hold them."""
        rules = self._plan.rules
        if rules.budget.holds(tokens, views):
            return tokens, views
        if rules.too_long == "truncate_text" and rules.budget.holds(0, views):
            return rules.max_tokens, views
        problem = (
            f"it needs {tokens} tokens and {views} views, a row holds max_tokens={rules.max_tokens}, "
            f"max_views={rules.max_views}; raise them, or set data.too_long to skip or truncate_text"
        )
        raise SampleTooLongError(self._plan.sources[source].key(index), problem, tokens, rules.max_tokens)

    def _example(self, ref: Ref) -> Example | None:
        """The example of a planned sample; None where it turns out damaged."""
        example = self._examples.pop((ref.source, ref.index, ref.epoch), None)
        rules = self._plan.rules
        try:
            if example is None:
                example = self._plan.processor(self._sample(ref.source, ref.index), rng=self._plan.rng(ref))
            if rules.too_long == "truncate_text" and len(example) > ref.tokens == rules.max_tokens:
                example = cut_text(example, ref.tokens)
        except SampleError as error:
            self._lose(ref.source, ref.index, Reason.DECODE, error)
            return None
        if (len(example), example.num_views) != (ref.tokens, ref.views):
            raise RuntimeError(
                f"sample {example.key}: the processor announced {ref.tokens} tokens and {ref.views} views "
                f"but made {len(example)} and {example.num_views}; its lengths() and its call disagree"
            )
        return replace(example, source=self._plan.names[ref.source])

    def _sample(self, source: int, index: int) -> Sample:
        if self._last is not None and self._last[:2] == (source, index):
            return self._last[2]
        sample = self._plan.sources[source][index]
        self._last = (source, index, sample)
        return sample

    def _lose(self, source: int, index: int, reason: Reason, error: SampleError) -> None:
        """Count a sample that is left out; StreamError where a policy or the budget of damage forbids it."""
        shards, rules, name = self._plan.sources[source], self._plan.rules, self._plan.names[source]
        if isinstance(error, SampleTooLongError):
            if rules.too_long != "skip":
                raise StreamError(f"source {name!r}: {error}") from error
            reason = Reason.TOO_LONG
        losses = self._state.losses
        spot = (source, shards.locate(index)[0], int(reason))
        losses[spot] = losses.get(spot, 0) + 1
        if reason is Reason.TOO_LONG:
            return
        log.warning("source %s: left out (%s): %s", name, reason.name.lower(), error)
        damage = {key: count for key, count in losses.items() if key[0] == source and key[2] != Reason.TOO_LONG}
        drawn = self._state.places[source].taken + self._state.places[source].left_out
        if sum(damage.values()) <= rules.bad_budget * max(drawn, BUDGET_WINDOW):
            return
        (_, shard, kind), worst = max(damage.items(), key=lambda item: item[1])
        path = shards.folder / shards.shards[shard].file
        raise StreamError(
            f"source {name!r}: {sum(damage.values())} damaged samples after {drawn} draws of lane {self._state.lane}, "
            f"more than data.bad_budget={rules.bad_budget} allows; worst is {path} "
            f"({worst} x {Reason(kind).name.lower()}); last: {error}; write the shard again or raise the budget"
        ) from error


def cut_text(example: Example, tokens: int) -> Example:
    """The first `tokens` positions; SampleTooLongError where that would cut through an image or a prompt."""
    if (example.slots[tokens:] != Slot.TEXT).any():
        problem = f"its image and prompts alone pass max_tokens={tokens}; raise max_tokens or set data.too_long=skip"
        raise SampleTooLongError(example.key, problem, len(example), tokens)
    return replace(example, ids=example.ids[:tokens], labels=example.labels[:tokens], slots=example.slots[:tokens])
