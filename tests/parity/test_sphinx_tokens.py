"""SPHINX's conversations, prompts and label masks against ids and labels of the published loader."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import IGNORE, Example, Sample, SampleError, Slot, Turn
from bestiary.text import chat
from bestiary.text.tokenizer import SentencePieceTokenizer
from bestiary.variants.sphinx.processor import SphinxProcessor
from tests.parity.cases import cases, read_json

CASES = cases("sphinx", lambda folder: (folder / "tokens.json").is_file())
DIALOGS = {"dialog_head": "current", "dialog_legacy_nov2023": "nov2023"}


def _tokenizer_file(folder: Path, sha256: str) -> Path:
    """The tokenizer with that digest: among the goldens, or in an installed package."""
    places = [p for up in (folder, *folder.parents[:2]) for p in sorted(up.glob("*.model"))]
    places += sorted(Path(str(importlib.resources.files("mistral_common") / "data")).glob("tokenizer.model*"))
    for place in places:
        if hashlib.sha256(place.read_bytes()).hexdigest() == sha256:
            return place
    raise FileNotFoundError(f"no tokenizer with sha256 {sha256} near {folder} or in mistral_common")


def _each(case: Path) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    golden = read_json(case / "tokens.json")
    found = golden["per_tokenizer"].values()
    return [(golden, tok, str(_tokenizer_file(case, tok["sha256"]))) for tok in found]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 3)).save(file, "PNG")
    return file.getvalue()


def _processor(golden: dict[str, Any], path: str, template: str, **more: Any) -> SphinxProcessor:
    return SphinxProcessor(
        tokenizer=path,
        canvas_px=8,
        image_rows=golden["image_words"],
        num_views=1,
        max_tokens=golden["max_words"],
        template=template,
        **more,
    )


def _sample(turns: tuple[Turn, ...], has_image: bool, **meta: Any) -> Sample:
    return Sample("k", "s", "d", turns, images=(_png(),) if has_image else (), meta=meta)


def _assert_equal(ours: Example, expected: dict[str, Any], golden: dict[str, Any]) -> None:
    is_text = ours.slots == Slot.TEXT
    assert len(expected["input_ids"]) == expected["n_nonpad"]
    assert ours.ids[is_text].tolist() == expected["input_ids"]
    labels = ours.labels[is_text]
    assert np.where(labels == IGNORE, 0, labels).tolist() == expected["labels"][: len(labels)]
    assert not any(expected["labels"][len(labels) :])
    num_visual = golden["image_words"] if expected["has_image"] else 0
    assert expected["length_total"] == golden["max_words"] - num_visual
    assert (~is_text).sum() == num_visual


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DIALOGS)
def test_dialogs_have_the_published_ids_and_labels(case: Path, kind: str) -> None:
    for golden, tok, path in _each(case):
        processor = _processor(golden, path, DIALOGS[kind], reference_quirks=True)
        for item, expected in zip(golden["items"], tok[kind], strict=True):
            if "raises" in expected:
                continue
            turns = chat.turns_of(item["conversations"])
            ours = processor(_sample(turns, "image" in item))
            _assert_equal(ours, expected, golden)
            cleaned = processor._turns(_sample(turns, "image" in item))
            rendered = chat.render(chat.template_named(DIALOGS[kind]), cleaned)
            assert rendered.text == expected["conversation"]
            assert list(rendered.learned) == expected["to_predict"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DIALOGS)
def test_labels_by_characters_are_the_published_ones(case: Path, kind: str) -> None:
    for golden, tok, path in _each(case):
        processor = _processor(golden, path, DIALOGS[kind], too_long="truncate_text")
        template = chat.template_named(DIALOGS[kind])
        for item, expected in zip(golden["items"], tok[kind], strict=True):
            turns = chat.turns_of(item["conversations"])
            if "raises" in expected or not all(turn.text for turn in turns):
                continue
            _assert_equal(processor(_sample(turns, "image" in item)), expected, golden)
            rendered = chat.render(template, [Turn(t.role, chat.clean(t.text, template)) for t in turns])
            by_characters = chat.encode_rendered(processor.tokenizer, rendered)
            assert by_characters == chat.encode_rendered(processor.tokenizer, rendered, search=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DIALOGS)
def test_what_the_published_loader_refuses_is_refused(case: Path, kind: str) -> None:
    for golden, tok, path in _each(case):
        processor = _processor(golden, path, DIALOGS[kind], reference_quirks=True)
        for item, expected in zip(golden["items"], tok[kind], strict=True):
            if "raises" not in expected:
                continue
            # That loader's constructor wants strings; its later version turns numbers into text, as `turns_of` does.
            turns = chat.turns_of(item["conversations"])
            if "construction" in expected["raises"]:
                values = (message["value"] for message in item["conversations"])
                turns = tuple(Turn(turn.role, value) for turn, value in zip(turns, values, strict=True))
            with pytest.raises(SampleError, match="sample k:"):
                processor(_sample(turns, "image" in item))


@pytest.mark.parametrize("case", CASES)
def test_single_questions_have_the_published_ids_and_labels(case: Path) -> None:
    for golden, tok, path in _each(case):
        processor = _processor(golden, path, "alpaca", reference_quirks=True)
        for item, expected in zip(golden["alpaca_items"], tok["alpaca"], strict=True):
            turns = (Turn("human", item["instruction"]), Turn("assistant", item["output"]))
            ours = processor(_sample(turns, "image" in item, input=item.get("input")))
            _assert_equal(ours, expected, golden)


@pytest.mark.parametrize("case", CASES)
def test_single_question_texts_are_the_published_ones(case: Path) -> None:
    for entry in read_json(case / "tokens.json")["alpaca_prompts"]:
        item = entry["item"]
        text = chat.single_turn_prompt(str(entry["sys_name"]).lower(), item["instruction"], item.get("input"))
        assert text == entry["text"]


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_stops_are_the_published_ones(case: Path) -> None:
    for golden, tok, path in _each(case):
        now = _processor(golden, path, "current", reference_quirks=True)
        legacy = _processor(golden, path, "nov2023", reference_quirks=True)
        for expected in tok["prompts"]:
            texts = [text for pair in expected["qas"] for text in pair if text is not None]
            turns = tuple(Turn("assistant" if k % 2 else "human", text) for k, text in enumerate(texts))
            assert chat.render(chat.TEMPLATES["current"], turns, is_open=True).text == expected["prompt"]
            assert now.prompt(_sample(turns, False)).ids.tolist() == expected["prompt_ids_with_bos"]
            legacy_text = chat.render(chat.TEMPLATES["nov2023_prompt"], turns, is_open=True).text
            assert legacy_text == expected["legacy_prompt_nov2023"]
            # The stored legacy ids are given with BOS or without; ours always begin with it.
            ids = legacy.prompt(_sample(turns, False)).ids.tolist()
            assert expected["legacy_ids"] in (ids, ids[1:])
            assert chat.TEMPLATES["current"].signal == expected["response_end_signal"]
            assert now.tokenizer.encode_wo_prefix_space(expected["response_end_signal"]) == expected["stop_ids"]
            assert expected["stop_ids"] in now.stop_sequences()
            assert [tok["eos"]] in now.stop_sequences()


@pytest.mark.parametrize("case", CASES)
def test_templates_give_the_published_texts(case: Path) -> None:
    turns = (Turn("human", "Q one?"), Turn("assistant", "A one."), Turn("human", "Q two?"))
    for name, expected in read_json(case / "tokens.json")["templates"].items():
        rendered = chat.render(chat.template_named(name), turns, is_open=True)
        assert rendered.text == expected["text"]
        assert list(rendered.learned) == expected["to_predict"]
        assert chat.template_named(name).signal == expected["end"]


@pytest.mark.parametrize("case", CASES)
def test_segments_have_the_published_ids(case: Path) -> None:
    for _, tok, path in _each(case):
        tokenizer = SentencePieceTokenizer(path)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (tok["n_words"], tok["bos"], tok["eos"])
        assert tokenizer.need_space_before_segment == tok["need_space_before_segment"]
        for text, ids in tok["encode_segment"].items():
            assert tokenizer.encode_segment(text) == ids
        for text, ids in tok["encode_wo_prefix_space"].items():
            assert tokenizer.encode_wo_prefix_space(text) == ids
