"""Embedded data without marks: deterministic, true, held out, and in the form that benchmarks read."""

from __future__ import annotations

import re

import pytest

from bestiary.evaluation.boxes import box_of, grounding, mentions
from bestiary.schema import Sample
from data_modules.embedded import DOMAINS
from data_modules.embedded.plain import HELDOUT, PARTS, build_plain, plain_sample, plain_source_names
from data_modules.embedded.plain_tasks import REFERRING, SHORT_ANSWER
from data_modules.embedded.scene import is_heldout_pair, is_heldout_string
from data_modules.shards import read_source

pytestmark = pytest.mark.slow  # many pictures are drawn

TEXTS = ("sphinx_documents", "sphinx_dialogs")


def some(source: str, count: int = 24, seed: int = 5) -> list[Sample]:
    return [plain_sample(source, seed, number) for number in range(count)]


@pytest.mark.parametrize("source", plain_source_names())
def test_a_sample_is_a_function_of_source_seed_and_number_alone(source):
    assert plain_sample(source, 1, 6) == plain_sample(source, 1, 6)
    others = (plain_sample(source, 1, 6), plain_sample(source, 2, 6), plain_sample(source, 1, 10))
    assert len({(sample.images, sample.turns) for sample in others}) == 3


@pytest.mark.parametrize("task", PARTS)
def test_every_domain_comes_in_turn_and_texts_have_no_picture(task):
    for source in (task, task + HELDOUT):
        samples = some(source, 8)
        assert {bool(sample.images) for sample in samples} == {task not in TEXTS}
        wanted = ["text"] * 8 if task in TEXTS else [*DOMAINS, *DOMAINS]
        assert [sample.domain for sample in samples] == wanted
        assert len({sample.key for sample in samples}) == 8


def test_stage_1_has_one_assistant_turn_and_stage_2_answers_every_question():
    for task in PARTS:
        for sample in some(task, 8):
            roles = [turn.role for turn in sample.turns]
            if task in ("sphinx_caption", "sphinx_documents"):
                assert roles == ["assistant"], sample.key
            else:
                assert roles == ["human", "assistant"] * (len(roles) // 2) and roles, sample.key


def test_training_answers_with_boxes_are_the_true_ones_in_the_padded_square():
    asked = re.compile(re.escape(REFERRING).replace(r"\{\}", "(.*)"))
    checked = 0
    for sample in some("sphinx_rec", 40):
        width, height = sample.meta["width"], sample.meta["height"]
        for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            name = asked.fullmatch(question.text)[1]
            [thing] = [t for t in sample.meta["objects"] if t["label"] in name.removeprefix("the ").split(" icon")[0]][
                :1
            ]
            truth_px = [v * (height if i % 2 else width) for i, v in enumerate(thing["box"])]
            assert grounding(answer.text, truth_px, width, height).iou > 0.85, (sample.key, question.text, answer.text)
            assert all(0 <= value <= 1 for value in box_of(answer.text))
            checked += width != height
    assert checked > 5, "no picture was padded"


def test_heldout_boxes_are_in_the_form_of_the_benchmark_annotations():
    for sample in some("sphinx_rec_heldout", 40):
        meta = sample.meta
        height, width = map(int, re.fullmatch(r"height(\d+)_width(\d+)", meta["question_id"]).groups())
        assert (width, height) == (meta["width"], meta["height"])
        assert meta["prompt"] == REFERRING and REFERRING[:20] not in sample.turns[0].text
        px = [value * (height if i % 2 else width) for i, value in enumerate(meta["gt_box"])]
        assert px == pytest.approx(meta["gt_answers"], abs=0.01)
        assert any(thing["box"] == pytest.approx(meta["gt_box"], abs=1e-3) for thing in meta["objects"])


def test_short_answers_are_true():
    seen = set()
    for source in ("sphinx_vqa", "sphinx_vqa_heldout"):
        for sample in some(source, 80):
            labels = [thing["label"] for thing in sample.meta["objects"]]
            for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
                text = question.text.removesuffix(SHORT_ANSWER.format(""))
                assert (text != question.text) == (source == "sphinx_vqa")
                if text.startswith("Is there"):
                    has = any(re.search(rf"\b{label}\b", text) for label in labels)
                    assert answer.text == ("Yes" if has else "No"), sample.key
                elif text.startswith("What"):
                    assert answer.text in labels, sample.key
                seen.add(text.split()[0] + answer.text * (answer.text in ("Yes", "No")))
    assert seen == {"IsYes", "IsNo", "What", "Where", "How"}


def test_a_grounded_caption_names_every_thing_once_with_its_box():
    for sample in some("sphinx_grounded"):
        found = mentions(sample.turns[1].text)
        assert len(found) == len(sample.meta["objects"]) and all(mention.name for mention in found)
        for thing in sample.meta["objects"]:
            assert sum(thing["label"] in mention.name for mention in found) >= 1


def test_heldout_texts_and_pictures_show_what_training_never_does():
    for task in PARTS:
        for source in (task, task + HELDOUT):
            for sample in some(source, 16):
                labels = [thing["label"] for thing in sample.meta.get("objects", ())]
                if sample.domain == "document" and task != "monkey_texts":  # whose words are split in pairs everywhere
                    assert all(is_heldout_string(text) == source.endswith(HELDOUT) for text in labels)
                elif labels:
                    pairs = [(a, b) for i, a in enumerate(labels) for b in labels[:i]]
                    assert any(is_heldout_pair(a, b) for a, b in pairs) == source.endswith(HELDOUT)


def test_a_build_writes_the_asked_tasks_of_the_asked_domains_and_only_once(tmp_path):
    sizes = {"sphinx_rec": 6, "sphinx_rec_heldout": 2}
    folders = build_plain(tmp_path, sources=["sphinx_rec"], domains=["document"], sizes=sizes)
    assert {name: len(read_source(folder)) for name, folder in folders.items()} == sizes
    source = read_source(folders["sphinx_rec"])
    assert source[3] == plain_sample("sphinx_rec", 0, 3, domains=["document"]) and source.domains == ("document",)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    build_plain(tmp_path, sources=["sphinx_rec"], domains=["document"], sizes=sizes)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before
    build_plain(tmp_path, sources=["sphinx_rec"], domains=["natural"], sizes=sizes)
    assert read_source(folders["sphinx_rec"]).domains == ("natural",)
    alone = build_plain(tmp_path / "alone", sources=["sphinx_rec_heldout"], sizes={"sphinx_rec_heldout": 2})
    assert [len(read_source(folder)) for folder in alone.values()] == [2] and list(alone) == ["sphinx_rec_heldout"]


def test_unknown_tasks_domains_and_sizes_are_refused(tmp_path):
    for wrong in (
        {"sources": ["sphinx_ocr"]},
        {"sources": ["sphinx_rec"], "domains": ["art"]},
        {"sources": ["sphinx_rec"], "sizes": {"sphinx_vqa": 3}},
        {"sources": ["sphinx_rec"], "sizes": {"sphinx_rec": 0}},
    ):
        with pytest.raises(ValueError, match=r"choose of|give 1 or more"):
            build_plain(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
