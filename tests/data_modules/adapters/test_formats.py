"""What each format's options do, what stays in meta, and what its lists of files may say."""

from __future__ import annotations

import inspect
import json
import pickle
import random
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bestiary.schema import Region, Turn
from bestiary.variants.monkey.tags import check_places
from data_modules.adapters import FORMATS, Adapter
from data_modules.adapters.boxes import Frame, box_fractions
from data_modules.adapters.fields import FIELD_BYTES, Fields
from tests.data_modules.adapters.making import adapted, adapter, only, picture, problem, put, put_json
from tests.data_modules.adapters.test_refusals import ASKED, GOOD, TALK

OWN = sorted(set(FORMATS) - {"plain"})


def _talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


def _made(name: str, folder: Path) -> Adapter:
    """An adapter of any format over one good record."""
    root = put(folder / "root", a_png=picture())
    if name == "ovis":
        put_json(folder / "talks.json", [GOOD["llava"] | {"image": ["a.png"]}])
        talks = {"meta_file": "talks.json", "image_dir": "root", "data_format": "conversation"}
        return adapter(name, put_json(folder / "info.json", {"talks": talks}))
    if name == "mdvp_bench":
        task = put(folder / "natural_QA" / "images", a_png=picture()).parent
        put_json(task / "natural_QA_point.json", [{"image_name": "a.png", "points": [[1, 2]], **ASKED}])
        return adapter(name, folder)
    return adapter(name, put_json(folder / "some.json", [GOOD[name]]), root)


@pytest.mark.parametrize("name", OWN)
def test_adapters_and_records_travel_to_other_processes(tmp_path: Path, name: str) -> None:
    made = _made(name, tmp_path)
    sample = only(made)
    (record,) = pickle.loads(pickle.dumps(list(made.records())))
    assert pickle.loads(pickle.dumps(made)).to_sample(record) == sample
    assert sample.source == "s" and sample.domain == "natural" and len(sample.images) == 1


@pytest.mark.parametrize("name", OWN)
def test_identity_is_json_and_changes_with_options_and_files(tmp_path: Path, name: str) -> None:
    made = _made(name, tmp_path / "first")
    first = made.identity()
    assert json.loads(json.dumps(first)) == first == made.identity() and first["format"] == name
    assert first != _made(name, tmp_path / "second").identity()
    made.domain = "chart"  # type: ignore[attr-defined]
    assert made.identity() != first


@pytest.mark.parametrize("name", OWN)
def test_constructing_reads_no_file_and_every_option_has_a_default_and_a_plain_type(name: str, tmp_path: Path) -> None:
    options = {"without_images": True} if name == "benchmark" else {}
    made = adapter(name, tmp_path / "not-there", **options)
    with pytest.raises((ValueError, OSError), match="not-there"):
        list(made.records())
    parameters = inspect.signature(type(made)).parameters
    types = get_type_hints(type(made))
    for option in set(parameters) - {"annotations", "images", "source"}:
        assert parameters[option].default is not inspect.Parameter.empty
        assert types[option] in (str, int, float, bool, str | None)


def test_fields_nobody_read_stay_in_meta_and_large_ones_are_named() -> None:
    fields = Fields({"id": 3, "size": [1], "mask": "x" * FIELD_BYTES, "taken": 1, "bytes": b"", "n": [0.5]}, "w")
    fields.take("taken")
    assert fields.meta(size=[9, 9], nothing=None) == {
        "size": [9, 9],
        "id": 3,
        "record_size": [1],
        "n": [0.5],
        "left_out": {"mask": f"{FIELD_BYTES + 2} bytes", "bytes": "bytes"},
    }


def test_system_messages_are_kept_or_put_in_front_as_asked(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "system", "value": "Be short."}, *_talk("Who?", "He.")]}
    path = put_json(tmp_path / "l.json", [record])
    kept = only(adapter("llava", path, system="meta"))
    assert kept.meta == {"system": "Be short."} and kept.turns[0] == Turn("human", "Who?")
    joined = only(adapter("llava", path, system="prepend"))
    assert joined.meta == {} and joined.turns == (Turn("human", "Be short.\n\nWho?"), Turn("assistant", "He."))
    with pytest.raises(ValueError, match=r"system='keep' is unknown; choose one of reject, meta, prepend"):
        adapter("llava", path, system="keep")


