"""Monkey's pictures, positions, tokens and training rows against the published code's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bestiary.schema import IGNORE, IMAGE_TAG, Example, Sample, Slot, Turn
from bestiary.text.qwen_tokenizer import QwenTokenizer
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.monkey.chat import chat_context
from bestiary.variants.monkey.processor import VERBATIM, MonkeyProcessor
from bestiary.variants.monkey.resampler import sincos_table
from bestiary.variants.monkey.tags import boxes_of, numbered_pictures, split_at_pictures, write_box
from bestiary.variants.monkey.vit import resize_table
from bestiary.variants.monkey.windows import overview, windows
from bestiary.vision.encoders import normalise
from bestiary.vision.image import decode_rgb
from bestiary.vision.resize import resize_bicubic
from tests.parity.cases import cases, has, read_json, read_tensors
from tests.parity.monkey_cases import vocabulary
from tests.parity.ovis_cases import png
from tests.parity.sphinx_examples import assert_close

PIXELS = pytest.mark.parametrize("case", cases("monkey", has("config.json", "io.safetensors", "full.png")))
TOKENS = pytest.mark.parametrize("case", cases("monkey", has("tokens.json")))
ROLES: Mapping[str, Any] = {"user": "human", "assistant": "assistant"}


@PIXELS
def test_pictures_are_squashed_and_normalised_as_published(case: Path) -> None:
    golden = read_tensors(case / "io.safetensors")
    for told in read_json(case / "config.json")["images"]:
        name, side = told["file"].removesuffix(".png"), told["image_size"]
        pixels_HWC = decode_rgb((case / told["file"]).read_bytes())
        assert np.array_equal(pixels_HWC, golden[f"{name}.rgb_uint8"].numpy()), name
        squashed_HWC = resize_bicubic(pixels_HWC, (side, side), passes="pillow")
        assert_close(torch.from_numpy(squashed_HWC.copy()), golden[f"{name}.resized_uint8"], 0, name)
        pixels = normalise(torch.from_numpy(squashed_HWC.transpose(2, 0, 1).copy())[None])
        assert_close(pixels[0], golden[f"{name}.normalized"], 1e-5, name)
        assert_close(overview(pixels, told["window"])[0], golden[f"{name}.global"], 1e-5, f"global view of {name}")


@pytest.mark.slow
@PIXELS
def test_columns_first_is_what_pillow_gives_wherever_the_picture_shrinks_no_faster_in_height(case: Path) -> None:
    golden = read_tensors(case / "io.safetensors")
    told = next(told for told in read_json(case / "config.json")["images"] if told["w"] > told["h"])
    source = decode_rgb((case / told["file"]).read_bytes())
    squashed = resize_bicubic(source, (told["image_size"],) * 2)
    assert_close(torch.from_numpy(squashed.copy()), golden[told["file"].replace(".png", ".resized_uint8")], 0, "wide")


@pytest.mark.slow
@PIXELS
def test_windows_of_the_published_size_hold_the_golden_points(case: Path) -> None:
    golden, told = read_tensors(case / "io.safetensors"), read_json(case / "config.json")["full"]
    pixels_HWC = decode_rgb((case / told["file"]).read_bytes())
    squashed = resize_bicubic(pixels_HWC, (told["image_size"],) * 2, passes="pillow").transpose(2, 0, 1)
    pixels = normalise(torch.from_numpy(squashed.copy())[None])
    cut, whole = windows(pixels, told["window"])[:, 0], overview(pixels, told["window"])[0]
    y, x = golden["full.points_yx"].long().T
    assert_close(cut[:, :, y, x], golden["full.window_values"], 1e-5, "windows")
    assert_close(whole[:, y, x], golden["full.global_values"], 1e-5, "global view")
    assert_close(cut.mean((2, 3)), golden["full.window_means"], 1e-5, "means")
    assert_close(cut.std((2, 3)), golden["full.window_stds"], 1e-5, "deviations")
    assert_close(whole.mean((1, 2)), golden["full.global_mean"], 1e-5, "mean")


@PIXELS
def test_windows_come_row_by_row_and_what_is_left_over_goes(case: Path) -> None:
    golden = read_tensors(case / "io.safetensors")
    names = [name.removesuffix(".input") for name in golden if re.fullmatch(r"window_order\.\w+\.input", name)]
    assert names
    for name in names:
        expected = golden[f"{name}.windows"]
        assert_close(windows(golden[f"{name}.input"][None, None], expected.shape[-1])[:, 0, 0], expected, 0, name)


@PIXELS
def test_tables_of_positions_are_the_goldens(case: Path) -> None:
    golden = read_tensors(case / "io.safetensors")
    for name, expected in golden.items():
        if match := re.fullmatch(r"abs_pos\.to_(\d+)", name):
            assert_close(resize_table(golden["abs_pos.src"], int(match[1])), expected, 1e-5, name)
        if match := re.fullmatch(r"sincos\.dim(\d+)_grid(\d+)(_values)?", name):
            table = sincos_table(int(match[1]), int(match[2]))
            rows = golden[name.replace("values", "rows")].long() if match[3] else slice(None)
            assert_close(table[rows], expected, 1e-5, name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QwenTokenizer:
    """Qwen's own vocabulary."""
    loaded = load_tokenizer(vocabulary(tmp_path_factory.mktemp("qwen")))
    assert isinstance(loaded, QwenTokenizer)
    return loaded


