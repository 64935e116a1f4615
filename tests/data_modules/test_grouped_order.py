"""The published order over real shards: the golden batches, resumes anywhere and in any layout, damage replaced."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from bestiary.schema import Sample, Turn
from data_modules.fingerprint import fingerprint
from data_modules.lanes import LaneState, lanes_of
from data_modules.shards import write_samples
from data_modules.sources import StreamError
from data_modules.stream import Stream
from tests.data_modules.making import picture, stream
from tests.parity.cases import cases, has, read_json

ROWS = 4


def grouped(folder: Path, **changes: Any) -> Stream:
    given = {"order": "grouped", "packing": False, "num_lanes": ROWS, "max_tokens": 400, "augment": False}
    sources = {name.name: {"path": name, "kind": name.name} for name in sorted(folder.iterdir())}
    return stream(sources, **{**given, **changes})


def write(folder: Path, sizes: list[int], *, bad: tuple[str, ...] = ()) -> None:
    """One source a group, pictures first; the answers' lengths fall, so that sorting turns each source around."""
    for group, size in enumerate(sizes):
        name = f"source{group}"
        samples = (
            Sample(
                key := f"{name}-{number}",
                name,
                "natural",
                (Turn("human", "?"), Turn("assistant", "a" * (size - number))),
                (() if group else (picture(0)[: 20 if key in bad else None],)),
            )
            for number in range(size)
        )
        write_samples(folder / name, samples, source=name, samples_per_shard=7)


def keys(made: Stream, steps: int, **loading: Any) -> tuple[list[list[str]], dict[int, bytes]]:
    """Keys of each global batch, and the states after the last."""
    found, states = [], {}
    for batches in itertools.islice(made.loader(range(made.plan.rules.num_lanes), **loading), steps):
        found.append([segment.key for batch in batches for segment in batch.segments])
        states = {lane: state for batch in batches for lane, state in zip(batch.lanes, batch.states, strict=True)}
    return found, states


def _goldens() -> list[tuple[dict[str, Any], int, int, list[tuple[int, list[int]]]]]:
    """(arguments, epoch, first micro step, (rank, its places) of some ranks) of every published run that shuffles."""
    found = []
    for case in cases("sphinx", has("sampler.json")):
        for entry in read_json(case.values[0] / "sampler.json"):
            for number, (epoch, start) in enumerate(entry["args"]["epoch_startiter"]):
                ranks = [(rank["rank"], rank["indices_per_epoch"][number]) for rank in entry["ranks"]]
                found.append((entry["args"], epoch, start, ranks))
    for case in cases("sphinxv", has("dist_sampler.json")):
        for entry in read_json(case.values[0] / "dist_sampler.json"):
            found.append((entry, entry["epoch"], entry["start_iter"], [(entry["rank"], entry["indices"])]))
    return [golden for golden in found if golden[0].get("shuffle", True)]


