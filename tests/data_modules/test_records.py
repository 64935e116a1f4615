"""Records: what a Sample says is what is read back, and nothing that is not one passes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.schema import Region, Sample, SampleError, Turn
from data_modules.records import DamagedSampleError, Reason, from_members, from_parts, image_kind, to_members
from tests.data_modules.making import picture, sample

JPEG, WEBP = b"\xff\xd8\xff\xe0rest", b"RIFF1234WEBPrest"
GOOD = sample("toys", 1)


def members(made: Sample = GOOD) -> dict[str, memoryview]:
    return {name: memoryview(content) for name, content in to_members(made)}


def changed(**fields: Any) -> dict[str, memoryview]:
    """The good record with some of its JSON changed."""
    found = members()
    record = {**json.loads(bytes(found["json"])), **fields}
    record = {name: value for name, value in record.items() if value is not ...}
    return {**found, "json": memoryview(json.dumps(record).encode())}


@pytest.mark.parametrize(
    ("extension", "data", "message", "reason"),
    [
        ("pkl", b"x", "not on the list", Reason.STRUCTURE),
        ("0.pyd", b"x", "not on the list", Reason.STRUCTURE),
        ("txt", b"x", "not on the list", Reason.STRUCTURE),
        ("webp", WEBP, "record names images", Reason.STRUCTURE),
        ("png", JPEG, r"member \.png starts with", Reason.STRUCTURE),
        ("png", b"", r"member \.png starts with", Reason.STRUCTURE),
        ("json", b"", "not a sample", Reason.RECORD),
        ("json", b"{", "not a sample", Reason.RECORD),
        ("json", b'{"a": NaN}', "not a sample", Reason.RECORD),
        ("json", b"\xff\xfe", "not a sample", Reason.RECORD),
        ("json", b"\xef\xbb\xbf{}", "not a sample", Reason.RECORD),
        ("json", b'{"source": "\xff"}', "not a sample", Reason.RECORD),
        ("json", b"[]", "not a sample", Reason.RECORD),
        ("json", b"[" * 100_000, "not a sample", Reason.RECORD),
        ("json", b'{"meta":' * 100_000, "not a sample", Reason.RECORD),
        ("json", b"{}", "not a sample", Reason.RECORD),
        ("json", b" " * ((1 << 24) + 1), "more than 16777216", Reason.RECORD),
    ],
)
def test_foreign_members_and_broken_records_are_damage(
    extension: str, data: bytes, message: str, reason: Reason
) -> None:
    assert from_members("toys-00001", members()) == GOOD
    with pytest.raises(DamagedSampleError, match=message) as caught:
        from_members("toys-00001", {**members(), extension: memoryview(data)})
    assert caught.value.reason is reason
    with pytest.raises(DamagedSampleError, match="json is missing"):
        from_members("toys-00001", {"png": members()["png"]})
    with pytest.raises(DamagedSampleError, match="record names images"):
        from_members("toys-00001", {"json": members()["json"]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"source": 5}, r"Expected `str`.*\$\.source"),
        ({"source": ...}, "missing required field `source`"),
        ({"domain": ""}, "domain is empty"),
        ({"turns": []}, "conversation is empty"),
        ({"turns": [{"role": "system", "text": "x"}]}, "Invalid enum value 'system'"),
        ({"turns": [{"role": "human", "text": 5}]}, r"Expected `str`.*turns\[0\]\.text"),
        ({"turns": [{"role": "human"}]}, "missing required field `text`"),
        ({"turns": {"role": "human", "text": ""}}, "Expected `array`"),
        ({"meta": [["a", 1]]}, "Expected `object`"),
        ({"meta": {"a": float("nan")}}, "malformed"),
        ({"meta": {"a": float("inf")}}, "malformed"),
        ({"images": "png"}, "Expected `array`"),
        ({"images": ["png", "png"]}, "record names images"),
        ({"images": ["../png"]}, "record names images"),
        ({"regions": [{"kind": "point", "coords": [0.5, 1.5], "mark": 1}]}, r"must lie in \[0, 1\]"),
        ({"regions": [{"kind": "point", "coords": [0.5, "0.5"], "mark": 1}]}, "Expected `float`"),
        ({"regions": [{"kind": "point", "coords": [0.5, 0.5], "mark": 0}]}, "whole number from 1"),
        ({"regions": [{"kind": "point", "coords": [0.5, 0.5], "mark": True}]}, "Expected `int`"),
        ({"regions": [{"kind": "point", "coords": [0.5, 0.5], "mark": 1.5}]}, "Expected `int`"),
        ({"regions": [{"kind": "circle", "coords": [0.5, 0.5], "mark": 1}]}, "Invalid enum value 'circle'"),
        ({"regions": [{"kind": "box", "coords": [0.5, 0.5, 0.5, 0.6], "mark": 1}]}, "x0 < x1"),
        ({"regions": [{"kind": "box", "coords": [0.5, 0.5], "mark": 1}]}, "do not make a box"),
        ({"regions": [{"kind": "stroke", "coords": [], "mark": 1}]}, "do not make a stroke"),
    ],
)
def test_records_that_say_something_else_are_damage(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedSampleError, match=message) as caught:
        from_members("toys-00001", changed(**fields))
    assert str(caught.value).startswith("sample toys-00001: ") and "\n" not in str(caught.value)


def test_whole_numbers_are_coordinates_and_unknown_fields_are_left_alone() -> None:
    corners = [{"kind": "box", "coords": [0, 0, 1, 1], "mark": 1}]
    made = from_members("toys-00001", changed(regions=corners, note="of a later version"))
    assert made.regions == (Region("box", (0.0, 0.0, 1.0, 1.0), 1),)
    assert all(type(value) is float for value in made.regions[0].coords)


def test_regions_need_an_image() -> None:
    text_only = {"json": changed(images=[])["json"]}
    with pytest.raises(DamagedSampleError, match="2 regions but no image"):
        from_members("toys-00001", text_only)
    with pytest.raises(DamagedSampleError, match="2 regions but no image"):
        from_parts("toys-00001", text_only["json"], "", None)


def test_the_short_way_reads_and_refuses_as_the_general_one() -> None:
    text, image = members()["json"], members()["png"]
    assert from_parts("toys-00001", text, "png", image) == GOOD
    for extension, data, reason in (
        ("jpg", image, Reason.STRUCTURE),
        ("png", memoryview(JPEG), Reason.STRUCTURE),
        ("", None, Reason.STRUCTURE),
    ):
        with pytest.raises(DamagedSampleError) as caught:
            from_parts("toys-00001", text, extension, data)
        assert caught.value.reason is reason
    with pytest.raises(DamagedSampleError, match="not a sample") as caught:
        from_parts("toys-00001", memoryview(b"{"), "png", image)
    assert caught.value.reason is Reason.RECORD
    for start, extension in ((JPEG, "jpg"), (WEBP, "webp")):
        made = replace(GOOD, images=(start,))
        assert from_parts("toys-00001", members(made)["json"], extension, memoryview(start)) == made


def test_the_kind_of_an_image_is_in_its_first_bytes() -> None:
    kinds = [image_kind(data) for data in (JPEG, picture(0), WEBP, b"GIF89a", b"", b"RIFF1234WAVE")]
    assert kinds == ["jpg", "png", "webp", None, None, None]


def test_what_json_can_say_but_no_reader_takes_is_not_written() -> None:
    for meta in ({"a": 10**5000}, {"a": "\ud800"}, {"a": {1, 2}}, {"a": float("inf")}):
        with pytest.raises(SampleError, match="not plain JSON"):
            to_members(replace(GOOD, meta=meta))
    nested: dict[str, Any] = {}
    for _ in range(20_000):
        nested = {"a": nested}
    with pytest.raises(SampleError, match="not plain JSON"):
        to_members(replace(GOOD, meta=nested))
    with pytest.raises(SampleError, match="more than"):
        to_members(replace(GOOD, meta={"a": "x" * (1 << 24)}))


fraction = st.floats(0.0, 1.0)
text = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
turns = st.lists(st.builds(Turn, st.sampled_from(["human", "assistant"]), text), min_size=1, max_size=4).map(tuple)
regions = st.lists(
    st.builds(Region, st.just("point"), st.tuples(fraction, fraction), st.integers(1, 2**40))
    | st.builds(
        Region,
        st.just("stroke"),
        st.lists(st.tuples(fraction, fraction), min_size=1).map(lambda p: sum(p, ())),
        st.just(1),
    ),
    max_size=3,
).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Sample,
        key=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_/=+,@-]{0,79}", fullmatch=True),
        source=text.filter(bool),
        domain=text.filter(bool),
        turns=turns,
        images=st.lists(st.sampled_from([JPEG, WEBP, picture(1)]), min_size=1, max_size=3).map(tuple),
        regions=regions,
        meta=st.dictionaries(text, json_values, max_size=3),
    )
)
def test_every_sample_that_can_be_written_comes_back_equal(made: Sample) -> None:
    assert from_members(made.key, members(made)) == made
