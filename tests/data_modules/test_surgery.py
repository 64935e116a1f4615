"""Mix surgery: what is untouched goes on as if nothing had happened; everything else is said before it happens."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bestiary.schema import Lengths, Sample
from data_modules.datamodule import StreamDataModule
from data_modules.lanes import LaneState
from data_modules.rows import LaneReader
from data_modules.rules import Rules
from data_modules.sources import StreamError
from data_modules.stream import Stream
from data_modules.surgery import resume
from tests.data_modules.making import LANES, CharProcessor, source, stream

States = dict[int, bytes]
Seen = Counter[tuple[str, int, int]]
"""(source, epoch, number) -> how often it was put into a row."""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Four sources of different sizes."""
    root = tmp_path_factory.mktemp("four")
    sizes = {"a": 60, "b": 45, "c": 31, "d": 20}
    for name, size in sizes.items():
        source(root / name, name, size)
    return {name: {"path": root / name} for name in sizes}


def advance(made: Stream, states: States, steps: int, seen: Seen) -> States:
    """All lanes some steps on, counting what their rows hold; nothing is decoded."""
    after = {}
    for lane, data in states.items():
        reader = LaneReader(made.plan, LaneState.from_bytes(data))
        for _ in range(steps):
            seen.update((made.plan.names[ref.source], ref.epoch, ref.index) for ref in reader.plan_row())
        after[lane] = reader.state.to_bytes()
    return after


def waiting(made: Stream, states: States) -> Seen:
    """What waits in the packers."""
    refs = [ref for data in states.values() for ref in LaneState.from_bytes(data).waiting]
    return Counter((made.plan.names[ref.source], ref.epoch, ref.index) for ref in refs)


def dealt(made: Stream, states: States, name: str) -> Seen:
    """Every sample of a source that the lanes' places have passed."""
    number = made.plan.names.index(name)
    passed: Seen = Counter()
    for lane, data in states.items():
        place = LaneState.from_bytes(data).places[number]
        for j in range(place.j + 1):
            epoch, numbers = made.plan.deals[number].turn(lane, j)
            inside = numbers if j < place.j else numbers[: place.offset]
            passed.update((name, epoch, index) for index in inside)
    return passed


def of(seen: Seen, name: str) -> Seen:
    return Counter({key: count for key, count in seen.items() if key[0] == name})


def weighted(four: dict[str, Any], **weights: float) -> dict[str, Any]:
    return {name: {**four[name], "weight": weight} for name, weight in weights.items()}


def cut(made: Stream, states: States, after: Stream) -> States:
    """A remix, by way of a checkpoint's JSON."""
    saved = json.loads(json.dumps(made.fingerprint()))
    return after.resume(states, saved, "remix").states


def test_untouched_sources_neither_repeat_nor_lose_a_sample_across_surgeries(four: Any) -> None:
    surgeries = [
        stream(weighted(four, a=3, b=2, c=1), chunk=2),
        stream(weighted(four, a=1, b=2, c=1), chunk=2),  # reweighted
        stream(weighted(four, d=1, a=1, c=1), chunk=2),  # b removed, d added, another order
        stream(weighted(four, c=1, a=2, d=1), chunk=2, max_tokens=60, look_ahead=5),
        stream(weighted(four, c=1, a=2, d=1), chunk=2, packing=False),
        stream(weighted(four, c=1, a=2, d=1), chunk=2, unit="tokens"),
        stream(weighted(four, a=2, b=1), chunk=2),
    ]
    seen: Seen = Counter()
    states = surgeries[0].first_states()
    for number, made in enumerate(surgeries):
        states = advance(made, states, 3 + number % 3, seen)
        if number + 1 < len(surgeries):
            states = cut(made, states, surgeries[number + 1])
    last = surgeries[-1]
    assert of(seen, "a") + of(waiting(last, states), "a") == dealt(last, states, "a")
    assert max(of(seen, "a").values()) == 1
    assert len(of(seen, "a")) > 60  # beyond the first epoch
    assert {LaneState.from_bytes(data).rows for data in states.values()} == {sum(3 + n % 3 for n in range(7))}


