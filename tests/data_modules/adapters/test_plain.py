"""Our own format drops nothing, and takes nothing that no model could be trained on."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestiary.schema import Region, SampleError, Turn
from data_modules.adapters import RejectedRecordError, Rejection, plain
from data_modules.records import to_members
from tests.data_modules.adapters.making import adapted, adapter, only, picture, put, put_json, stored
from tests.data_modules.adapters.test_refusals import ANY, places

TURNS = [{"role": "human", "text": "What is <Mark 1>?"}, {"role": "assistant", "text": "A cat."}]
BOX = {"kind": "box", "coords": [0, 0.25, 0.5, 1], "mark": 1}
POINT = {"kind": "point", "coords": [0.5, 0.5], "mark": 2}
GOOD: dict[str, Any] = {
    "id": "a1",
    "images": ["a.png"],
    "domain": "chart",
    "turns": TURNS,
    "regions": [BOX],
    "meta": {"task": "label"},
}


def _said(*texts: Any) -> dict[str, Any]:
    return {"turns": [{"role": ("human", "assistant")[n % 2], "text": text} for n, text in enumerate(texts)]}


def _marks(*marks: Any) -> dict[str, Any]:
    return {"regions": [BOX | {"mark": mark} for mark in marks]}


def _coords(coords: Any, kind: str = "box") -> dict[str, Any]:
    return {"regions": [BOX | {"kind": kind, "coords": coords}]}


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"image": "b.png"},
        "has the unknown fields ['image']; a plain record may have turns, id, images, domain, regions, meta; put the",
    ),
    ({"region": BOX, "x": 1}, "has the unknown fields ['region', 'x']; a plain record may have"),
    ({"turns": [TURNS[0], TURNS[1] | {"weight": 0}]}, "turn 2 has the unknown fields ['weight']; a turn may have role"),
    ({"regions": [BOX | {"label": "cat"}]}, "region 1 has the unknown fields ['label']; a region may have kind, coord"),
    ({"images": "a.png"}, "images is 'a.png'; it must be a list, write [...]"),
    ({"images": None}, "images is None; it must be a list"),
    ({"images": {"a.png": 1}}, "images is {'a.png': 1}; it must be a list"),
    ({"images": [5]}, "image name 5 is not text"),
    ({"images": ["b.png"]}, "image 'b.png' cannot be read from"),
    ({"regions": None}, "regions is None; it must be a list"),
    ({"meta": None}, "meta is None; it must be an object"),
    ({"meta": [1]}, "meta is [1]; it must be an object"),
    ({"meta": {"id": "a2"}}, "has the id 'a1' but another in meta, 'a2'; rename that of meta"),
    ({"domain": ["chart"]}, "domain is ['chart']; it must be text"),
    ({"turns": "What?"}, "turns is 'What?'; it must be a list"),
    ({"turns": ["What?", "It."]}, "turn 1 is 'What?'; a turn is an object of role, text"),
    ({"turns": [TURNS[0], {"role": "assistant"}]}, "turn 2 has no text; a turn needs role, text"),
    ({"turns": []}, "conversation is empty; a sample needs at least one turn"),
    ({"turns": [{"role": "system", "text": "x"}, *TURNS]}, "turn 1 has role 'system'; it must be human or assistant"),
    (_said("<Mark 1>?", 7), "text of turn 2 is 7; it must be text"),
    (_said("<Mark 1>?", " \n"), "turn 2 (assistant) is empty: ' \\n'; fill it or give --option keep_empty=true"),
    (_said("", "So."), "turn 1 (human) is empty: ''"),
    (_said("<Mark 1>?"), "has no answer; add one or give --option keep_empty=true"),
    (_said("<image><image> <Mark 1>?", "So."), "speaks of 2 <image> but names 1 pictures; make them as many"),
    ({"images": [], "regions": [], **_said("<image>?", "So.")}, "speaks of 1 <image> but names 0 pictures"),
    ({"images": ["a.png", "a.png"], **_said("<image>?", "So.")}, "speaks of 1 <image> but names 2 pictures"),
    (_said("<Mark 3>?", "So."), "the question speaks of '<Mark 3>' but there are 1 marks; add it or reword"),
    ({"regions": []}, "the question speaks of '<Mark 1>' but there are 0 marks"),
    (_marks(1, 1), "regions have the marks [1, 1]; number them 1 to 2, each once"),
    (_marks(1, 3), "regions have the marks [1, 3]; number them 1 to 2, each once"),
    (_marks(0), "regions have the marks [0]; number them 1 to 1, each once"),
    (_marks(True), "regions have the marks [True]; number them"),
    (_marks(1.0), "regions have the marks [1.0]; number them"),
    (_marks(1, "2"), "regions have the marks [1, '2']; number them"),
    ({"regions": ["cat"]}, "region 1 is 'cat'; a region is an object of kind, coords, mark"),
    (
        {"regions": [BOX, {"kind": "point", "coords": [0, 0]}]},
        "region 2 has no mark; a region needs kind, coords, mark",
    ),
    (_coords([0, 1], "circle"), "region 1 has kind 'circle'; it must be point, box or stroke"),
    (_coords("01", "point"), "coords of region 1 (point) is '01'; it must be 2 finite numbers"),
    (_coords([True, False], "point"), "coords of region 1 (point) is [True, False]; it must be 2 finite numbers"),
    (_coords([0, 0, 1]), "coords of region 1 (box) is [0, 0, 1]; it must be 4 finite numbers"),
    (_coords(["0", 0, 1, 1]), "it must be 4 finite numbers"),
    (_coords(None, "stroke"), "coords of region 1 (stroke) is None; it must be 4 finite numbers"),
    (_coords([0, 0], "stroke"), "it must be 4 finite numbers"),
    (_coords([0, 0, 1, 1, 0.5], "stroke"), "it must be 6 finite numbers"),
    (_coords([0, 1, 0, 1], "stroke"), "region 1 (stroke) has no length; make it a point"),
]


@pytest.mark.parametrize("change, told", BAD)
def test_a_bad_record_is_one_line_between_two_good_ones(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    root = put(tmp_path / "root", a_png=picture())
    samples, (line,) = adapted(adapter("plain", put_json(tmp_path / "p.json", [GOOD, GOOD | change, GOOD]), root))
    assert [sample.key for sample in samples] == ["s-00000000", "s-00000002"]
    assert line.startswith("p.json record 1: ") and told in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize("bad", [[1, 2], "text", None, 7])
def test_a_record_that_is_no_object_says_so(tmp_path: Path, bad: Any) -> None:
    _, (first, second) = adapted(adapter("plain", put_json(tmp_path / "p.json", [bad, {"id": "a"}])))
    assert first == (
        f"p.json record 0: is {bad!r}; a plain record is an object of turns, id, images, domain, regions, meta"
    )
    assert second == "p.json record 1: has no turns; a plain record needs turns"


def test_a_record_comes_back_whole_from_its_shard(tmp_path: Path) -> None:
    root = put(tmp_path / "root", a_png=picture(), b_png=picture(3, 3))
    stroke = {"kind": "stroke", "coords": [0, 0, 1, 1, 0.5, 0], "mark": 3}
    two = GOOD | {"images": ["a.png", "b.png"], "regions": [POINT, BOX, stroke]}
    two |= _said("<image><image> <Mark 3>?", "So.") | {"meta": {"id": "a1"}}
    bare = _said("How?", "So.")
    samples, lines = adapted(adapter("plain", put_json(tmp_path / "p.json", [GOOD, two, bare]), root))
    assert not lines and stored(tmp_path / "shards", samples) == samples
    first, second, third = samples
    assert first.turns == (Turn("human", "What is <Mark 1>?"), Turn("assistant", "A cat."))
    assert (first.domain, first.images, first.meta) == ("chart", (picture(),), {"task": "label", "id": "a1"})
    assert first.regions == (Region("box", (0.0, 0.25, 0.5, 1.0), 1),)
    assert [region.mark for region in second.regions] == [2, 1, 3] and second.meta == {"id": "a1"}
    assert (third.domain, third.images, third.regions, third.meta) == ("natural", (), (), {})


def test_empty_words_are_accepted_only_when_asked(tmp_path: Path) -> None:
    records = [_said("", "A caption."), _said("What?", ""), _said("Only asked.")]
    path = put_json(tmp_path / "p.json", records)
    assert len(adapted(adapter("plain", path))[1]) == 3
    samples, lines = adapted(adapter("plain", path, keep_empty=True))
    assert not lines and samples[0].turns == (Turn("human", ""), Turn("assistant", "A caption."))
    assert adapter("plain", path).identity() != adapter("plain", path, keep_empty=True).identity()


def test_ids_are_keys_when_asked(tmp_path: Path) -> None:
    path = put_json(tmp_path / "p.json", [_said("How?", "So.") | {"id": 7}])
    sample = only(adapter("plain", path, id_key=True))
    assert sample.key == "7" and sample.meta == {"id": 7}
    path = put_json(tmp_path / "p.json", [_said("How?", "So."), _said("How?", "So.") | {"id": None}])
    _, (missing, null) = adapted(adapter("plain", path, id_key=True))
    assert missing.endswith("has no id; give it one or leave out --option id_key=true")
    assert null.endswith("id is None; it must be text")


def test_the_example_shows_what_is_allowed() -> None:
    path = Path(__file__).parents[3] / "data_modules" / "writing" / "example.jsonl"
    samples, lines = adapted(adapter("plain", path, path.parents[1] / "embedded" / "assets"))
    assert len(lines) == 1 and "photo-that-does-not-exist.jpg" in lines[0]
    assert len(samples) == len(path.read_text().splitlines()) - 1
    (documented,) = [text for text in (plain.__doc__ or "").split("\n\n") if '"turns"' in text]
    assert json.loads(documented).keys() == GOOD.keys()


def test_kinds_of_rejections_are_those_of_other_formats(tmp_path: Path) -> None:
    root = put(tmp_path / "root", a_png=picture())
    for change, kind in (
        ({"image": 1}, Rejection.RECORD),
        ({"turns": []}, Rejection.SAMPLE),
        (_said("<Mark 3>?", "So."), Rejection.REGION),
        (_marks(2), Rejection.REGION),
        ({"images": ["b.png"]}, Rejection.MISSING_IMAGE),
    ):
        made = adapter("plain", put_json(tmp_path / "p.json", [GOOD | change]), root)
        with pytest.raises(RejectedRecordError) as caught:
            made.to_sample(next(made.records()))
        assert caught.value.kind is kind


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_gives_a_sample_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    root = put(tmp_path / "root", a_png=picture())
    record = copy.deepcopy(GOOD)
    path = data.draw(st.sampled_from(list(places(record))))
    holder: Any = record
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = data.draw(ANY)
    samples, lines = adapted(adapter("plain", put_json(tmp_path / "p.json", [record]), root))
    assert len(samples) + len(lines) == 1 and "\n" not in "".join(lines)
    with suppress(SampleError):  # a mark outside its picture, an empty domain
        for sample in samples:
            to_members(sample)
