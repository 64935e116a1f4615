"""The numbers of an index: what they cannot say is damage, and what they may not say is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_modules import foreign_index
from data_modules.index import DAMAGED, FOREIGN, RECORD, WHERE, Entry, Place, Records, index_bytes, shard_facts
from data_modules.records import DamagedSampleError, Reason, to_members
from data_modules.shards import ShardSet, open_source
from data_modules.ustar import END, member
from tests.data_modules.making import picture, sample


def problem(shards: ShardSet, number: int) -> str:
    """What is wrong with a sample, or nothing."""
    try:
        shards.view(number)
    except DamagedSampleError as error:
        return error.problem
    return ""


def test_what_reading_needs_of_a_record_is_what_its_place_says() -> None:
    place = Place(*range(1000, 1007), 7, 8, 9, 10, 11, 12)
    found = WHERE.unpack(RECORD.pack(*place))
    assert WHERE.size == RECORD.size
    assert found == (*place[:7], place.image, place.flags, place.key_size)


def test_more_files_or_domains_than_an_index_can_count_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_index, "MOST", 2)  # the real 65,535 take seconds
    own = [replace(sample("ours", number, domain=f"d{number}"), images=(), regions=()) for number in range(5)]
    members = [(f"{each.key}.{extension}", data) for each in own for extension, data in to_members(each)]
    members += [(f"many.{name}", picture(1)) for name in ("json", "0.png", "1.png")]
    (tmp_path / "own.tar").write_bytes(b"".join(member(name, data) for name, data in members) + END)
    shards = open_source(tmp_path / "own.tar")
    assert [problem(shards, number) for number in range(3)] == ["", "", ""]
    assert all("is one of more than 3 in this tar" in problem(shards, number) for number in (3, 4))
    assert "it has 3 files, a sample may have 2" in problem(shards, 5)


@pytest.mark.parametrize("reason", list(Reason))
def test_an_index_cannot_excuse_damage_from_the_budget(reason: Reason) -> None:
    place = Place(0, 512, 0, 0, 0, 0, 0, int(reason), 0, 0, 0, FOREIGN | DAMAGED, 0)
    entries = [Entry("key\0problem", place, bytes(32))]
    index, keys = index_bytes(entries)
    shard = shard_facts("x.tar", 512, [], entries, index, keys)
    is_believed = Records(memoryview(index), shard, "x.idx", is_foreign=True).check(0)
    assert is_believed == (reason in (Reason.CUT, Reason.STRUCTURE, Reason.RECORD))