@pytest.mark.parametrize("seed", range(4))
def test_every_source_loses_and_repeats_nothing_while_it_is_in_the_mix(four: Any, seed: int) -> None:
    dice = random.Random(seed)
    made = stream(weighted(four, a=1, b=1, c=1))
    states, seen = made.first_states(), {name: Counter[tuple[str, int, int]]() for name in made.plan.names}
    for _ in range(7):
        drawn: Seen = Counter()
        states = advance(made, states, dice.randrange(4), drawn)
        seen = {name: seen[name] + of(drawn, name) for name in made.plan.names}
        for name in made.plan.names:
            assert seen[name] + of(waiting(made, states), name) == dealt(made, states, name)
            assert max(seen[name].values(), default=1) == 1
        names = dice.sample("abcd", dice.randrange(1, 5))
        budgets = {"max_tokens": dice.choice([60, 96, 200]), "max_views": dice.choice([0, 8])}
        after = stream(
            weighted(four, **{name: dice.choice([1, 2, 5]) for name in names}),
            packing=dice.random() < 0.8,
            unit=dice.choice(["samples", "tokens"]),
            look_ahead=dice.choice([4, 16]),
            **budgets,
        )
        states = cut(made, states, after)
        seen = {name: seen.get(name, Counter()) for name in names}
        made = after


def test_a_remix_without_a_difference_changes_nothing_bit_for_bit(four: Any) -> None:
    made = stream(weighted(four, a=3, b=2))
    states = advance(made, made.first_states(), 4, Counter())
    for on_change in ("refuse", "remix", "restart"):
        resumed = stream(weighted(four, a=3, b=2)).resume(states, made.fingerprint(), on_change)
        assert (resumed.states, resumed.lines, resumed.step) == (states, (), 4)
    heavy = {name: {**given, "loss_weight": 2.0} for name, given in weighted(four, a=3, b=2).items()}
    resumed = stream(heavy).resume(states, made.fingerprint(), "remix")
    assert resumed.states == states
    assert "sources.a.loss_weight: 1.0 -> 2.0" in "\n".join(resumed.lines)