def test_other_fields_of_messages_are_kept(tmp_path: Path) -> None:
    talk = _talk("Who?", "He.")
    path = put_json(tmp_path / "l.json", [{"conversations": [talk[0], talk[1] | {"weight": 0}]}])
    assert only(adapter("llava", path)).meta == {"turn_fields": [{}, {"weight": 0}]}


def test_a_sample_with_pictures_needs_a_domain_and_one_without_is_text(tmp_path: Path) -> None:
    root = put(tmp_path, a_png=picture())
    path = put_json(tmp_path / "l.json", [{"conversations": TALK}, {"image": "a.png", "conversations": TALK}])
    (sample,), (line,) = adapted(adapter("llava", path, root, domain=None))
    assert sample.domain == "text" and "give one with --domain" in line
    (sample,), _ = adapted(adapter("llava", path, root, domain=None, text_domain="chat"))
    assert sample.domain == "chat"


# Marks


def test_marks_are_clipped_and_widened_only_when_asked_and_keep_their_numbers(tmp_path: Path) -> None:
    root = put(tmp_path, a_png=picture(8, 4))
    boxes = [[-2, 1, 4, 1], [8, 4, 0, 0], [2, 1, 2, 1]]
    record = {"image": "a.png", "conversations": TALK, "bbox": boxes}
    path = put_json(tmp_path / "m.json", [record, record | {"bbox": None, "points": [[9, -1]]}])
    samples, lines = adapted(adapter("mdvp", path, root, clip=True, widen=True))
    assert not lines
    assert samples[0].regions == (
        Region("box", (0.0, 0.25, 0.25, 0.5), 1),
        Region("box", (0.875, 0.75, 1.0, 1.0), 2),
        Region("box", (0.25, 0.25, 0.5, 0.5), 3),
    )
    assert samples[0].meta["bbox"] == boxes and samples[1].meta["points"] == [[9, -1]]
    assert samples[1].regions == (Region("point", (1.0, 0.0), 1),)
    clipped, lines = adapted(adapter("mdvp", path, root, clip=True))
    assert len(clipped) == 1 and "box 2 [8, 4, 0, 0] has no area" in lines[0]


def test_rounding_at_the_border_is_no_mistake() -> None:
    box = box_fractions((0.1, -1e-7, 639.9 + 1e-10, 5.0), Frame(640, 5), "box", "w")
    assert box == (0.1 / 640, 0.0, 1.0, pytest.approx(1.0)) and max(box) <= 1


def test_unmarked_records_and_points_before_boxes(tmp_path: Path) -> None:
    root = put(tmp_path, a_png=picture(8, 4))
    path = put_json(
        tmp_path / "m.json",
        [
            {"image": "a.png", "conversations": TALK, "points": []},
            {"image": "a.png", "conversations": TALK, "points": [[4, 1]], "bbox": [[0, 0, 1, 1]]},
        ],
    )
    unmarked, both = adapted(adapter("mdvp", path, root, allow_unmarked=True))[0]
    assert unmarked.regions == () and unmarked.meta["points"] == []
    assert both.regions == (Region("point", (0.5, 0.25), 1),) and both.meta["bbox"] == [[0, 0, 1, 1]]


# Lists of files


def test_a_meta_yaml_lists_files_with_their_root_type_and_reading(tmp_path: Path) -> None:
    put(tmp_path / "pictures" / "coco", a_png=picture())
    put_json(tmp_path / "ann" / "talks.json", [{"image": "a.png", "conversations": TALK}])
    put_json(tmp_path / "ann" / "captions.json", [{"url": "coco/a.png", "caption": ["one", "two"]}] * 3)
    (tmp_path / "ann" / "tasks.csv").write_text("instruction\tinput\toutput\textra\nAdd.\t1+1\t2\tx\nbad\n")
    (tmp_path / "list.yaml").write_text(
        "META:\n"
        "  - {path: ann/talks.json, type: image_text, root: coco, preprocess: single_turn_llava}\n"
        "  - {path: ann/captions.json, type: caption, preprocess: caption, prompt_type: caption}\n"
        "  - {path: ann/tasks.csv, type: text, prompt_type: alpaca}\n"
    )
    made = adapter("sphinx", tmp_path / "list.yaml", tmp_path / "pictures")
    samples, lines = adapted(made)
    talk, first, second, third, task = samples
    assert talk.images == first.images == (picture(),)
    assert [s.turns[1].text for s in (first, second, third)] == ["one", "two", "one"] and first.turns[0].text == ""
    assert first.meta["caption"] == ["one", "two"] and first.meta["prompt_type"] == "caption"
    assert task.turns == (Turn("human", "Add."), Turn("assistant", "2")) and task.domain == "text"
    assert task.meta == {
        "type": "text",
        "prompt_type": "alpaca",
        "file": "ann/tasks.csv",
        "file_record": 0,
        "input": "1+1",
        "extra": "x",
    }
    assert len(lines) == 1 and lines[0].startswith("ann/tasks.csv line 3: has neither conversations nor instruction")
    assert [record.number for record in made.records()] == list(range(6))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.999, 1])
