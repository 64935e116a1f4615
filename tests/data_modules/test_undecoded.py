"""Samples without a processor's work come in the order of the rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from bestiary.schema import Lengths, Sample
from data_modules.sources import StreamError
from data_modules.stream import Stream
from tests.data_modules.making import LANES, CharProcessor, WholeProcessor, source, stream

STEPS = 30


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources, one of them with a shard that ends early, and a skip list."""
    root = tmp_path_factory.mktemp("cut")
    source(root / "whole", "whole", 30)
    shards = source(root / "cut", "cut", 30, per_shard=10)
    tar = root / "cut" / shards.shards[1].file
    tar.write_bytes(tar.read_bytes()[:9000])
    (root / "skip.tsv").write_text("whole\twhole-00003\n", encoding="utf-8")
    return {"whole": {"path": root / "whole", "weight": 2.0}, "cut": {"path": root / "cut"}}


def rows(made: Stream) -> tuple[list[list[str]], dict[int, bytes]]:
    """Keys of unpacked rows, and the states after them."""
    found = []
    for (batch,) in itertools.islice(made.loader(range(LANES)), STEPS):
        found.append([segment.key for segment in batch.segments])
        states = dict(zip(batch.lanes, batch.states, strict=True))
    return found, states


def test_samples_and_states_are_those_of_unpacked_rows(cut: Any) -> None:
    skip = Path(cut["whole"]["path"]).parent / "skip.tsv"
    made = stream(cut, packing=False, skip=skip)
    expected, states = rows(made)
    reader = made.samples()
    assert [[s.key for s in step] for step in itertools.islice(reader, STEPS)] == expected
    assert reader.states() == states
    assert reader.lanes == tuple(range(LANES))
    assert [made.plan.sources[ref.source].key(ref.index) for ref in reader.refs] == expected[-1]
    assert [key.partition("-")[0] for key in expected[-1]] == list(reader.sources)
    assert "cut/shard-00001.tar" in "\n".join(made.losses(reader.states().values()))


def test_reading_goes_on_from_states_and_from_where_it_stopped(cut: Any) -> None:
    made = stream(cut)
    expected = [[s.key for s in step] for step in itertools.islice(made.samples(), 9)]
    reader = made.samples(range(3, 5))
    first = [[s.key for s in step] for step in itertools.islice(reader, 4)]
    more = [[s.key for s in step] for step in itertools.islice(reader, 2)]
    states = reader.states()
    rest = [[s.key for s in step] for step in itertools.islice(made.samples(range(3, 5), states=states), 3)]
    assert first + more + rest == [step[3:5] for step in expected]


@pytest.mark.parametrize("unit", ["tokens", "target_tokens"])
def test_shares_of_tokens_hold_for_samples_too(cut: Any, unit: str) -> None:
    made = stream(cut, packing=False, unit=unit, processor=WholeProcessor())
    expected, states = rows(made)
    reader = made.samples()
    assert [[s.key for s in step] for step in itertools.islice(reader, STEPS)] == expected
    assert reader.states() == states


def test_what_waits_in_packers_comes_first(cut: Any) -> None:
    made = stream(cut)
    (batch,) = next(iter(made.loader(range(2))))
    reader = made.samples(range(2), states=dict(zip(batch.lanes, batch.states, strict=True)))
    first: Sample = next(iter(reader))[0]
    assert first.key not in {segment.key for segment in batch.segments}
    assert len({sample.key for step in itertools.islice(reader, 20) for sample in step}) > 20


def test_damage_beyond_the_budget_ends_reading(cut: Any) -> None:
    with pytest.raises(StreamError, match=r"source 'cut'.*bad_budget=0.001.*shard-00001.tar"):
        list(itertools.islice(stream(cut, bad_budget=0.001).samples(), 30))


class Silent(CharProcessor):
    """No sample of `tiny` has anything to learn."""

    def lengths(self, sample: Sample) -> Lengths:
        lengths = super().lengths(sample)
        return lengths._replace(targets=0) if sample.source == "tiny" else lengths


def test_a_source_without_targets_cannot_take_over_a_mix_of_targets(mix: Any) -> None:
    with pytest.raises(StreamError, match=r"data.sources.tiny: none of its first 32 samples has target_tokens"):
        stream(mix, processor=Silent(), unit="target_tokens")
    stream({"tiny": mix["tiny"]}, processor=Silent(), unit="target_tokens")
