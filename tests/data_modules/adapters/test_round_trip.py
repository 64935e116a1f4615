"""All seven formats on real files and on the published systems' own examples: nothing is lost on the way to a shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bestiary.schema import Sample, Turn
from tests.data_modules.adapters import inverses
from tests.data_modules.adapters.making import SHARED, adapted, adapter, needs, picture, put, put_json, stored
from tests.parity.cases import cases, has, read_json

OVIS = cases("ovis", has("captions.parquet", "conversations.json", "meta.json"))
SPHINX = cases("sphinx", has("tokens.json"))
SPHINX_V = cases("sphinxv", has("annotations.json", "dataset_items.safetensors"))
MONKEY = cases("monkey", has("tokens.json"))


def _same(found: object, expected: object) -> bool:
    """Equal, numbers to twelve digits."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(_same(found[name], expected[name]) for name in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, float) or isinstance(found, float):
        return found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    return found == expected and type(found) is type(expected)


def _assert_whole(
    folder: Path, samples: list[Sample], records: list[Any], inverse: Callable[[Sample], dict[str, Any]]
) -> None:
    """Samples equal themselves after a shard, and the records they came from after the inverse."""
    back = stored(folder, samples)
    assert back == samples
    for sample, record in zip(back, records, strict=True):
        assert _same(inverse(sample), record), (inverse(sample), record)


@needs("mdvp_bench")
def test_every_item_of_mdvp_bench_comes_back_from_its_shard(tmp_path: Path) -> None:
    folder = SHARED / "mdvp_bench"
    samples, lines = adapted(adapter("mdvp_bench", folder, domain=None, widen=True))
    assert not lines
    records = [
        record
        for task in sorted(folder.iterdir())
        for kind in ("box", "point")
        for record in json.loads((task / f"{task.name}_{kind}.json").read_text())
    ]
    is_flat = [any(not min(box[2:]) for box in record.get("bbox", ())) for record in records]
    for record, sample in zip(records, samples, strict=True):
        assert sample.images == ((folder / _task(sample) / "images" / record["image_name"]).read_bytes(),)
    exact = [(sample, record) for sample, record, flat in zip(samples, records, is_flat, strict=True) if not flat]
    _assert_whole(tmp_path / "exact", [s for s, _ in exact], [r for _, r in exact], inverses.asked)
    changed = [(sample, record) for sample, record, flat in zip(samples, records, is_flat, strict=True) if flat]
    for sample, record in changed:  # a box without width or height is drawn one pixel wide, its numbers kept
        assert sample.meta["bbox"] == record["bbox"] and len(sample.regions) == len(record["bbox"])
    strict, lines = adapted(adapter("mdvp_bench", folder, domain=None))
    assert len(lines) == len(changed) and all("has no area" in line for line in lines)
    assert [sample.turns for sample in strict] == [sample.turns for sample, _ in exact]
    assert {sample.domain for sample in samples} == {
        "natural",
        "document",
        "ocr",
        "screenshot",
        "web",
        "multi_panel",
    }


def _task(sample: Sample) -> str:
    return str(sample.meta["file"]).partition("/")[0]


@needs("eval_annotations")
def test_every_benchmark_item_comes_back_from_its_shard(tmp_path: Path) -> None:
    folder = SHARED / "eval_annotations"
    made = adapter("benchmark", folder, domain=None, without_images=True, keep_empty=True)
    samples, lines = adapted(made)
    files = sorted(path for path in folder.glob("*.json") if path.name != "annotation_config.json")
    records = [record for path in files for record in json.loads(path.read_text())]
    assert not lines and len(records) > 800
    _assert_whole(tmp_path / "all", samples, records, inverses.asked)
    config = {Path(entry["test"]).name: entry for entry in read_json(folder / "annotation_config.json").values()}
    for sample in samples:
        entry = config.get(sample.meta["file"], {})
        for name in ("prompt", "metric", "max_new_tokens"):
            assert sample.meta.get(name) == entry.get(name)


@needs("eval_annotations")
def test_true_boxes_are_fractions_and_never_prompts(tmp_path: Path) -> None:
    path = SHARED / "eval_annotations" / "refcoco_testA.json"
    samples, _ = adapted(adapter("benchmark", path, domain=None, without_images=True))
    for sample, record in zip(samples, json.loads(path.read_text()), strict=True):
        height, width = (int(part.strip("heigtwd")) for part in record["question_id"].split("_"))
        sides = (width, height, width, height)
        assert sample.regions == ()
        assert [b * s for b, s in zip(sample.meta["gt_box"], sides, strict=True)] == pytest.approx(record["gt_answers"])
        assert json.loads(sample.turns[1].text) == pytest.approx(sample.meta["gt_box"], abs=6e-4)