def test_ratio_takes_the_published_draw(tmp_path: Path, ratio: float) -> None:
    records = [{"id": number, "conversations": TALK} for number in range(137)]
    put_json(tmp_path / "a.json", records)
    (tmp_path / "list.yml").write_text(f"META: [{{path: a.json, type: text, ratio: {ratio}}}]")
    samples, _ = adapted(adapter("sphinx", tmp_path / "list.yml"))
    random.seed(0)
    drawn = random.sample(records, int(len(records) * ratio))
    assert [sample.meta["id"] for sample in samples] == sorted(record["id"] for record in drawn)


@pytest.mark.parametrize(
    "text, told",
    [
        ("META: []", "has no list META"),
        ("[1]", "has no list META"),
        ("META: [{path: a.json}]\nDATA: 1", "has META, DATA; only META has a meaning"),
        ("META: [{type: text}]", "has no path"),
        ("META: [{path: a.json, rot: x}]", "has rot; it may have path, preprocess, prompt_type, ratio, root, type"),
        ("META: [{path: a.json, root: [x]}]", "root of a.json is ['x']; it must be text"),
        ("META: [{path: a.json, ratio: 1.5}]", "ratio of a.json is 1.5; it must be above 0 and at most 1"),
        ("META: [{path: a.json, preprocess: magic}]", "preprocess of a.json is 'magic'; use single_turn_llava or"),
        ("META: !!python/object/apply:os.system ['true']", "cannot be read as yaml"),
        ("META: [", "cannot be read as yaml"),
        ("META: [{path: a.json}]", "a.json is not a file; correct the path"),
        (None, "list.yaml is not a file; correct the path of the list"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "list.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as caught:
        list(adapter("sphinx", path).records())
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry, told",
    [
        (3, "data set 'x' is 3; it must name its meta_file"),
        ({"meta_file": "a.json", "data_format": "chat"}, "has data_format 'chat'; use caption or conversation"),
        ({"meta_file": "a.json", "data_format": "conversation", "dir": 1}, "has dir; it may have meta_file"),
        ({"meta_file": "a.json", "data_format": "conversation", "image_dir": 1}, "image_dir and caption_template are"),
        (
            {"meta_file": "a.json", "data_format": "caption", "caption_template": "Say:"},
            "caption_template is 'Say:'; it must hold <image> once",
        ),
    ],
)
def test_a_wrong_data_set_of_ovis_is_one_line(tmp_path: Path, entry: Any, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        list(adapter("ovis", put_json(tmp_path / "info.json", {"x": entry})).records())
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_captions_of_ovis_follow_the_version_and_the_data_sets_own_template(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    put(tmp_path, a_png=picture())
    rows = {"caption": ["a <image> boat", None], "image_path": ["a.png", None], "image_url": ["u", None]}
    write_table(pyarrow.table(rows), tmp_path / "c.parquet")
    entry = {"meta_file": "c.parquet", "image_dir": ".", "data_format": "caption"}
    info = put_json(tmp_path / "info.json", {"x": entry})
    said = {}
    for version in ("1.0", "1.5"):
        for template in ("", "<image>'s caption: "):
            (sample,), (line,) = adapted(adapter("ovis", info, version=version, caption_template=template))
            said[version, template] = (sample.turns[0].text, sample.turns[1].text)
            assert sample.meta["image_url"] == "u" and "has image_path None" in line
    assert said == {
        ("1.0", ""): ("<image>", "a  boat"),
        ("1.0", "<image>'s caption: "): ("<image>'s caption: ", "a <image> boat"),
        ("1.5", ""): ("<image>", "a  boat"),
        ("1.5", "<image>'s caption: "): ("<image>'s caption: ", "a  boat"),
    }
    info = put_json(tmp_path / "info.json", {"x": entry | {"caption_template": "<image>\nText:\n"}})
    (sample,), _ = adapted(adapter("ovis", info, caption_template="<image>'s caption: "))
    assert sample.turns[0].text == "<image>\nText:\n"


# Tags


def test_tags_of_qwen_become_pictures_and_places(tmp_path: Path) -> None:
    root = put(tmp_path, a_png=picture(), b_png=picture(3, 3))
    question = "Picture 1: <img>a.png</img>\nPicture 2:<img>b.png</img>\nIs <box>(0,0),(500,1000)</box> it? "
    answer = (
        "<ref> a cat</ref><box>(100,200),(300,400)</box><box>(1, 2),(3,4)</box> and <box>(5,6),(7,8)</box>"
        "<quad>(0,0),(1000,0),(1000,10),(0,10)</quad>"
    )
    talk = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    sample = only(adapter("qwen_vl", put_json(tmp_path / "q.json", [{"id": 1, "conversations": talk}]), root))
    assert sample.images == (picture(), picture(3, 3)) and sample.regions == ()
    assert sample.turns == (
        Turn("human", "Picture 1: <image>\nPicture 2:<image>\nIs <box>(0,0),(500,1000)</box> it? "),
        Turn("assistant", answer.replace("(1, 2)", "(1,2)")),
    )
    assert sample.meta == {
        "id": 1,
        "image_paths": ["a.png", "b.png"],
        "boxes": [
            {"turn": 0, "box": [0.0, 0.0, 0.5, 1.0]},
            {"turn": 1, "box": [0.1, 0.2, 0.3, 0.4], "ref": "a cat"},
            {"turn": 1, "box": [0.001, 0.002, 0.003, 0.004], "ref": "a cat"},
            {"turn": 1, "box": [0.005, 0.006, 0.007, 0.008]},
        ],
        "quads": [{"turn": 1, "quad": [0.0, 0.0, 1.0, 0.0, 1.0, 0.01, 0.0, 0.01]}],
    }


def test_a_coordinate_beyond_the_scale_is_clipped_in_words_and_meta(tmp_path: Path) -> None:
    talk = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "1003: <box>(1,2),(1003,4)</box>"}]
    path = put_json(tmp_path / "q.json", [{"conversations": talk}])
    assert "beyond 1000" in problem(adapter("qwen_vl", path))
    sample = only(adapter("qwen_vl", path, clip=True))
    assert sample.meta["boxes"][0]["box"] == [0.001, 0.002, 1.0, 0.004]
    assert sample.turns[1].text == "1003: <box>(1,2),(1000,4)</box>"


@pytest.mark.parametrize(
    "written",
    [
        "(10, 20),(100, 400)",
        " ( 10,20 ),\n(100,400)\n",
        " ( 10 , 20 ) , (100,400) ",
        "(10,20)\n,(100,400)",
        "(010,20),(100,0400)",
    ],
)
def test_a_box_is_written_as_the_model_reads_it(tmp_path: Path, written: str) -> None:
    talk = [{"from": "user", "value": "a (1, 2) b "}, {"from": "assistant", "value": f"at <box>{written}</box>"}]
    path = put_json(tmp_path / "q.json", [{"conversations": talk}])
    sample = only(adapter("qwen_vl", path))
    assert [turn.text for turn in sample.turns] == ["a (1, 2) b ", "at <box>(10,20),(100,400)</box>"]
    check_places(sample.turns[1].text)


# Benchmarks


def test_pictures_of_benchmarks_are_given_or_left_out_by_name(tmp_path: Path) -> None:
    path = put_json(tmp_path / "some.json", [GOOD["benchmark"]])
    for images, without in ((None, False), (tmp_path, True)):
        with pytest.raises(ValueError, match="--option without_images=true"):
            adapter("benchmark", path, images, without_images=without)
    sample = only(adapter("benchmark", path, without_images=True))
    assert sample.images == () and sample.meta["image_path"] == "a.png"


def test_the_most_frequent_answer_speaks_and_all_are_kept(tmp_path: Path) -> None:
    answers = ["a", "b", "c", "b", 3, 3]
    path = put_json(tmp_path / "some.json", [GOOD["benchmark"] | {"gt_answers": answers}])
    sample = only(adapter("benchmark", path, without_images=True))
    assert sample.turns[1].text == "b" and sample.meta["gt_answers"] == answers


def test_mdvp_bench_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no effect on mdvp_bench"):
        adapter("mdvp_bench", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="give the folder of MDVP-Bench"):
        list(adapter("mdvp_bench", tmp_path).records())
    put_json(tmp_path / "sky_QA" / "sky_QA_box.json", [])
    with pytest.raises(ValueError, match="sky_QA begins with none of android"):
        list(adapter("mdvp_bench", tmp_path).records())