@pytest.mark.slow
@TOKENS
def test_texts_have_the_published_ids_and_come_back(case: Path, tokenizer: QwenTokenizer) -> None:
    golden = read_json(case / "tokens.json")
    assert (tokenizer.vocab_size, tokenizer.num_ranks) == (golden["n_vocab"], golden["n_mergeable"])
    assert {token: tokenizer.control_id(token) for token in golden["special_ids"]} == golden["special_ids"]
    for told in golden["encode"]:
        assert tokenizer.encode(told["text"]) == told["ids"]
        assert tokenizer.decode(told["ids"]) == told["decoded_skip_special"]
        ids, begins, ends = tokenizer.encode_spans(told["text"])
        assert ids == told["ids"]
        assert [*begins[1:], *ends[-1:]] == ends, "nothing of the text is left to nobody"


def processor_of(tokenizer: QwenTokenizer, golden: Mapping[str, Any], **changes: Any) -> MonkeyProcessor:
    """A processor whose pictures are small and take as many positions as published."""
    settings = {"height_px": 28, "width_px": 14, "num_views": 5, "question": VERBATIM}
    settings |= {"image_rows": golden["img_token_span"], "max_tokens": 4096, **changes}
    return MonkeyProcessor(tokenizer=str(tokenizer.path), **settings)


def sample_of(turns: Sequence[Mapping[str, str]]) -> Sample:
    """A conversation with a picture for every tag in it."""
    said = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in turns)
    num_pictures = sum(len(split_at_pictures(turn.text)) - 1 for turn in said)
    picture = png(np.full((9, 7, 3), 200, np.uint8))
    return Sample("k", "golden", "golden", said, (picture,) * num_pictures)


def assert_row(example: Example, ids: Sequence[int], special: Mapping[str, int]) -> None:
    """Equal to published ids, where what stands between the picture's tags is a path."""
    golden = np.array(ids)
    inside = np.cumsum(golden == special["<img>"]) - np.cumsum(golden == special["</img>"])
    is_row = (inside > 0) & (golden != special["<img>"])
    assert ((example.slots == Slot.IMAGE) == is_row).all()
    assert example.ids[~is_row].tolist() == golden[~is_row].tolist()


