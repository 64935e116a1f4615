"""The promise: row c of step t is a pure function of (seed, data, mix, budgets, c, t)."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bestiary.schema import Batch, Example, Lengths, RegionRows, Sample, SampleTooLongError
from data_modules.fingerprint import differences
from data_modules.lanes import LaneState, lanes_of
from data_modules.rows import LaneReader
from data_modules.sources import StreamError
from data_modules.stream import Stream, worker_died
from tests.data_modules.making import LANES, CharProcessor, WholeProcessor, picture, sample, source, stream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
Found = dict[tuple[int, int], tuple[Any, ...]]


def contents(batch: Batch) -> Found:
    """(step, lane) -> everything of its row, without the padding, in comparable form."""
    found: Found = {}
    pictures = prompts = 0
    for row, lane in enumerate(batch.lanes):
        inside = batch.segment_ids[row] > 0
        num_pictures = int((batch.slots[row] == 1).sum()) // 3
        num_prompts = int((batch.slots[row] == 2).sum())
        regions: Any = None
        if num_prompts and batch.regions is not None:
            regions = torch.as_tensor(batch.regions.coords)[prompts : prompts + num_prompts].numpy().tobytes()
        tensors = (batch.ids, batch.labels, batch.slots, batch.positions, batch.segment_ids)
        found[batch.step, lane] = (
            *(tensor[row][inside].numpy().tobytes() for tensor in tensors),
            batch.pixels[pictures : pictures + num_pictures].numpy().tobytes(),
            regions,
            tuple((s.key, s.source, s.domain, s.start, s.length) for s in batch.segments if s.row == row),
            batch.states[row],
        )
        pictures, prompts = pictures + num_pictures, prompts + num_prompts
    return found


def run(
    made: Stream, steps: int, *, ranks: int = 1, workers: int = 0, micro_batch: int = 0, states: Any = None
) -> Found:
    """All rows of some steps in one layout."""
    found: Found = {}
    for rank in range(ranks):
        lanes = lanes_of(rank, ranks, range(LANES))
        loader = made.loader(lanes, states=states, micro_batch=micro_batch, num_workers=workers)
        for batches in itertools.islice(loader, steps):
            assert [lane for batch in batches for lane in batch.lanes] == list(lanes)
            for batch in batches:
                found.update(contents(batch))
    assert len(found) == steps * LANES
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_rows_do_not_depend_on_ranks_micro_batches_or_repetition(mix: Any, packing: bool) -> None:
    made = stream(mix, packing=packing)
    expected = run(made, 8)
    for ranks, micro_batch in ((1, 0), (1, 5), (2, 1), (3, 2), (4, 0), (5, 1)):
        assert run(made, 8, ranks=ranks, micro_batch=micro_batch) == expected
    assert run(stream(mix, packing=packing), 8) == expected


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (3, 2)])
def test_rows_do_not_depend_on_workers(mix: Any, ranks: int, workers: int) -> None:
    made = stream(mix)
    assert run(made, 5, ranks=ranks, workers=workers, micro_batch=4) == run(made, 5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_and_resumes_are_equal_in_every_layout(mix: Any, ranks: int, workers: int, packing: bool) -> None:
    made = stream(mix, packing=packing, chunk=2)
    expected = run(made, 12)
    assert run(made, 12, ranks=ranks, workers=workers, micro_batch=2) == expected
    states = {lane: expected[6, lane][-1] for lane in range(LANES)}
    rest = run(made, 5, ranks=ranks, workers=workers, states=states)
    assert rest == {spot: row for spot, row in expected.items() if spot[0] > 6}


@pytest.mark.parametrize("processor", [CharProcessor(), WholeProcessor()], ids=["lengths", "whole"])
@pytest.mark.parametrize("packing", [True, False])
def test_any_step_can_be_resumed_on_any_layout(mix: Any, packing: bool, processor: Any) -> None:
    steps = 7
    expected = run(stream(mix, packing=packing, processor=processor), steps)
    for done in range(steps - 1):
        again = stream(mix, packing=packing, processor=processor)
        states = {lane: expected[done, lane][-1] for lane in range(LANES)}
        assert again.check_states(states, again.fingerprint()) == done + 1
        rest = run(again, steps - done - 1, ranks=1 + done % 4, micro_batch=done % 3, states=states)
        assert rest == {spot: row for spot, row in expected.items() if spot[0] > done}


def test_packing_only_rearranges_and_examples_are_what_the_processor_makes(mix: Any) -> None:
    made = stream({"big": mix["big"]}, packing=True, augment=False)
    by_key = {f"big-{n:05d}": CharProcessor()(sample("big", n)) for n in range(40)}
    for batches in itertools.islice(made.loader(range(LANES)), 4):
        for segment in batches[0].segments:
            span = batches[0].ids[segment.row, segment.start : segment.start + segment.length]
            assert span.tolist() == by_key[segment.key].ids.tolist()


def test_unpacked_rows_use_every_sample_once_before_any_twice(mix: Any) -> None:
    made = stream({"big": mix["big"]}, packing=False)
    keys = [row[7][0][0] for _, row in sorted(run(made, 40 // LANES).items())]
    assert len(set(keys)) == 40 // LANES * LANES
    counted = Counter(row[7][0][0] for row in run(made, 10).values())
    assert set(counted.values()) == {3}


def test_shares_are_kept_although_samples_are_damaged(mix: Any) -> None:
    made = stream(mix, packing=False, processor=WholeProcessor())
    counted = Counter(row[7][0][1] for row in run(made, 50).values())
    assert abs(counted["big"] - 360) <= 3
    assert abs(counted["bad"] - 180) <= 3
    assert abs(counted["tiny"] - 60) <= 3


def test_augmentation_depends_on_the_epoch_and_only_on_sample_and_epoch(mix: Any) -> None:
    tiny = {"tiny": mix["tiny"]}
    seen: dict[str, set[bytes]] = {}
    for spot, row in sorted(run(stream(tiny, packing=False), 5).items()):
        seen.setdefault(row[7][0][0], set()).add(row[5])
        assert spot[1] < LANES
    assert len(seen["tiny-00000"]) == 12  # sixty rows are twelve epochs of five samples
    plain = run(stream(tiny, packing=False, augment=False), 5)
    assert {row[5] for row in plain.values() if row[7][0][0] == "tiny-00000"} == {bytes(plain_pixels(0))}


def plain_pixels(number: int) -> bytes:
    return CharProcessor()(sample("tiny", number)).pixels.tobytes()


def test_damage_found_while_decoding_is_a_counted_hole(mix: Any) -> None:
    made = stream({"bad": mix["bad"]}, packing=False)
    rows = run(made, 7)
    empty = [spot for spot, row in rows.items() if not row[7]]
    assert len(empty) == 4 * 3
    states = [rows[6, lane][-1] for lane in range(LANES)]
    assert sorted(made.losses(states)) == [
        "bad/shard-00000.tar: 8 decode",
        "bad/shard-00002.tar: 4 decode",
    ]


def test_lanes_that_are_each_within_the_budget_may_be_over_it_together(mix: Any) -> None:
    made, larger = (stream({"bad": mix["bad"]}, packing=False, bad_budget=budget) for budget in (0.011, 0.012))
    rows = run(made, 7)
    states = [rows[6, lane][-1] for lane in range(LANES)]
    larger.check_damage(states)
    with pytest.raises(StreamError, match=r"'bad': 12 damaged samples after 84 draws of all lanes.*00000.tar \(8"):
        made.check_damage(states)


def test_damage_found_before_is_skipped_and_counted(mix: Any) -> None:
    made = stream({"bad": mix["bad"]}, packing=False, processor=WholeProcessor())
    rows = run(made, 6)
    assert all(row[7] for row in rows.values())
    assert not {row[7][0][0] for row in rows.values()} & {"bad-00003", "bad-00004", "bad-00011"}
    lost = [line.rpartition(" ")[2] for line in made.losses([rows[5, lane][-1] for lane in range(LANES)])]
    assert set(lost) == {"processor"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processor", [CharProcessor(), WholeProcessor()], ids=["lengths", "whole"])
def test_a_source_over_its_budget_of_damage_stops_the_run(tmp_path: Path, processor: Any, workers: int) -> None:
    source(tmp_path, "ruin", 20, bad=range(20))
    made = stream({"ruin": {"path": tmp_path}}, processor=processor, bad_budget=0.001)
    with pytest.raises(StreamError, match=r"source 'ruin': 2 damaged.*bad_budget=0.001.*shard-0000\d.tar") as caught:
        run(made, 20, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_fully_damaged_source_does_not_spin(tmp_path: Path) -> None:
    source(tmp_path, "ruin", 20, bad=range(20))
    made = stream({"ruin": {"path": tmp_path}}, processor=WholeProcessor(), bad_budget=1.0)
    with pytest.raises(StreamError, match="640 samples one after another"):
        run(made, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_a_lane_counts_every_place_it_passed_as_taken_or_left_out(mix: Any, packing: bool) -> None:
    rows = run(stream(mix, packing=packing, processor=WholeProcessor()), 9)
    places = [place for lane in range(LANES) for place in LaneState.from_bytes(rows[8, lane][-1]).places]
    assert all(place.offset == 0 and place.taken + place.left_out == place.j for place in places)
    assert sum(place.left_out for place in places) > 0


def test_damaged_shards_are_skipped_the_same_way_in_every_layout(tmp_path: Path) -> None:
    shards = source(tmp_path, "cut", 30, per_shard=10)
    tar = tmp_path / shards.shards[1].file
    tar.write_bytes(tar.read_bytes()[:9000])
    made = stream({"cut": {"path": tmp_path}})
    expected = run(made, 6)
    assert run(made, 6, ranks=4) == expected
    lost = made.losses([expected[5, lane][-1] for lane in range(LANES)])
    assert len(lost) == 1
    assert lost[0].startswith("cut/shard-00001.tar: ")
    assert lost[0].endswith(" cut")


def test_other_errors_of_a_processor_are_bugs_and_raise(mix: Any) -> None:
    class Broken(CharProcessor):
        def __call__(self, sample: Sample, *, rng: np.random.Generator | None = None) -> Example:
            raise ZeroDivisionError

    class Liar(CharProcessor):
        def lengths(self, sample: Sample) -> Lengths:
            tokens, views, targets = super().lengths(sample)
            return Lengths(tokens + 1, views, targets)

    with pytest.raises(ZeroDivisionError):
        run(stream(mix, processor=Broken()), 1)
    with pytest.raises(RuntimeError, match="disagree"):
        run(stream(mix, processor=Liar()), 1)


class TestTooLong:
    """The policies for samples that no row can hold."""

    @pytest.mark.parametrize("processor", [CharProcessor(), WholeProcessor()], ids=["lengths", "whole"])
    def test_error_names_the_sample_and_the_remedy(self, mix: Any, processor: Any) -> None:
        with pytest.raises(StreamError, match=r"sample big-\d+: it needs \d+ tokens.*too_long"):
            run(stream(mix, max_tokens=16, processor=processor), 4)
        with pytest.raises(StreamError, match=r"max_views=1"):
            run(stream(mix, max_views=1, processor=processor), 4)

    def test_skip_leaves_out_and_counts(self, mix: Any) -> None:
        made = stream({"big": mix["big"]}, max_tokens=20, too_long="skip", bad_budget=0.0)
        rows = run(made, 8)
        assert max(segment[4] for row in rows.values() for segment in row[7]) <= 20
        lost = made.losses([rows[7, lane][-1] for lane in range(LANES)])
        assert lost
        assert all(line.endswith("too_long") for line in lost)
        with pytest.raises(StreamError, match="nothing of it can be used"):
            run(stream({"big": mix["big"]}, max_tokens=4, too_long="skip"), 1)

    def test_text_is_truncated_but_never_an_image(self, mix: Any) -> None:
        made = stream({"big": mix["big"]}, max_tokens=16, too_long="truncate_text", augment=False)
        rows = run(made, 8)
        whole = {f"big-{n:05d}": CharProcessor()(sample("big", n)).ids for n in range(40)}
        cut = 0
        for row in rows.values():
            for key, _, _, start, length in row[7]:
                ids = np.frombuffer(row[0], np.int64)[start : start + length]
                assert ids.tolist() == whole[key][:length].tolist()
                assert length == min(16, len(whole[key]))
                cut += length < len(whole[key])
        assert cut

    def test_what_cannot_be_cut_is_left_out_within_the_budget(self, mix: Any, tmp_path: Path) -> None:
        class Many(CharProcessor):
            def lengths(self, sample: Sample) -> Lengths:
                if int(sample.key[-2:]) == 7:
                    raise SampleTooLongError(sample.key, "its picture would be cut", 99, 16)
                return super().lengths(sample)

        rules = {"max_tokens": 16, "too_long": "truncate_text", "augment": False}
        made = stream({"big": mix["big"]}, processor=Many(), **rules)
        rows = run(made, 8)
        keys = {segment[0] for row in rows.values() for segment in row[7]}
        assert len(keys) > 20 and "big-00007" not in keys
        (lost,) = made.losses([rows[7, lane][-1] for lane in range(LANES)])
        assert lost.endswith(" too_long")
        with pytest.raises(StreamError, match=r"more than data.bad_budget=0.0 allows.* picture would be cut"):
            run(stream({"big": mix["big"]}, processor=Many(), bad_budget=0.0, **rules), 8)
        with pytest.raises(StreamError, match="image and prompts alone"):
            run(stream({"big": mix["big"]}, max_tokens=4, too_long="truncate_text", bad_budget=0.0), 8)


class TestResume:
    """What a resume accepts."""

    def test_another_fingerprint_is_refused_with_the_difference(self, mix: Any) -> None:
        made = stream(mix)
        saved, states = made.fingerprint(), made.first_states()
        heavier = {**mix, "tiny": {**mix["tiny"], "weight": 2.0}}
        for other, message in (
            (stream(mix, seed=4), " seed: 3 -> 4"),
            (stream(mix, look_ahead=8), "data.look_ahead: 16 -> 8"),
            (stream(heavier), "sources.tiny.share: 10.0.*% -> "),
            (stream({"big": mix["big"]}), r"sources\.tiny is gone; "),
            (stream(mix, processor=WholeProcessor()), "processor"),
        ):
            with pytest.raises(StreamError, match=message):
                other.check_states(states, saved)
        assert stream(mix, bad_budget=0.2).check_states(states, saved) == 0
        assert differences(saved, saved) == []

    def test_states_must_be_of_all_lanes_and_one_step(self, mix: Any) -> None:
        made = stream(mix)
        states = made.first_states()
        with pytest.raises(StreamError, match=r"one each of 0\.\.11"):
            made.check_states({lane: state for lane, state in states.items() if lane}, made.fingerprint())
        later = {**states, 4: run(made, 1)[0, 4][-1]}
        with pytest.raises(StreamError, match="different steps"):
            made.check_states(later, made.fingerprint())
        with pytest.raises(ValueError, match="cut off"):
            made.check_states({**states, 4: states[4][:-1]}, made.fingerprint())

    def test_the_loader_leaves_the_global_generator_alone(self, mix: Any) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        next(iter(stream(mix).loader(range(2), num_workers=1)))
        assert torch.equal(before, torch.get_rng_state())


def test_workers_survive_the_signals_of_their_group(mix: Any) -> None:
    before = set(multiprocessing.active_children())
    steps = iter(stream(mix).loader(range(4), num_workers=2))
    first = next(steps)
    children = set(multiprocessing.active_children()) - before
    assert len(children) == 2
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    rows: Found = {}
    for batches in [first, *itertools.islice(steps, 6)]:
        rows.update(contents(batches[0]))
    assert rows == {spot: row for spot, row in run(stream(mix), 7).items() if spot[1] < 4}
    del steps
    assert not children & set(multiprocessing.active_children())


def test_an_error_ends_the_workers_at_once(tmp_path: Path) -> None:
    source(tmp_path, "ruin", 20, bad=range(20))
    before = set(multiprocessing.active_children())
    with pytest.raises(StreamError):
        run(stream({"ruin": {"path": tmp_path}}, bad_budget=0.0), 1, workers=2)
    assert set(multiprocessing.active_children()) <= before


def test_a_worker_that_the_system_kills_is_one_line(mix: Any) -> None:
    before = set(multiprocessing.active_children())
    steps = iter(stream(mix).loader(range(4), num_workers=2))
    next(steps)
    child = next(iter(set(multiprocessing.active_children()) - before))
    assert child.pid is not None
    with pytest.raises(
        (StreamError, RuntimeError)
    ) as caught:  # torch raises as soon as it knows, here or in the loader
        os.kill(child.pid, signal.SIGKILL)
        list(itertools.islice(steps, 100))
    error = caught.value if isinstance(caught.value, StreamError) else worker_died(caught.value)
    assert error is not None
    assert str(error).startswith("a process that reads data ended (DataLoader worker (pid")
    assert "lower data.num_workers and go on with resume=" in str(error)
    assert "\n" not in str(error)
    assert worker_died(RuntimeError("CUDA out of memory")) is None


def test_a_rank_without_lanes_gives_steps_without_rows(mix: Any) -> None:
    assert list(itertools.islice(stream(mix).loader(range(0)), 2)) == [[], []]


@pytest.mark.slow
def test_a_program_that_forgets_its_loader_still_ends(tmp_path: Path) -> None:
    source(tmp_path, "toys", 20)
    program = (
        "from tests.data_modules.test_stream import *\n"
        f"steps = iter(stream({{'toys': {{'path': {str(tmp_path)!r}}}}}).loader(range(4), num_workers=2))\n"
        "next(steps)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=root, check=True, timeout=60)


def test_a_lane_state_belongs_to_its_stream(mix: Any) -> None:
    made = stream(mix)
    with pytest.raises(StreamError, match="does not belong"):
        LaneReader(made.plan, LaneState(99, made.plan.first_state(0).places))


def test_regions_arrive_as_rows_of_the_batch(mix: Any) -> None:
    batch = next(iter(stream(mix).loader(range(LANES), num_workers=2)))[0]
    assert isinstance(batch.regions, RegionRows)
    assert batch.regions.coords.shape[0] == int(batch.regions.counts.sum()) == int((batch.slots == 2).sum())
    assert picture(0)