@needs("eval_annotations")
def test_benchmarks_are_written_with_their_pictures_below_the_given_folder(tmp_path: Path) -> None:
    path = SHARED / "eval_annotations" / "MME_benchmark.json"
    records = json.loads(path.read_text())[:4]
    for record in records:
        file = tmp_path / "root" / record["image_path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(form="JPEG"))
    few = put_json(tmp_path / path.name, records)
    config = SHARED / "eval_annotations" / "annotation_config.json"
    samples, lines = adapted(adapter("benchmark", few, tmp_path / "root", domain=None, config=config))
    assert not lines
    assert [len(sample.images) for sample in samples] == [1] * 4
    assert {sample.meta["benchmark"] for sample in samples} == {"mme"}
    assert {sample.meta["metric"] for sample in samples} == {"mme_score"}


@needs("ovis_dataset_info.json")
def test_the_published_list_of_ovis_is_read_where_its_files_were_moved_to(tmp_path: Path) -> None:
    listed = SHARED / "ovis_dataset_info.json"
    images = put(tmp_path / "images" / "llava_pretrain", a_png=picture())
    records = [{"id": "0", "image": ["a.png"], "conversations": inverses.conversation(_turns("<image>\nWhat?", "It."))}]
    put_json(tmp_path / "meta_files" / "llava-pretrain-558k.json", records)
    put_json(
        tmp_path / "meta_files" / "allava-evol-instruct-143k.json", [{"conversations": records[0]["conversations"]}]
    )
    moved = {"moved": f"/data/mllm_datasets={tmp_path}"}
    samples, lines = adapted(adapter("ovis", listed, dataset="llava-pretrain-558k", **moved))
    assert not lines and samples[0].images == ((images / "a.png").read_bytes(),)
    _assert_whole(tmp_path / "shards", samples, records, inverses.llava)
    text_only = read_json(listed)["allava-evol-instruct-143k"]
    assert text_only["image_dir"] is None
    samples, lines = adapted(adapter("ovis", listed, dataset="allava-evol-instruct-143k", **moved))
    assert not samples and "speaks of 1 <image> but names 0 pictures" in lines[0]
    with pytest.raises(ValueError, match=r"coyo-10m.parquet is not a file"):
        adapted(adapter("ovis", listed, **moved))
    with pytest.raises(ValueError, match=r"no data set 'coyo', only coyo-10m"):
        adapted(adapter("ovis", listed, dataset="coyo"))


def _turns(question: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("human", question), Turn("assistant", answer))


@pytest.mark.parametrize("case", SPHINX_V)
def test_published_annotations_with_marks_come_back_from_their_shard(case: Path, tmp_path: Path) -> None:
    path = case / "annotations.json"
    samples, lines = adapted(adapter("mdvp", path, case / "images"))
    assert not lines
    assert any(len(sample.regions) > 10 for sample in samples)
    _assert_whole(tmp_path / "shards", samples, read_json(path), inverses.mdvp)
    meta = tmp_path / "list.yaml"
    meta.write_text(f"META:\n - path: {path}\n   type: image_text\n   root: images\n")
    listed, lines = adapted(adapter("mdvp", meta, case))
    assert not lines
    assert [s.regions for s in listed] == [s.regions for s in samples]
    assert {s.meta["type"] for s in listed} == {"image_text"} and listed[3].meta["file_record"] == 3


@pytest.mark.parametrize("case", SPHINX)
def test_published_dialogs_and_single_turns_come_back_from_their_shard(case: Path, tmp_path: Path) -> None:
    golden = read_json(case / "tokens.json")
    root = put(tmp_path / "pictures", x_png=picture())
    talks = golden["items"]
    path = put_json(tmp_path / "dialogs.json", talks)
    samples, lines = adapted(adapter("sphinx", path, root, keep_empty=True))
    assert not lines
    _assert_whole(tmp_path / "dialogs", samples, [_with_plain_speakers(talk) for talk in talks], inverses.llava)
    strict, lines = adapted(adapter("sphinx", path, root))
    plain = [_with_plain_speakers(talk)["conversations"] for talk in talks]
    unanswered = [talk for talk in plain if not any(m["value"].strip() for m in talk if m["from"] == "gpt")]
    assert len(lines) == len(unanswered) == len(talks) - len(strict)
    singles = golden["alpaca_items"]
    path = tmp_path / "singles.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in singles))
    samples, lines = adapted(adapter("sphinx", path))
    assert not lines
    _assert_whole(tmp_path / "singles", samples, singles, inverses.single_turn)


def _with_plain_speakers(talk: dict[str, Any]) -> dict[str, Any]:
    """Speakers are written in several ways, and a number is an answer too."""
    names = {"human": "human", "gpt": "gpt", "assistant": "gpt"}
    messages = [{"from": names[m["from"].lower()], "value": str(m["value"])} for m in talk["conversations"]]
    return talk | {"conversations": messages}


@pytest.mark.parametrize("case", OVIS)
def test_published_captions_and_conversations_come_back_from_their_shard(case: Path, tmp_path: Path) -> None:
    golden = read_json(case / "meta.json")
    listed = put_json(
        tmp_path / "dataset_info.json",
        {
            "captions": {
                "meta_file": str(case / "captions.parquet"),
                "image_dir": str(case / "images"),
                "data_format": "caption",
                "caption_template": golden["caption_template"],
            },
            "talks": {
                "meta_file": str(case / "conversations.json"),
                "image_dir": str(case / "images"),
                "data_format": "conversation",
            },
        },
    )
    samples, lines = adapted(adapter("ovis", listed, dataset="captions", keep_empty=True))
    rows = [
        {"caption": caption or "", "image_path": name}
        for caption, name in golden["captions"]
        if _is_picture(case / "images" / name)
    ]
    assert len(lines) == len(golden["captions"]) - len(rows) == 2  # the missing and the broken one
    assert all(sample.turns[0].text == golden["caption_template"] for sample in samples)
    _assert_whole(tmp_path / "captions", samples, rows, inverses.caption)
    _, lines = adapted(adapter("ovis", listed, dataset="captions"))
    assert sum("is empty" in line for line in lines) == 2
    samples, lines = adapted(adapter("ovis", listed, dataset="talks"))
    talks = [t for t in read_json(case / "conversations.json") if "missing.png" not in t.get("image", ())]
    assert len(lines) == 1 and "missing.png" in lines[0]
    _assert_whole(tmp_path / "talks", samples, talks, inverses.llava)
    assert [len(s.images) for s in samples] == [min(1, len(t.get("image", ()))) for t in talks]
    _, lines = adapted(adapter("ovis", listed, dataset="talks", version="1.5"))
    assert any("1 <image> but names 2 pictures" in line for line in lines)


def _is_picture(path: Path) -> bool:
    try:
        return Image.open(path).width > 0
    except OSError:
        return False


@pytest.mark.parametrize("case", MONKEY)
def test_published_grounded_conversations_come_back_from_their_shard(case: Path, tmp_path: Path) -> None:
    golden = read_json(case / "tokens.json")
    records = [{"id": n, "conversations": item["conversations"]} for n, item in enumerate(golden["train"])]
    for name in ("data/coco/000000001.jpg", "data/textvqa/a b.png", "x.jpg"):
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    path = put_json(tmp_path / "train.json", records)
    samples, lines = adapted(adapter("qwen_vl", path, tmp_path / "root"))
    assert not lines
    _assert_whole(tmp_path / "shards", samples, records, inverses.qwen_vl)
    start, stop, pad = (golden["special_ids"][name] for name in ("<img>", "</img>", "<imgpad>"))
    for sample, item in zip(samples, golden["train"], strict=True):
        ids = item["input_ids"]
        spans = [ids[at + 1 : ids.index(stop, at)] for at, number in enumerate(ids) if number == start]
        named = [bytes(number for number in span if number != pad).decode() for span in spans]
        assert sample.meta.get("image_paths", []) == named[: len(sample.images)]
        assert len(sample.images) == len(named)


def test_llava_records_come_back_from_their_shard(tmp_path: Path) -> None:
    root = put(tmp_path / "root", a_png=picture(), b_jpg=picture(form="JPEG"), c_webp=picture(form="WEBP"))
    talk = inverses.conversation
    records: list[dict[str, Any]] = [
        {"id": "000/ä 1", "image": "a.png", "conversations": talk(_turns("<image>\nWhat?", "A {cat}.\r\n"))},
        {"id": "000/ä 1", "image": ["b.jpg", "c.webp"], "conversations": talk(_turns("<image><image>", "Two 🙂"))},
        {"id": 7, "conversations": talk(_turns("2+2?", "4")), "score": 0.1, "tags": [1, 1.0, None, {"x": -0.0}]},
        {"image": "a.png", "conversations": talk(_turns("no tag", "in front"))},
    ]
    samples, lines = adapted(adapter("llava", put_json(tmp_path / "l.json", records), root))
    assert not lines
    _assert_whole(tmp_path / "shards", samples, records, inverses.llava)
    assert [sample.domain for sample in samples] == ["natural", "natural", "text", "natural"]
    assert len({sample.key for sample in samples}) == 4  # although ids repeat