def test_global_batches_are_the_published_ones(tmp_path: Path) -> None:
    """Ranks may start in the middle of an update: only whole ones are compared. `seen` proves that there were any."""
    seen = 0
    for args, epoch, start, ranks in _goldens():
        sizes, micro, per_rank = args["group_sizes"], args["batch_size"], args["batch_size"] * args["acc_grad"]
        folder = tmp_path / "-".join(map(str, sizes))
        if not folder.exists():
            write(folder, sizes)
        made = grouped(folder, num_lanes=per_rank * args["num_replicas"], seed=args["seed"])
        assert made.plan.order is not None
        skipped = -(start // -args["acc_grad"])
        first = epoch * made.plan.order.num_batches + skipped
        states = {lane: _at(made, lane, first) for lane in range(made.plan.rules.num_lanes)}
        begun = skipped * per_rank - start * micro
        batches, _ = keys(made, (len(ranks[0][1]) - begun) // per_rank, states=states)
        for number, batch in enumerate(batches):
            ours = [_place(key, sizes) for key in batch]
            for rank, places in ranks:
                theirs = places[begun + number * per_rank :][:per_rank]
                steps = range(rank * micro, len(ours), args["num_replicas"] * micro)
                assert [place for at in steps for place in ours[at : at + micro]] == theirs
                seen += 1
    assert seen or not _goldens()


def _at(made: Stream, lane: int, step: int) -> bytes:
    state = made.plan.first_state(lane)
    state.rows = step
    return state.to_bytes()


def _place(key: str, sizes: list[int]) -> int:
    """A key's number in the published order: groups one after another, each from short to long."""
    group, number = (int(part) for part in key.removeprefix("source").split("-"))
    return sum(sizes[:group]) + sizes[group] - 1 - number


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups; the shortest picture and one in the middle do not decode."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder, [13, 11], bad=("source0-12", "source0-6"))
    return folder


def test_a_resume_at_any_step_in_any_layout_goes_on_with_the_same_batches(mixed: Path) -> None:
    whole, last = keys(grouped(mixed), 12)
    for step in (1, 4, 7):
        _, states = keys(grouped(mixed), step)
        made = grouped(mixed)
        assert made.resume(states, made.fingerprint()).step == step
        found: list[list[str]] = [[] for _ in whole[step:]]
        ended: dict[int, bytes] = {}
        for rank in range(3):
            loader = made.loader(lanes_of(rank, 3, range(ROWS)), states=states, micro_batch=1)
            for number, batches in enumerate(itertools.islice(loader, 12 - step)):
                found[number] += [segment.key for batch in batches for segment in batch.segments]
                ended |= {lane: s for batch in batches for lane, s in zip(batch.lanes, batch.states, strict=True)}
        assert found == whole[step:] and ended == last
    undecoded = [[sample.key for sample in step] for step in itertools.islice(grouped(mixed).samples(), 5)]
    assert [len(set(a) ^ set(b)) <= 4 for a, b in zip(undecoded, whole, strict=False)] == [True] * 5


@pytest.mark.slow
def test_worker_processes_change_nothing(mixed: Path) -> None:
    assert keys(grouped(mixed), 8, num_workers=2) == keys(grouped(mixed), 8)


def test_a_damaged_sample_is_replaced_by_the_one_before_it_in_its_group(mixed: Path) -> None:
    made = grouped(mixed)
    assert made.plan.order is not None and made.plan.order.num_batches == 5 and made.plan.order.num_dropped == 4
    found, states = keys(made, 5)
    drawn = sorted(key for batch in found for key in batch if key.startswith("source0"))
    expected = [
        f"source0-{n}" for n in (*range(1, 6), 7, 7, *range(8, 12), 0)
    ]  # of 12, the longest: it has none before
    assert drawn == sorted(expected)
    assert all(len(batch) == ROWS and len({key.split("-")[0] for key in batch}) == 1 for batch in found)
    assert made.losses(states.values()) == [
        "source0/shard-00000.tar: 1 processor", "source0/shard-00001.tar: 1 processor",
    ]  # fmt: skip
    assert sum(place.taken for state in states.values() for place in LaneState.from_bytes(state).places) == 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing": True}, "data.packing=True .set false."),
        ({"chunk": 2}, "data.chunk=2"),
        ({"temperature": 2.0}, "data.temperature=2.0"),
        ({"unit": "tokens"}, "data.unit=tokens"),
        ({"num_lanes": 30}, r"none of the groups, of \[13, 11\] samples, fills stage.batch_size=30"),
        ({"order": "gruoped"}, "choose stratified, grouped"),
    ],
)
def test_options_without_effect_are_refused(mixed: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamError, match=named):
        grouped(mixed, **changes)


def test_shares_and_remixing_are_refused_and_the_order_is_part_of_the_fingerprint(mixed: Path) -> None:
    given = {"packing": False, "num_lanes": ROWS, "max_tokens": 400}
    weighted = {"source0": {"path": mixed / "source0", "weight": 2.0, "max_epochs": 3.0}}
    with pytest.raises(StreamError, match=r"data.sources.source0.weight, data.sources.source0.max_epochs would change"):
        stream(weighted, order="grouped", **given)
    made, plain = grouped(mixed), stream({"source0": {"path": mixed / "source0"}}, **given)
    assert fingerprint(made.plan)["rules"]["order"] == "grouped" and "order" not in fingerprint(plain.plan)["rules"]
    _, states = keys(made, 2)
    other = grouped(mixed, seed=9)
    by_pictures = stream({name: {"path": mixed / name} for name in ("source0", "source1")}, order="grouped", **given)
    assert keys(by_pictures, 6)[0] == keys(made, 6)[0]
    with pytest.raises(StreamError, match=r"source0.kind is a group of data.order=grouped"):
        grouped(mixed, order="stratified")
    with pytest.raises(StreamError, match=r"data.order=grouped: its steps are those of all"):
        other.resume(states, made.fingerprint(), "remix")
    assert other.resume(states, made.fingerprint(), "restart").step == 2