@pytest.mark.slow
@TOKENS
def test_conversations_become_the_published_rows_labels_and_masks(case: Path, tokenizer: QwenTokenizer) -> None:
    golden = read_json(case / "tokens.json")
    for told in golden["train"]:
        sample, room = sample_of(told["conversations"]), told["max_len"]
        quirks = ["single_turn", "padded", "untaught_samples"]
        settings = {"max_tokens": room, "too_long": "truncate_text"}
        example = processor_of(tokenizer, golden, quirks=quirks, **settings)(sample)
        assert_row(example, told["input_ids"], golden["special_ids"])
        assert example.labels.tolist() == told["labels"]
        num_real = sum(told["attention_mask"])
        assert (example.labels[num_real:] == IGNORE).all()
        if num_real < room and len(told["conversations"]) == 2:  # ours: as long as it is, and the same
            ours = processor_of(tokenizer, golden, **settings)(sample)
            assert ours.labels.tolist() == told["labels"][:num_real]
            assert_row(ours, told["input_ids"][:num_real], golden["special_ids"])


@pytest.mark.slow
@TOKENS
def test_tags_of_pictures_that_published_code_refuses_are_refused(case: Path, tokenizer: QwenTokenizer) -> None:
    golden = read_json(case / "tokens.json")
    for told in golden["image_errors"]:
        if "</img>" in told["text"] and "<img>" in told["text"]:
            continue  # the length of a path is nothing to us: pictures are pixels
        with pytest.raises(ValueError, match="has no partner"):
            split_at_pictures(told["text"])


@pytest.mark.slow
@TOKENS
def test_prompts_of_the_published_evaluation_have_its_ids(case: Path, tokenizer: QwenTokenizer) -> None:
    golden = read_json(case / "tokens.json")
    told, processor = golden["eval_batch"], processor_of(tokenizer, golden)
    for text, ids, mask in zip(told["prompts"], told["input_ids"], told["attention_mask"], strict=True):
        prompt = processor.prompt(sample_of([{"from": "user", "value": text}]))
        assert_row(prompt, [i for i, is_real in zip(ids, mask, strict=True) if is_real], golden["special_ids"])
        assert (prompt.labels == IGNORE).all()


@pytest.mark.slow
@TOKENS
def test_chat_contexts_and_boxes_are_the_published_ones(case: Path, tokenizer: QwenTokenizer) -> None:
    golden = read_json(case / "tokens.json")
    special = golden["special_ids"]
    picture = [special["<img>"], *[special["<imgpad>"]] * golden["img_token_span"], special["</img>"]]

    def encode(text: str) -> list[int]:
        """Ids in which a picture has its whole span: a history must fit with its pictures."""
        first, *others = map(tokenizer.encode, split_at_pictures(text))
        return first + [i for piece in others for i in picture + piece]

    for told in golden["chatml"]:
        history = [(question, answer) for question, answer in told["history"]]
        text, ids = chat_context(encode, told["query"], history=history, system=told["system"])
        assert text == told["raw_text"]
        assert _without_paths(ids, special) == _without_paths(told["ids"], special)
    for told in golden["boxes_from_reply"]:
        found = [{"box": list(b.box)} | ({"ref": b.ref} if b.ref is not None else {}) for b in boxes_of(told["text"])]
        assert found == told["boxes"]
    for told in golden["from_list_format"]:
        written = {"text": lambda part: part["text"], "ref": lambda part: write_box(part["ref"], part["box"])}
        kinds = [next((kind for kind in written if kind in part), "image") for part in told["list"]]
        pictures = numbered_pictures(kinds.count("image")).split("Picture")[1:]
        ours = [f"Picture{pictures.pop(0)}" if kind == "image" else written[kind](part)
                for kind, part in zip(kinds, told["list"], strict=True)]  # fmt: skip
        assert "".join(ours) == IMAGE_TAG.join(split_at_pictures(told["text"]))


def _without_paths(ids: Sequence[int], special: Mapping[str, int]) -> list[int]:
    kept, is_inside = [], False
    for i in ids:
        is_inside = is_inside and i != special["</img>"]
        if not is_inside:
            kept.append(i)
        is_inside = is_inside or i == special["<img>"]
    return kept
