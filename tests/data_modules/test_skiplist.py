"""The skip list: what it names is never drawn, and nothing else changes its share."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.lanes import LaneState
from data_modules.records import Reason
from data_modules.shards import open_source
from data_modules.skiplist import added_only, pack_numbers, read_skip_list, resolve_skip_list, skip_line, unpack_numbers
from data_modules.sources import StreamError
from data_modules.stream import Stream
from data_modules.ustar import END, member
from tests.data_modules.making import LANES, source, stream


def write(folder: Path, text: str) -> Path:
    path = folder / "skip.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def keys(made: Stream, steps: int, states: dict[int, bytes] | None = None) -> tuple[list[str], dict[int, bytes]]:
    """Keys of some steps, and the states after them."""
    found: list[str] = []
    for (batch,) in itertools.islice(made.loader(range(LANES), states=states), steps):
        found += [segment.key for segment in batch.segments]
        after = dict(zip(batch.lanes, batch.states, strict=True))
    return found, after


def test_both_forms_are_read_and_comments_are_not(tmp_path: Path) -> None:
    text = '# why: captions are wrong\n\nbig\tbig-00001\n {"step": 3, "key": "k", "source": "bad", "loss": 9.5}\n'
    assert read_skip_list(write(tmp_path, text)) == {"big": {"big-00001": 3}, "bad": {"k": 4}}


def test_all_that_follows_the_tab_is_the_key(tmp_path: Path) -> None:
    lines = ["big\tpart-0/trail \n", "big\t lead\r\n", "big\t \n", " big \ta\tb\n", "big\ta\x85\u2028b"]
    keys = read_skip_list(write(tmp_path, "".join(lines)))
    assert keys == {"big": {"part-0/trail ": 1, " lead": 2, " ": 3, "a\tb": 4, "a\x85\u2028b": 5}}


@pytest.mark.parametrize(
    "name",
    [("big", "part-0/trail "), ("big", "a\nb"), ("#big", "k"), ("{big", "k"), (" big", "k"), ("b\tg", "k"), ("b", "é")],
)
def test_a_written_line_names_its_sample(tmp_path: Path, name: tuple[str, str]) -> None:
    assert read_skip_list(write(tmp_path, skip_line(*name))) == {name[0]: {name[1]: 1}}


def test_a_foreign_sample_whose_name_ends_in_a_space_is_skipped(tmp_path: Path) -> None:
    parts = [(f"{stem}.{end}", data) for stem in ("trail ", "other") for end, data in (("png", b"x"), ("txt", b"y"))]
    (tmp_path / "part-0.tar").write_bytes(b"".join(member(name, data) for name, data in parts) + END)
    shards = open_source(tmp_path / "part-0.tar", format="caption", name="far", domain="natural")
    skip = write(tmp_path, skip_line("far", next(shards.keys())))
    assert skip.read_text() == "far\tpart-0/trail \n"
    assert resolve_skip_list(skip, ["far"], [shards]) == {"far": frozenset({0})}


@pytest.mark.parametrize("packing", [True, False])
def test_skipped_samples_are_never_drawn_and_are_no_damage(tmp_path: Path, mix: Any, packing: bool) -> None:
    skip = write(tmp_path, "big\tbig-00007\nbig\tbig-00008\ntiny\ttiny-00002\n")
    sources = {name: mix[name] for name in ("big", "tiny")}
    made = stream(sources, skip=skip, packing=packing, bad_budget=0.0)
    found, states = keys(made, 8 if packing else 24)
    plain, _ = keys(stream(sources, packing=packing), 8 if packing else 24)
    wanted = {"big-00007", "big-00008", "tiny-00002"}
    assert wanted <= set(plain)
    assert not wanted & set(found)
    lost = Counter(line.rpartition(" ")[2] for line in made.losses(states.values()))
    assert set(lost) == {"skipped"}
    if not packing:  # replaced by the next of the same source: shares stay
        assert Counter(key[:3] for key in found) == Counter(key[:3] for key in plain)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bigg\tbig-00001", "line 1: source 'bigg' is not in the mix; did you mean big"),
        ("big\tbig-0001", "line 1: source 'big' has no sample 'big-0001'; nearest: big-000\\d\\d or"),
        ("big big-00001", "line 1: 'big big-00001' has no tab; write source<TAB>key"),
        ('{"source": "big"}', "line 1: .* is not .*source.*key"),
        ('{"source": "big", "key": 7}', "line 1: .* must be text"),
        ("\n".join(f"tiny\ttiny-{number:05d}" for number in range(5)), "leaves nothing of source 'tiny'"),
    ],
)
def test_a_wrong_line_is_named_with_the_nearest_names(tmp_path: Path, mix: Any, line: str, message: str) -> None:
    with pytest.raises(StreamError, match=message) as caught:
        stream(mix, skip=write(tmp_path, line))
    assert "\n" not in str(caught.value)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, mix: Any) -> None:
    with pytest.raises(StreamError, match=r"skip list .*gone.tsv cannot be read"):
        stream(mix, skip=tmp_path / "gone.tsv")


def test_a_longer_list_is_accepted_at_a_resume_and_drops_what_waits(tmp_path: Path, mix: Any) -> None:
    before = stream(mix, skip=write(tmp_path, "big\tbig-00007\n"))
    _, states = keys(before, 3)
    in_wait = [ref for data in states.values() for ref in LaneState.from_bytes(data).waiting if ref.source == 0]
    key = before.plan.sources[0].key(in_wait[0].index)
    num = sum(ref.index == in_wait[0].index for ref in in_wait)
    after = stream(mix, skip=write(tmp_path, f"big\tbig-00007\nbig\t{key}\n"))
    resumed = after.resume(states, before.fingerprint())
    assert resumed.lines == (
        "skip list: 1 sample of big is left out from step 3 on",
        f"  {num} waiting sample{'s' * (num != 1)} dropped: big, on the skip list",
    )
    assert after.check_states(states, before.fingerprint()) == 3
    found, later = keys(after, 6, resumed.states)
    assert key not in found
    lost = Counter[int]()
    for data in later.values():
        lost.update({reason: n for (_, _, reason), n in LaneState.from_bytes(data).losses.items()})
    assert lost[Reason.SKIPPED] >= num
    again = stream(mix, skip=tmp_path / "skip.tsv")
    assert again.resume(later, after.fingerprint()).states == later


def test_a_list_that_lost_a_line_is_a_change_like_others(tmp_path: Path, mix: Any) -> None:
    before = stream(mix, skip=write(tmp_path, "big\tbig-00007\nbig\tbig-00008\n"))
    after = stream(mix, skip=write(tmp_path, "big\tbig-00007\ntiny\ttiny-00001\n"))
    with pytest.raises(StreamError, match=r"skip.big: 2 samples -> 1 samples; skip.tiny: absent -> 1 samples"):
        after.resume(before.first_states(), before.fingerprint())
    resumed = after.resume(before.first_states(), before.fingerprint(), "remix")
    assert resumed.states == before.first_states()
    assert stream(mix).resume(before.first_states(), before.fingerprint(), "remix").step == 0


@settings(max_examples=50, deadline=None)
@given(st.frozensets(st.integers(0, 2**32 - 1), max_size=20), st.frozensets(st.integers(0, 2**32 - 1), max_size=20))
def test_numbers_come_back_and_only_additions_are_told_apart(one: frozenset[int], other: frozenset[int]) -> None:
    assert unpack_numbers(pack_numbers(one)) == one
    saved, both = {"a": pack_numbers(one)}, {"a": pack_numbers(one | other)}
    assert added_only(saved, both) == ({"a": other - one} if other - one else {})
    assert added_only(both, saved) == ({} if other <= one else None)


def test_ten_thousand_numbers_are_small() -> None:
    assert len(pack_numbers(frozenset(range(0, 10_000_000, 997)))) < 20_000


def test_a_source_with_one_sample_left_is_drawn_from_by_every_lane(tmp_path: Path) -> None:
    source(tmp_path / "few", "few", 20)
    skip = write(tmp_path, "".join(f"few\tfew-{number:05d}\n" for number in range(20) if number != 3))
    found, _ = keys(stream({"few": {"path": tmp_path / "few"}}, skip=skip, packing=False), 30)
    assert found == ["few-00003"] * 30 * LANES
