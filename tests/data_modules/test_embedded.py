"""The embedded data: deterministic, true, split cleanly, and written once."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import Sample
from data_modules.embedded import DOMAINS, LOOK, build, generate, part_sample, scene, source_names
from data_modules.embedded.__main__ import main
from data_modules.embedded.assets import (
    DIGIT_NAMES,
    FOLDER,
    WORDS,
    digit_places,
    icon_names,
    label_places,
    object_names,
    photos,
)
from data_modules.embedded.build import MARKER, PARTS
from data_modules.embedded.scene import is_heldout_pair, is_heldout_string
from data_modules.embedded.tasks import TASKS_OF_DOMAIN
from data_modules.shards import ShardSet

pytestmark = pytest.mark.slow  # many pictures are drawn

SPLITS = ("train", "heldout")
PINNED = {
    "natural": ["melon", "cake", "burger", "teapot", "mushroom", "apple"],
    "screenshot": ["lock", "mic", "bluetooth", "flag", "pause", "phone"],
    "document": ["XA4", "NHE", "7FR", "AX5", "CXP"],
    "multi_panel": ["blue line", "cake", "donut"],
}
TINY = {"stage1": 3, "stage2": 3, "heldout": 12, "heldout_tasks": 2}


def some(domain: str, split: str, count: int = 40, **options: object) -> list[Sample]:
    return [generate(domain, 7, index, split, **options) for index in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_arguments_give_the_same_sample_and_others_another(domain):
    assert generate(domain, 3, 5, "train") == generate(domain, 3, 5, "train")
    pictures = {
        generate(domain, seed, index, split).images[0]
        for seed, index, split in ((3, 5, "train"), (4, 5, "train"), (3, 6, "train"), (3, 5, "heldout"))
    }
    assert len(pictures) == 4


def test_what_the_pictures_show_is_pinned():
    shown = {domain: [thing.label for thing in scene(domain, 0, 0, "train").things] for domain in DOMAINS}
    assert shown == PINNED


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_mark_of_the_text_has_a_region_of_its_kind(domain, split):
    for sample in some(domain, split, mixed=0.3):
        kinds = {region.mark: region.kind for region in sample.regions}
        assert list(kinds) == list(range(1, len(kinds) + 1)), sample.key
        text = "\n".join(turn.text for turn in sample.turns)
        for word, number in re.findall(r"(Mark|Region) (\d+)", text):
            assert (kinds[int(number)] == "point") == (word == "Mark"), (sample.key, text)
        assert [turn.role for turn in sample.turns] == ["human", "assistant"] * (len(sample.turns) // 2)
        if sample.meta["task"] in ("label", "ocr"):
            lines = [line.split(": ") for line in sample.turns[1].text.split("\n")]
            assert {words.split(" ")[1]: label for words, label in lines} == sample.meta["labels"]


@pytest.mark.parametrize("kind", ["point", "box", "stroke"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_marks_lie_on_the_thing_whose_label_is_told(domain, kind):
    for sample in some(domain, "train", kinds=(kind,), mixed=0.0):
        for region, place in zip(sample.regions, sample.meta["marked"], strict=True):
            thing = sample.meta["objects"][place]
            assert thing["label"] == sample.meta["labels"][str(region.mark)]
            x0, y0, x1, y1 = thing["box"]
            a0, b0, a1, b1 = region.box
            if kind == "point":
                assert x0 < a0 < x1 and y0 < b0 < y1, sample.key
            else:
                both = max(0.0, min(x1, a1) - max(x0, a0)) * max(0.0, min(y1, b1) - max(y0, b0))
                union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - both
                assert both / union > 0.75, sample.key


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_things_are_apart_inside_the_picture_and_of_different_labels(domain, split):
    for index in range(60):
        picture = scene(domain, 11, index, split)
        width, height = picture.image.size
        labels = [thing.label for thing in picture.things]
        assert len(set(labels)) == len(labels) >= LOOK.num_objects[0]
        for i, thing in enumerate(picture.things):
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            for other in picture.things[:i]:
                a0, b0, a1, b1 = other.box
                assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0, (index, thing.label, other.label)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_box_of_a_thing_holds_its_pixels(domain):
    for index in range(10):
        picture = scene(domain, 13, index, "train")
        pixels = np.asarray(picture.image, dtype=float)
        for thing in picture.things:
            x0, y0, x1, y1 = (round(value) for value in thing.box)
            assert pixels[y0:y1, x0:x1].std() > 8, (index, thing.label)


def test_pictures_are_decodable_and_of_the_stated_size():
    sides = set()
    for domain in DOMAINS:
        for sample in some(domain, "train", 12):
            with Image.open(io.BytesIO(sample.images[0])) as picture:
                assert picture.size == (sample.meta["width"], sample.meta["height"])
                assert max(picture.size) in LOOK.long_px
                sides.add(picture.size[0] == picture.size[1])
    assert sides == {True, False}


@pytest.mark.parametrize("domain", ["natural", "screenshot", "multi_panel"])
def test_heldout_compositions_never_stand_in_training(domain):
    for split in SPLITS:
        for index in range(60):
            labels = [thing.label for thing in scene(domain, 17, index, split).things]
            pairs = [(a, b) for i, a in enumerate(labels) for b in labels[:i]]
            assert any(is_heldout_pair(a, b) for a, b in pairs) == (split == "heldout")


def test_every_label_has_about_as_many_heldout_partners():
    for names in (object_names(), icon_names()):
        partners = [sum(is_heldout_pair(a, b) for b in names if b != a) for a in names]
        assert min(partners) >= 4 and max(partners) <= 6
    assert len(label_places()) == len(object_names()) + len(icon_names()) + 10 + 15 + len(WORDS)


def test_heldout_strings_never_stand_in_training():
    for split in SPLITS:
        for index in range(60):
            for thing in scene("document", 17, index, split).things:
                assert is_heldout_string(thing.label) == (split == "heldout")


def test_heldout_digits_come_from_forms_that_training_never_shows():
    train, heldout = digit_places("train"), digit_places("heldout")
    for name in DIGIT_NAMES:
        assert len(heldout[name]) >= 30 and max(train[name]) < min(heldout[name])
    assert sum(map(len, train.values())) + sum(map(len, heldout.values())) == 1797


def test_photos_of_the_splits_share_no_pixel():
    files = {path.stem: Image.open(path).size for path in FOLDER.glob("photo-*.jpg")}
    train, heldout = photos("train"), photos("heldout")
    assert len(train) == len(files) - 1 and len(heldout) == len(files)
    whole = sum(width * height for width, height in files.values())
    assert sum(p.width * p.height for p in (*train, *heldout)) == whole


def test_tasks_are_those_asked_for_and_unknown_ones_raise():
    for domain in DOMAINS:
        for task in TASKS_OF_DOMAIN[domain]:
            assert {sample.meta["task"] for sample in some(domain, "train", 5, tasks=[task])} == {task}
    with pytest.raises(ValueError, match="none of the tasks"):
        generate("natural", 0, 0, "train", tasks=["ocr"])


def test_relations_and_questions_are_true_of_the_boxes():
    for sample in some("natural", "train", 60, tasks=["relation"], mixed=0.0):
        text = sample.turns[1].text
        first, second = (sample.meta["objects"][place]["box"] for place in sample.meta["marked"])
        width, height = sample.meta["width"], sample.meta["height"]
        dx = (first[0] + first[2] - second[0] - second[2]) * width
        dy = (first[1] + first[3] - second[1] - second[3]) * height
        said = re.search(r" is (left of|right of|above|below) ", text)
        assert said is not None
        assert {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[said[1]] > 0
    answers = [s.turns[1].text for s in some("screenshot", "train", 150, tasks=["qa"], num_marks=(2, 3))]
    assert 0.3 < answers.count("Yes") / (answers.count("Yes") + answers.count("No")) < 0.7


@pytest.mark.parametrize("domain", DOMAINS)
def test_heldout_is_balanced_over_kinds_and_numbers_of_marks(domain):
    samples = [part_sample(domain, "heldout", 0, number) for number in range(12)]
    seen = {(sample.meta["kinds"][0], len(sample.regions)) for sample in samples}
    assert seen == {(kind, count) for kind in ("point", "box", "stroke") for count in (1, 2, 3, 4)}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_build_writes_every_source_once_and_reads_back(tmp_path):
    folders = build(tmp_path, sizes=TINY)
    assert set(folders) == set(source_names())
    for name, folder in folders.items():
        domain = next(domain for domain in DOMAINS if name.startswith(domain))
        part = name.removeprefix(f"{domain}_")
        samples = list(ShardSet(folder))
        assert samples == [part_sample(domain, part, 0, number) for number in range(TINY[part])]
        assert {sample.meta["split"] for sample in samples} == {PARTS[part].split}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    build(tmp_path, sizes=TINY)
    after = {path: path.stat().st_mtime_ns for path in before}
    del before[tmp_path / ".embedded.lock"], after[tmp_path / ".embedded.lock"]
    assert after == before


def test_build_makes_again_what_is_half_written_or_of_another_seed(tmp_path):
    sizes = {**dict.fromkeys(PARTS, 0), "natural_stage1": 2, "document_heldout": 2}
    folders = build(tmp_path, sizes=sizes)
    whole = tree(tmp_path)
    (folders["natural_stage1"] / MARKER).unlink()
    tar = folders["document_heldout"] / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    build(tmp_path, sizes=sizes)
    assert tree(tmp_path) == whole
    build(tmp_path, sizes=sizes, seed=1)
    assert tree(tmp_path) != whole
    assert json.loads((folders["natural_stage1"] / MARKER).read_text())["seed"] == 1


def test_build_refuses_unknown_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"'stage3'.*stage1"):
        build(tmp_path, sizes={"stage3": 4})


def test_command_line_builds(tmp_path, caplog):
    arguments = [word for part in PARTS if part != "heldout" for word in ("--size", f"{part}=0")]
    main(["--root", str(tmp_path), "--size", "heldout=1", *arguments])
    assert len(list(tmp_path.glob(f"*/{MARKER}"))) == len(DOMAINS)
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path), "--size", "heldout"])


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    sizes = {"stage1": 60, "stage2": 60, "heldout": 12, "heldout_tasks": 12}
    build(tmp_path / "one", sizes=sizes, processes=1)
    build(tmp_path / "two", sizes=sizes, processes=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
