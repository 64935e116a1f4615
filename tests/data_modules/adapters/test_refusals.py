"""Every refusal is one line that names file, record, value and remedy; nothing else of the file is touched by it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_modules.adapters import RejectedRecordError, Rejection
from data_modules.adapters.images import read_image
from data_modules.records import to_members
from tests.data_modules.adapters.making import adapted, adapter, picture, put, put_json

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
GROUNDED = [{"from": "user", "value": "<img>a.png</img> Where? "}, {"from": "assistant", "value": "There."}]
ASKED = {"question": "Who?", "gt_answers": "He."}
GOOD: dict[str, dict[str, Any]] = {
    "llava": {"id": "1", "image": "a.png", "conversations": TALK},
    "sphinx": {"image": "a.png", "conversations": TALK},
    "mdvp": {"image": "a.png", "conversations": TALK, "points": [[1, 2]]},
    "qwen_vl": {"conversations": GROUNDED},
    "benchmark": {"image_path": "a.png", "question_id": "height6_width8", **ASKED},
}


def _said(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": words} for speaker, words in messages]}


def _question(words: str, answer: str = "So.") -> dict[str, Any]:
    return _said(("user", words), ("assistant", answer))


IN_ANY = [
    ([1, 2], "is [1, 2], not an object of fields"),
    ("text", "is 'text', not an object of fields"),
    (None, "is None, not an object of fields"),
]
BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, change, told)
        for name in ("llava", "sphinx", "mdvp", "qwen_vl")
        for change, told in (
            ({"conversations": None}, "conversations is None; it must be a list of messages"),
            ({"conversations": []}, "conversations is []"),
            ({"conversations": "hello"}, "conversations is 'hello'"),
            ({"conversations": [["human", "hi"]]}, "message 1 is ['human', 'hi']; it must have the fields"),
            (_said((3, "hi")), "message 1 is by 3; name human"),
            (_said(("narrator", "hi")), "message 1 is by 'narrator'; speakers are human, user, gpt, assistant"),
            (_said(("system", "S"), ("human", "q"), ("gpt", "a")), "by the system; give --option system=meta"),
            (_said(("human", "q"), ("system", "S"), ("gpt", "a")), "message 2 is by the system; only the first"),
            (_said(("human", "q"), ("gpt", None)), "message 2 is None; it must be text"),
            (_said(("human", "q"), ("gpt", True)), "message 2 is True; it must be text"),
            (_said(("human", "q"), ("gpt", ["a"])), "message 2 is ['a']; it must be text"),
            (_said(("human", "q"), ("gpt", " \n")), "turn 2 (assistant) is empty: ' \\n'; fill it or give"),
            (_said(("human", "q")), "has no answer; add one or give --option keep_empty=true"),
        )
    ),
    *(
        (name, {"image": found}, told)
        for name in ("llava", "sphinx", "mdvp")
        for found, told in (
            (5, "image name 5 is not text"),
            ({"path": "a.png"}, "image name {'path': 'a.png'} is not text"),
            ("b.png", "image 'b.png' cannot be read from"),
            ("../a.png", "image name '../a.png' leaves the image folder"),
            ("/etc/hostname", "image name '/etc/hostname' leaves the image folder"),
            ("http://host/a.png", "'http://host/a.png' is an address; download it"),
            ("s3://bucket/a.png", "is an address; download it"),
            ("a\0.png", "is not text"),
            ("\udc80.png", "is not JSON"),
            ("x" * 300, "cannot be read from"),
        )
    ),
    ("llava", {"image": ["a.png", ""]}, "image name '' is not text"),
    ("llava", {"image": None, **_said(("human", "<image>?"), ("gpt", "a"))}, "1 <image> but names 0 pictures"),
    ("llava", _said(("human", "<image><image>?"), ("gpt", "a")), "2 <image> but names 1 pictures"),
    ("llava", {"image": None, "images": ["a.png"]}, "has images ['a.png'] but no image; name its pictures in"),
    ("llava", {"image": [], "video": "a.mp4"}, "has video 'a.mp4' but no image; name its pictures in"),
    ("sphinx", {"image": "", **_said(("human", "<image>?"), ("gpt", "a"))}, "speaks of an <image> but names no"),
    ("mdvp", {"image": None}, "has image None; marks lie on one picture"),
    ("mdvp", {"points": None}, "has neither points nor bbox; give --option allow_unmarked=true"),
    ("mdvp", {"points": 3}, "points is 3; it must be a list"),
    ("mdvp", {"points": [3]}, "point 1 is 3; it must be 2 finite numbers"),
    ("mdvp", {"points": [[1, 2], [1, 2, 3]]}, "point 2 is [1, 2, 3]; it must be 2 finite numbers"),
    ("mdvp", {"points": [["1", 2]]}, "point 1 is ['1', 2]"),
    ("mdvp", {"points": [[True, 2]]}, "point 1 is [True, 2]"),
    ("mdvp", {"points": [[10**400, 2]]}, "; it must be 2 finite numbers"),
    ("mdvp", {"points": [[9, 2]]}, "point 1 [9, 2] leaves its picture of 8x6 pixels; correct it or give --option clip"),
    ("mdvp", {"points": [[1, -0.5]]}, "point 1 [1, -0.5] leaves its picture"),
    ("mdvp", {"points": [], "bbox": [[1, 1, 2, 2], [1, 1, 0, 2]]}, "box 2 [1, 1, 0, 2] has no area"),
    ("mdvp", {"points": None, "bbox": [[5, 1, 9, 2]]}, "box 1 [5, 1, 9, 2] leaves its picture"),
    ("mdvp", {"points": None, "bbox": [[9, 1, 1, 2]]}, "box 1 [9, 1, 1, 2] lies wholly outside"),
    ("mdvp", {"points": None, "bbox": [[5, 1, -2, 2]]}, "box 1 [5, 1, -2, 2] has a negative size"),
    ("mdvp", _said(("human", "<Mark 2>?"), ("gpt", "a")), "speaks of '<Mark 2>' but there are 1 marks"),
    ("qwen_vl", _question("<img>a.png here"), "<img> is not closed in '<img>a.png here'; add </img>"),
    ("qwen_vl", _question("</img> stray"), "</img> closes nothing in '</img> stray'"),
    ("qwen_vl", _question("<ref>a<box>(1,2),(3,4)</box></ref>"), "<ref> is followed by <box>"),
    ("qwen_vl", _question("<ref>a</box>"), "<ref> is followed by </box>"),
    ("qwen_vl", _question("<img>b.png</img>"), "image 'b.png' cannot be read"),
    ("qwen_vl", _question("<img></img>"), "image name '' is not text"),
    ("qwen_vl", _question("<img>http://h/b.png</img>"), "is an address; download it"),
    ("qwen_vl", _question("an <image>?"), "says <image> by itself"),
    ("qwen_vl", _question("q", "<img>a.png</img>"), "an answer shows the picture 'a.png'"),
    ("qwen_vl", _question("q", "<box>(1,2),(3,4),(5,6)</box>"), "must be 2 corners (x,y)"),
    ("qwen_vl", _question("q", "<box>(1,2)(3,4)</box>"), "must be 2 corners (x,y)"),
    ("qwen_vl", _question("q", "<box>(1,2)),(3,4)</box>"), "must be 2 corners (x,y)"),
    ("qwen_vl", _question("q", "<box>(1,2,(3,4)</box>"), "must be 2 corners (x,y)"),
    ("qwen_vl", _question("q", "<box>(1,2.5),(3,4)</box>"), "must be 2 corners (x,y) of whole numbers"),
    ("qwen_vl", _question("q", "<box></box>"), "must be 2 corners (x,y)"),
    ("qwen_vl", _question("q", "<quad>(1,2),(3,4)</quad>"), "must be 4 corners (x,y)"),
    ("qwen_vl", _question("q", "<box>(1,2),(3,1001)</box>"), "<box>(1,2),(3,1001)</box> goes beyond 1000"),
    ("qwen_vl", _question("q", "<box>(5,2),(3,4)</box>"), "has its corners the wrong way round"),
    (
        "qwen_vl",
        _said(("assistant", "A."), ("user", "q"), ("gpt", "a")),
        "begins with the answer 'A.'; put its question",
    ),
    ("benchmark", {"image_path": None}, "field 'image_path' is None; it must be text"),
    ("benchmark", {"image_path": "b.png"}, "image 'b.png' cannot be read from"),
    ("benchmark", {"question": ""}, "turn 1 (human) is empty: ''"),
    ("benchmark", {"gt_answers": ""}, "turn 2 (assistant) is empty: ''"),
    ("benchmark", {"gt_answers": []}, "turn 2 (assistant) is empty: ''"),
    ("benchmark", {"gt_answers": None}, "field 'gt_answers' is None; it must be text"),
    ("benchmark", {"gt_answers": ["a", 3, None]}, "an answer of 'gt_answers' is None"),
    ("benchmark", {"gt_answers": [1, 2, 3]}, "gt_answers is [1, 2, 3]; it must be 4 finite numbers"),
    ("benchmark", {"gt_answers": [1, 2, 3, 7]}, "gt_answers [1, 2, 3, 7] leaves its picture of 8x6"),
    ("benchmark", {"gt_answers": [3, 2, 1, 4]}, "gt_answers [3, 2, 1, 4] has a negative size"),
    ("benchmark", {"gt_answers": [1, 2, 3, 4], "question_id": 7}, "has a box but question_id 7; it must be height"),
]


@pytest.mark.parametrize("name, change, told", BAD)
def test_a_bad_record_is_one_line_between_two_good_ones(
    tmp_path: Path, name: str, change: dict[str, Any], told: str
) -> None:
    root = put(tmp_path / "root", a_png=picture())
    good = GOOD[name]
    path = put_json(tmp_path / "some.json", [good, good | change, good])
    samples, (line,) = adapted(adapter(name, path, root))
    assert [sample.key for sample in samples] == ["s-00000000", "s-00000002"]
    assert line.startswith("some.json record 1: ") and told in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("bad, told", IN_ANY)
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, name: str, bad: Any, told: str) -> None:
    root = put(tmp_path / "root", a_png=picture())
    path = put_json(tmp_path / "some.json", [bad, GOOD[name], {}])
    samples, lines = adapted(adapter(name, path, root))
    assert len(samples) == 1 and lines[0] == f"some.json record 0: {told}"
    assert lines[1].startswith("some.json record 2: ")


@pytest.mark.parametrize(
    "data, told, kind",
    [
        (b"", "'a.png' is empty", Rejection.NOT_AN_IMAGE),
        (b"GIF89a\x01\x00\x01\x00", "starts with b'GIF89a", Rejection.NOT_AN_IMAGE),
        (b"<svg/>", "starts with b'<svg/>'", Rejection.NOT_AN_IMAGE),
        (picture()[:20], "starts with b'\\x89PNG", Rejection.NOT_AN_IMAGE),
        (picture() + bytes(500), "bytes, more than 500; shrink it", Rejection.LARGE_IMAGE),
    ],
)
def test_files_that_are_no_usable_picture_are_refused(tmp_path: Path, data: bytes, told: str, kind: Rejection) -> None:
    root = put(tmp_path, a_png=data)
    with pytest.raises(RejectedRecordError) as caught:
        read_image(root, "a.png", "some.json record 3", max_bytes=500)
    assert str(caught.value).startswith("some.json record 3: image") and told in str(caught.value)
    assert caught.value.kind is kind and "\n" not in str(caught.value)


def test_pipes_and_folders_are_no_pictures_but_links_that_stand_in_the_folder_are_followed(tmp_path: Path) -> None:
    root = put(tmp_path / "root", a_png=picture())
    put(tmp_path / "elsewhere", b_png=picture(3, 4))
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(RejectedRecordError, match="is not a regular file"):
            read_image(root, name, "w")
    assert read_image(root, "linked/b.png", "w") == picture(3, 4)
    assert read_image(root, str(root / "a.png"), "w") == read_image(root, "./a.png", "w") == picture()
    with pytest.raises(RejectedRecordError, match="leaves the image folder"):
        read_image(root, "linked/../../root/a.png", "w")


def test_a_folder_may_be_spelled_otherwise_than_absolute_names_spell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(tmp_path / "real" / "im", a_png=picture())
    put(tmp_path / "im", a_png=picture(3, 4))
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "deep").symlink_to(root.parent)
    monkeypatch.chdir(tmp_path / "real")
    named = str(root / "a.png")
    for spelled in (root, "im", "./im", "../real/im", f"{tmp_path}/real/../real/im", f"{tmp_path}/link", "../link"):
        assert read_image(Path(spelled), named, "w") == picture()
        for outside in (tmp_path / "im" / "a.png", "/etc/hostname", root.with_name("im2") / "a.png"):
            with pytest.raises(RejectedRecordError, match="leaves the image folder"):
                read_image(Path(spelled), str(outside), "w")
    assert read_image(Path("../link"), f"{tmp_path}/link/a.png", "w") == picture()
    # Behind a link, `..` is the folder above the link's target.
    turned = tmp_path / "deep" / ".." / "real" / "im"
    assert read_image(turned, named, "w") == picture()
    with pytest.raises(RejectedRecordError, match="leaves the image folder"):
        read_image(tmp_path / "link" / ".." / "im", str(tmp_path / "im" / "a.png"), "w")


def test_every_flipped_header_is_read_or_refused(tmp_path: Path) -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        whole = picture(form=form)
        for at in range(0, min(len(whole), 120)):
            root = put(tmp_path, a_png=whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                read_image(root, "a.png", "w")
            except RejectedRecordError as error:
                assert error.kind is Rejection.NOT_AN_IMAGE


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400)
ANY = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a record."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, found in inner:
        yield from places(found, (*path, name))


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_gives_a_writable_sample_or_a_refusal(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    root = put(tmp_path / "root", a_png=picture())
    record = copy.deepcopy(GOOD[name]) | {"extra": 1}
    path = data.draw(st.sampled_from(list(places(record))))
    holder: Any = record
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = data.draw(ANY)
    options = {"keep_empty": data.draw(st.booleans())}
    if name == "mdvp":
        options |= {"clip": data.draw(st.booleans()), "widen": data.draw(st.booleans())}
    samples, lines = adapted(adapter(name, put_json(tmp_path / "some.json", [record]), root, **options))
    assert len(samples) + len(lines) == 1 and "\n" not in "".join(lines)
    for sample in samples:
        to_members(sample)


def test_a_table_with_bytes_that_are_no_utf_8_loses_the_row(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_bytes(b"instruction\toutput\tmore\nsay\t\xff\tx\nsay\tso\t\xff\n")
    (sample,), (line,) = adapted(adapter("sphinx", path))
    assert "some.csv line 2: field 'output' is '\\udcff'; it holds bytes that are no UTF-8" in line
    assert sample.meta == {"left_out": {"more": "str"}}


def test_a_row_that_an_open_quote_prolongs_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text('instruction\toutput\nsay\tso\n"say\tmore\nsay "it"\tnow\nsay\tthat\n')
    samples, (line,) = adapted(adapter("sphinx", path))
    assert [sample.turns[1].text for sample in samples] == ["so", "that"]
    assert line == "some.csv line 4: is 2 lines that an open quote made one row; close the quote or take it out"
