"""SPHINX-V's data path against the published one: prompts, jitter, strokes, conversations, whole items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from bestiary.schema import IGNORE, Example, Region, RegionKind, Sample, Slot, Turn
from bestiary.text import chat
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.sphinx_v.processor import SphinxVProcessor
from bestiary.vision.encoders import normalise
from bestiary.vision.geometry import click_boxes, jitter_box, pixels_to_original, stroke_boxes
from tests.parity.cases import cases, has, read_json
from tests.parity.sphinx_examples import data_folder

PROMPTS = cases("sphinxv", has("prompt_transform.json", "tokenizer.model"))
JITTERS = cases("sphinxv", has("box_noise.json"))
STROKES = cases("sphinxv", has("freeform.json", "freeform_layers.safetensors", "tokenizer.model"))
TALKS = cases("sphinxv", has("conversations.json", "tokenizer.model"))
ITEMS = cases("sphinxv", has("dataset_items.safetensors", "annotations.json", "config.json", "tokenizer.model"))
ANSWERS = cases("sphinxv", has("generate_response.json", "tokenizer.model"))


def _regions(prompts: list[list[float]], width: int, height: int) -> tuple[Region, ...]:
    """Published prompts, (x, y) or (x, y, w, h) in pixels, as fractions of the original image."""
    regions = []
    for mark, prompt in enumerate(prompts, 1):
        x, y, *size = prompt
        corners = (x, y, x + size[0], y + size[1]) if size else (x, y)
        regions.append(Region("box" if size else "point", pixels_to_original(corners, width, height), mark))
    return tuple(regions)


def _sparse(example: Example) -> np.ndarray:
    """Prompt slots in the published layout: a point, or an empty slot among points, ends in -1, -1."""
    rows = example.regions
    assert rows is not None
    coords = np.array(rows.coords)
    coords[np.asarray(rows.kinds) == RegionKind.POINT, 2:] = -1
    return coords


def _processor(folder: Path, num_slots: int = 10, **more: Any) -> SphinxVProcessor:
    settings = {"canvas_px": 32, "image_rows": 20, "num_views": 5, "max_tokens": 4096, "reference_quirks": True}
    return SphinxVProcessor(tokenizer=str(folder / "tokenizer.model"), num_slots=num_slots, **settings | more)


def _sample(regions: tuple[Region, ...], width: int, height: int, tmp_path: Path) -> Sample:
    file = tmp_path / f"{width}x{height}.png"
    if not file.exists():
        Image.new("RGB", (width, height)).save(file)
    turns = (Turn("human", "What is this?"), Turn("assistant", "A cat."))
    return Sample("k", "s", "d", turns, images=(file.read_bytes(),), regions=regions)


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_in_pixels_become_the_published_slots(case: Path, tmp_path: Path) -> None:
    for entry in read_json(case / "prompt_transform.json"):
        width, height, prompts = entry["width"], entry["height"], entry["prompts"]
        expected = np.array(entry["sparse_vp"], dtype=np.float32)
        processor = _processor(case, len(expected))
        sample = _sample(_regions(prompts, width, height), width, height, tmp_path)
        ours = _sparse(processor.prompt(sample))
        assert ours.dtype == np.float32 and entry["dtype"] == "torch.float32"
        np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)
        # The published code changes the caller's list, so that a second call goes wrong; ours repeats itself.
        np.testing.assert_array_equal(_sparse(processor.prompt(sample)), ours)
        if "second_call_on_mutated_list" in entry:
            assert not np.allclose(ours, entry["second_call_on_mutated_list"], atol=1e-3)
        is_inside = all(0 <= c <= 1 for region in sample.regions for c in region.coords)
        if len(prompts) <= len(expected) and is_inside:
            sane = _processor(case, len(expected), reference_quirks=False)
            np.testing.assert_array_equal(_sparse(sane.prompt(sample)), ours)


@pytest.mark.parametrize("case", JITTERS)
def test_jitter_draws_the_published_boxes(case: Path) -> None:
    for entry in read_json(case / "box_noise.json")["cases"]:
        ours = jitter_box(entry["box"], np.random.RandomState(entry["np_seed"]))
        np.testing.assert_allclose(ours, entry["out"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", STROKES)
def test_strokes_become_the_published_boxes_and_slots(case: Path, tmp_path: Path) -> None:
    golden = read_json(case / "freeform.json")
    width, height = golden["width"], golden["height"]
    boxes = stroke_boxes(load_file(case / "freeform_layers.safetensors")["layers_rgba"])
    assert [list(box) for box in boxes] == golden["boxes_xyxy"]
    xywh = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
    assert xywh == golden["boxes_xywh"]
    expected = np.array(golden["sparse_vp"], dtype=np.float32)
    processor = _processor(case, len(expected))
    regions = _regions(xywh, width, height)
    # The same as polylines around the boxes: a stroke reaches the model as its box.
    strokes = tuple(
        Region("stroke", (r.coords[0], r.coords[3], *r.coords[2:], r.coords[0], r.coords[1]), r.mark) for r in regions
    )
    for drawn in (regions, strokes):
        ours = _sparse(processor.prompt(_sample(drawn, width, height, tmp_path)))
        np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", STROKES)
def test_clicks_become_the_published_boxes(case: Path) -> None:
    golden = read_json(case / "freeform.json")
    clicks = [tuple(click) for click in golden["box_clicks"]]
    for num, state in enumerate(golden["box_states_after_each_click"], 1):
        assert [list(mark) for mark in click_boxes(clicks[:num])] == state
    assert [list(mark) for mark in click_boxes(clicks)[:-1]] == golden["after_undo"]


@pytest.mark.parametrize("case", TALKS)
def test_conversations_have_the_published_texts_ids_and_stops(case: Path) -> None:
    golden = read_json(case / "conversations.json")
    tokenizer = load_tokenizer(case / "tokenizer.model")
    for entry in golden["conversations"]:
        texts = [text for pair in entry["qas"] for text in pair if text is not None]
        turns = tuple(Turn("assistant" if k % 2 else "human", text) for k, text in enumerate(texts))
        rendered = chat.render(chat.TEMPLATES["current"], turns, is_open=len(texts) % 2 == 1)
        assert rendered.text == entry["prompt"]
        assert list(rendered.learned) == entry["to_predict"]
        assert chat.encode_prompt(tokenizer, rendered.text) == entry["prompt_ids"]
        assert chat.TEMPLATES["current"].signal == entry["end_signal"]
        if len(texts) % 2:
            prompt = _processor(case).prompt(Sample("k", "s", "d", turns))
            assert prompt.ids.tolist() == entry["prompt_ids"]
    stops = golden["end_signal_tokens"]
    expected = [stops["eos"], stops["encode_segment"], stops["encode_wo_prefix_space"]]
    assert _processor(case).stop_sequences() == expected


def _items(case: Path) -> list[tuple[Sample, np.ndarray, int]]:
    """(sample, image size, seed) of every golden item, in the published order."""
    config = read_json(case / "config.json")
    by_length = sorted(
        read_json(case / "annotations.json"), key=lambda a: sum(len(turn["value"]) for turn in a["conversations"])
    )
    items = []
    for entry in config["items"]:
        annotation = by_length[entry["index"]]
        assert annotation["image"] == entry["image"]
        assert annotation["conversations"][0]["value"] == entry["first_question"]
        file = case / "images" / annotation["image"]
        size = Image.open(file).size
        prompts = annotation.get("points") or annotation["bbox"]  # points win
        turns = chat.turns_of(annotation["conversations"])
        sample = Sample("k", "s", "d", turns, images=(file.read_bytes(),), regions=_regions(prompts, *size))
        items.append((sample, np.array(size), entry["np_seed"]))
    return items


def _item_processor(case: Path, max_words: int, num_slots: int, **more: Any) -> SphinxVProcessor:
    config = read_json(case / "config.json")
    image_rows = config["image_words"] - num_slots - 2
    size = config["image_size"]
    return _processor(case, num_slots, canvas_px=size, image_rows=image_rows, max_tokens=max_words, **more)


def _assert_text(ours: Example, ids: np.ndarray, labels: np.ndarray) -> None:
    is_text = ours.slots == Slot.TEXT
    length = int(is_text.sum())
    assert (ours.ids[is_text] == ids[:length]).all() and not ids[length:].any()
    learned = np.where(ours.labels == IGNORE, 0, ours.labels)[is_text]
    assert (learned == labels[:length]).all() and not labels[length:].any()
    assert (ours.labels[~is_text] == IGNORE).all() and not ours.ids[~is_text].any()


@pytest.mark.parametrize("case", ITEMS)
def test_items_are_the_published_ones_from_file_to_tensors(case: Path) -> None:
    golden, config = load_file(case / "dataset_items.safetensors"), read_json(case / "config.json")
    num_slots = len(golden["0.sparse_vp"])
    processor = _item_processor(case, config["max_words"], num_slots, exact_pil=True)
    for (sample, _, seed), entry in zip(_items(case), config["items"], strict=True):
        ours = processor(sample, rng=np.random.RandomState(seed))
        expected = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith(f"{entry['index']}.")}
        _assert_text(ours, expected["input_ids"], expected["labels"])
        assert len(expected["input_ids"]) == config["max_words"] - config["image_words"]
        is_text = ours.slots == Slot.TEXT
        assert is_text.sum() == expected["mask"].sum() == entry["n_tokens"]
        assert expected["mask"][: entry["n_tokens"]].all()
        assert (ours.labels != IGNORE).sum() == entry["n_labels"]
        assert (~is_text).sum() == config["image_words"] and (~is_text)[1 : 1 + config["image_words"]].all()
        np.testing.assert_allclose(_sparse(ours), expected["sparse_vp"], atol=1e-6, rtol=0)
        pixels = normalise(torch.from_numpy(ours.pixels))[0].numpy()
        step = config["image_size"] // expected["image_sub16"].shape[-1]
        statistics = np.array([pixels.mean(), pixels.std(ddof=1)])
        np.testing.assert_allclose(statistics, expected["image_mean_std"], atol=1e-3, rtol=0)
        np.testing.assert_allclose(pixels[:, ::step, ::step], expected["image_sub16"], atol=2e-2, rtol=0)


@pytest.mark.parametrize("case", ITEMS)
def test_a_long_item_is_cut_as_published(case: Path) -> None:
    golden, config = load_file(case / "dataset_items.safetensors"), read_json(case / "config.json")
    assert config["truncation"]["result"] == "ok"
    num_slots = len(golden["0.sparse_vp"])
    sample, _, _ = _items(case)[-1]
    max_words = config["truncation"]["max_words"]
    ours = _item_processor(case, max_words, num_slots)(sample)
    _assert_text(ours, golden["trunc.input_ids"], golden["trunc.labels"])
    assert len(ours) == max_words
    if len(sample.regions) <= num_slots:
        cut = _item_processor(case, max_words, num_slots, reference_quirks=False, too_long="truncate_text")(sample)
        _assert_text(cut, golden["trunc.input_ids"], golden["trunc.labels"])


@pytest.mark.parametrize("case", ANSWERS)
def test_prompts_of_the_published_demo_are_read(case: Path) -> None:
    golden = read_json(case / "generate_response.json")
    for entry in golden["cases"]:
        file = data_folder(case, entry["image"]) / entry["image"]
        texts = [text for pair in entry["qas"] for text in pair if text is not None]
        turns = tuple(Turn("assistant" if k % 2 else "human", text) for k, text in enumerate(texts))
        regions = _regions(entry["vps"], *Image.open(file).size)
        sample = Sample("k", "s", "d", turns, images=(file.read_bytes(),), regions=regions)
        ours = _processor(case).prompt(sample)
        text = chat.render(chat.TEMPLATES["current"], turns, is_open=True).text
        assert text.endswith(" Assistant:")
        assert ours.ids[ours.slots == Slot.TEXT].tolist() == load_tokenizer(case / "tokenizer.model").encode(text, True)
        assert (ours.labels == IGNORE).all() and ours.regions is not None
        assert np.asarray(ours.regions.valid).sum() == len(entry["vps"])