def test_a_remixed_stream_goes_on_the_same_in_every_layout(four: Any) -> None:
    before, after = stream(weighted(four, a=3, b=2)), stream(weighted(four, b=2, d=1))
    states = cut(before, advance(before, before.first_states(), 3, Counter()), after)
    assert after.check_states(states, after.fingerprint()) == 3

    def batches(ranks: int, workers: int) -> dict[tuple[int, int], tuple[Any, ...]]:
        found = {}
        for rank in range(ranks):
            lanes = range(LANES * rank // ranks, LANES * (rank + 1) // ranks)
            for step in itertools.islice(after.loader(lanes, states=states, num_workers=workers), 4):
                for row, lane in enumerate(step[0].lanes):
                    keys = tuple(segment.key for segment in step[0].segments if segment.row == row)
                    found[step[0].step, lane] = (keys, step[0].states[row])
        return found

    expected = batches(1, 0)
    assert sorted({step for step, _ in expected}) == [3, 4, 5, 6]
    assert batches(4, 0) == batches(3, 2) == expected


def test_shares_follow_the_new_mix_from_the_surgery_on(four: Any) -> None:
    before, after = stream(weighted(four, a=9, b=1), packing=False), stream(weighted(four, a=1, b=1), packing=False)
    states = cut(before, advance(before, before.first_states(), 20, Counter()), after)
    seen: Seen = Counter()
    advance(after, states, 10, seen)
    drawn = Counter(name for name, _, _ in seen.elements())
    assert abs(drawn["a"] - 60) <= 1


def test_the_explanation_names_everything_that_changes_before_it_happens(
    four: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = stream(weighted(four, a=3, b=1))
    states = advance(before, before.first_states(), 4, Counter())
    gone = sum(count for (name, _, _), count in waiting(before, states).items() if name == "b")
    module = StreamDataModule(
        sources=weighted(four, a=1, d=1),
        processor=CharProcessor(),
        seed=3,
        num_lanes=LANES,
        max_tokens=96,
        max_views=8,
        bad_budget=0.5,
        on_change="remix",
    )
    lines = module.explain_change(states, before.fingerprint())
    text = "\n".join(lines)
    assert lines[0] == "stream.on_change=remix: from step 4 on"
    assert "removed  b: its share was 25.00%" in text
    assert "added    d: share 50.00%, 20 samples, begins its first epoch" in text
    assert f"{gone} waiting samples dropped: b was removed" in text
    progress = sum(LaneState.from_bytes(data).places[0].j for data in states.values()) / 60
    assert f"kept     a: share 75.00% -> 50.00%, goes on at {progress % 1:.1%} of its epoch {int(progress) + 1}" in text
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert module.load_states(states, before.fingerprint()) == 4
        assert module.load_states(states, before.fingerprint()) == 4
    assert [record.getMessage() for record in caplog.records] == lines
    assert next(iter(module.train_dataloader()))[0].step == 4


def test_a_source_whose_shards_or_chunk_changed_begins_again(tmp_path: Path, four: Any) -> None:
    before = stream(weighted(four, a=1, b=1))
    states = advance(before, before.first_states(), 4, Counter())
    source(tmp_path, "b", 44)
    for changed, words in (
        ({"a": four["a"], "b": {"path": tmp_path}}, "its shards are not those that were saved"),
        ({"a": four["a"], "b": {**four["b"], "chunk": 3}}, "its chunk was 1, now 3"),
    ):
        after = stream(changed)
        resumed = after.resume(states, before.fingerprint(), "remix")
        assert words in "\n".join(resumed.lines)
        found = [LaneState.from_bytes(data) for data in resumed.states.values()]
        assert all(state.places[1].j == 0 and state.places[0].j > 0 for state in found)
        assert all(ref.source == 0 for state in found for ref in state.waiting)
        seen: Seen = Counter()
        advance(after, resumed.states, 6, seen)
        assert max(seen.values()) == 1


class Longer(CharProcessor):
    """Says and makes one position more for every sample."""

    def lengths(self, sample: Sample) -> Lengths:
        return Lengths(*CharProcessor.lengths(self, self._longer(sample)))

    def __call__(self, sample: Sample, **rest: Any) -> Any:
        return super().__call__(self._longer(sample), **rest)

    def fingerprint(self) -> str:
        return "longer"

    def _longer(self, sample: Sample) -> Sample:
        question, answer = sample.turns
        turns = (question, type(answer)(answer.role, answer.text + "!"))
        return Sample(sample.key, sample.source, sample.domain, turns, sample.images, sample.regions, sample.meta)


def test_waiting_samples_are_measured_again_for_another_processor_or_budget(four: Any) -> None:
    before = stream(weighted(four, a=1))
    states = advance(before, before.first_states(), 3, Counter())
    after = stream(weighted(four, a=1), processor=Longer())
    resumed = after.resume(states, before.fingerprint(), "remix")
    for lane, data in resumed.states.items():
        old, new = LaneState.from_bytes(states[lane]).waiting, LaneState.from_bytes(data).waiting
        assert [ref._replace(tokens=ref.tokens + 1) for ref in old] == new
    next(iter(after.loader(range(LANES), states=resumed.states)))
    short = stream(weighted(four, a=1), max_tokens=20, too_long="skip")
    resumed = short.resume(states, before.fingerprint(), "remix")
    assert "damaged or too long" in "\n".join(resumed.lines)
    assert all(ref.tokens <= 20 for data in resumed.states.values() for ref in LaneState.from_bytes(data).waiting)
    assert any(line.endswith("too_long") for line in short.losses(resumed.states.values()))
    with pytest.raises(StreamError, match="too_long"):
        stream(weighted(four, a=1), max_tokens=20).resume(states, before.fingerprint(), "remix")


def test_seed_lanes_and_algorithm_cannot_be_remixed_but_restarted(four: Any) -> None:
    before = stream(weighted(four, a=1))
    states = advance(before, before.first_states(), 5, Counter())
    saved = before.fingerprint()
    cases = [
        (stream(weighted(four, a=1), seed=9), saved, "seed 3 -> 9"),
        (stream(weighted(four, a=1), num_lanes=7), saved, "stage.batch_size 12 -> 7"),
        (before, {**saved, "algorithm": 1}, "algorithm 1 -> 2"),
    ]
    for after, fingerprint, words in cases:
        with pytest.raises(StreamError, match=f"cannot change {words}.*on_change=restart") as caught:
            after.resume(states, fingerprint, "remix")
        assert "\n" not in str(caught.value)
        resumed = after.resume(states, fingerprint, "restart")
        assert resumed.step == 5
        assert "seen again" in resumed.lines[0]
        lanes = [LaneState.from_bytes(data) for data in resumed.states.values()]
        assert {state.rows for state in lanes} == {5}
        assert all(place.j == 0 for state in lanes for place in state.places)
        assert next(iter(after.loader(range(2), states=resumed.states)))[0].step == 5


def test_a_change_is_refused_unless_somebody_said_what_to_do(four: Any) -> None:
    before, after = stream(weighted(four, a=3, b=2)), stream(weighted(four, a=3, b=1))
    with pytest.raises(StreamError, match=r"sources.a.share: 60.0.*stream.on_change=remix"):
        resume(before.first_states(), before.fingerprint(), after.plan)
    with pytest.raises(StreamError, match=r"stream.on_change='maybe'; choose refuse, remix, restart"):
        StreamDataModule(sources=four, processor=CharProcessor(), seed=0, num_lanes=2, max_tokens=9, on_change="maybe")


def test_a_refusal_names_the_options_and_the_way_that_is_open(four: Any) -> None:
    before = stream(weighted(four, a=1))

    def refused(given: Stream = before, **changes: Any) -> str:
        with pytest.raises(StreamError) as caught:
            stream(weighted(four, a=1), **changes).resume(given.first_states(), given.fingerprint())
        return str(caught.value)

    assert "; changed: stage.batch_size: 12 -> 7; " in refused(num_lanes=7)
    assert "; changed: seed: 3 -> 9; " in refused(seed=9)
    assert "; changed: data.packing: True -> False; " in refused(packing=False)
    wider = refused(row_tokens=105)
    assert "; changed: data.row_tokens: 0 -> 105; " in wider
    grouped = refused(stream(weighted(four, a=1), packing=False), order="grouped", packing=False)
    assert "; changed: data.order: stratified -> grouped; " in grouped
    assert "or set stream.on_change=remix to go on" in wider
    for told in (refused(num_lanes=7), refused(seed=9), grouped):
        assert told.endswith("or set stream.on_change=restart to begin the data again at this step")


def test_a_longer_run_with_a_capped_source_says_why_its_shares_moved(four: Any) -> None:
    capped = {"a": {**four["a"], "max_epochs": 0.2}, "b": four["b"]}
    rules = Rules(seed=3, num_lanes=LANES, max_tokens=96)
    before, after = (Stream(capped, CharProcessor(), rules, max_steps=steps) for steps in (4, 8))
    with pytest.raises(StreamError, match=r"share: .* \(shares of sources with max_epochs follow stage\.max"):
        after.resume(before.first_states(), before.fingerprint())


def test_losses_of_kept_sources_stay_counted(mix: Any) -> None:
    before = stream(mix, packing=False)
    rows = list(itertools.islice(before.loader(range(LANES)), 12))
    states = dict(enumerate(rows[-1][0].states))
    after = stream({name: mix[name] for name in ("tiny", "bad")}, packing=False)
    lost = before.losses(states.values())
    assert lost
    assert after.losses(after.resume(states, before.fingerprint(), "remix").states.values()) == lost
