"""Ovis' text, pictures and schedules against the published code, and the names of the published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bestiary.schema import IGNORE, Example, Sample, Slot, Turn
from bestiary.text.tokenizer import load_tokenizer
from bestiary.training.schedule import lr_at_step
from bestiary.variants.ovis import geometry
from bestiary.variants.ovis.canvas import canvas, canvases
from bestiary.variants.ovis.formatters import (
    IMAGE_ID,
    VERSIONS,
    encode_caption,
    encode_chat,
    format_named,
    published_format,
)
from bestiary.variants.ovis.model import build_ovis
from bestiary.variants.ovis.module import whole_warmup
from bestiary.variants.ovis.processor import QUIRKS, OvisProcessor
from bestiary.variants.ovis.temperature import tau_at_step
from bestiary.variants.ovis.visual_tokenizer import HALF
from bestiary.variants.ovis.weights import manifest
from bestiary.vision.encoders import CLIP_MEAN, CLIP_STD, channels
from bestiary.vision.image import decode_rgb
from tests.parity.cases import cases, has, read_json, read_tensors
from tests.parity.ovis_cases import DECODER_SIZES, above, png
from tests.parity.sphinx_examples import assert_close

FORMATS = {"1.0": "v10.json", "1.5": "v15_v16.json", "1.6": "v15_v16.json"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", cases("ovis", has(*set(FORMATS.values()))))
def test_conversations_become_the_published_text_ids_and_labels(folder: Path, version: str) -> None:
    for family, golden in read_json(folder / FORMATS[version]).items():
        tokenizer = load_tokenizer(above(folder, "tokenizers") / Path(golden["tokenizer"]).name)
        form = format_named(version, family)
        for told in golden["format"]:
            talk = [dict(message) for message in told["conversations"]]
            chat = published_format(form, tokenizer, talk, preface=told.get("generation_preface"))
            assert (chat.text, chat.ids, chat.labels) == (told["prompt"], told["input_ids"], told["labels"])
            assert talk == told["conversations"], "the argument is left alone"
            published_format(form, tokenizer, talk, mutate=True)
            assert told.get("mutated_argument", talk != told["conversations"]) == (talk != told["conversations"])
        for told in golden["query"]:
            chat = encode_chat(form, tokenizer, [("human", told["query"])], preface=told["generation_preface"])
            assert (chat.text, chat.ids) == (told["prompt"], told["input_ids"])


@pytest.mark.parametrize("folder", cases("ovis", has("v10.json")))
def test_captions_become_the_published_ids_and_labels(folder: Path) -> None:
    for golden in read_json(folder / "v10.json").values():
        tokenizer = load_tokenizer(above(folder, "tokenizers") / Path(golden["tokenizer"]).name)
        for told in golden["caption"]:
            template, words = told["caption_template"] or "<image>", told["caption"]
            words = words if told["caption_template"] else words.replace("<image>", "")
            chat = encode_caption(tokenizer, template, words)
            assert (chat.ids, chat.labels) == (told["input_ids"], told["labels"])


@pytest.mark.parametrize("folder", cases("ovis", has("resize_pad_geometry.json")))
def test_pictures_are_resized_and_placed_as_published(folder: Path) -> None:
    for told in read_json(folder / "resize_pad_geometry.json"):
        if 0 in told["resized_wh"]:
            with pytest.raises(ValueError, match=f"{told['w']}x{told['h']} pixels is too thin"):
                geometry.fit_inside(told["w"], told["h"], told["side"])
            continue
        size = geometry.fit_inside(told["w"], told["h"], told["side"])
        assert [list(size), list(geometry.paste_at(size, told["side"]))] == [told["resized_wh"], told["offset_xy"]]


@pytest.mark.parametrize("folder", cases("ovis", has("v15_s2wrapper.json", "v16_partition.json")))
def test_views_grids_and_placeholders_are_the_published_ones(folder: Path) -> None:
    for told in read_json(folder / "v15_s2wrapper.json"):
        width, height, side = told["w"], told["h"], told["side"]
        boxes: tuple[geometry.Box, ...] = ((0, 0, width, height),)
        if told["hd_booster"] == "s2wrapper" or geometry.has_quarters(width, height, side):
            boxes += geometry.quarters(width, height)
        sizes = [list(geometry.fit_inside(x1 - x0, y1 - y0, side)) for x0, y0, x1, y1 in boxes]
        assert (sizes, len(boxes) < 5) == (told["resized_wh"], told["has_inf"])
    for side, limit, width, height, *expected in read_json(folder / "v16_partition.json"):
        grid = geometry.best_grid(width, height, side, limit)
        assert [*grid, len(geometry.crops(width, height, grid))] == expected
    for name, ids in read_json(folder / "v16_placeholders.json").items():
        rows, columns = map(int, name.split("x"))
        pieces = geometry.grid_pieces((rows, columns))
        assert [-300 if piece == geometry.WHOLE else -301 - piece for piece in pieces] == ids


@pytest.mark.parametrize("folder", cases("ovis", has("pixels.safetensors", "v16_pixels.safetensors")))
def test_pixels_are_the_published_ones(folder: Path) -> None:
    golden = read_tensors(folder / "pixels.safetensors")
    images = {name.partition(".")[2]: x.numpy() for name, x in golden.items() if name.startswith("image.")}
    images |= {name: x.numpy() for name, x in golden.items() if name in ("image_gray", "image_rgba")}
    for name, expected in golden.items():
        if not name.endswith("pixel_values"):
            continue
        words = name.split(".")
        kind = words[1] if words[0] in images else words[0]
        pixels_HWC = decode_rgb(png(images[words[0] if words[0] in images else words[2]]))
        height, width, _ = pixels_HWC.shape
        ours = canvas(pixels_HWC, (0, 0, width, height), expected.shape[-1])[None]
        assert_close(normalised_views(ours, kind), expected, 1e-5, name)
    golden = read_tensors(folder / "v16_pixels.safetensors")
    for name, expected in golden.items():
        if name.endswith("pixel_values"):
            kind, _, number, _ = name.split(".")
            pixels_HWC = golden[f"image.{number}"].numpy()
            height, width, _ = pixels_HWC.shape
            side = expected.shape[-1]
            boxes = geometry.crops(width, height, geometry.best_grid(width, height, side, 9))
            assert_close(normalised_views(canvases(pixels_HWC, boxes, side), kind), expected, 1e-5, name)


def normalised_views(canvas_N4SS: np.ndarray, kind: str) -> Tensor:
    """Published pixels of canvases of one view."""
    planes = torch.from_numpy(canvas_N4SS).float()
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else (HALF, HALF)
    return (planes[:, :3] / 255 - channels(mean, planes)) / channels(std, planes) * (planes[:, 3:] > 0)


@pytest.fixture(params=cases("ovis", has("meta.json", "items.safetensors", "conversations.json")))
def data_set(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], dict[str, Tensor], OvisProcessor]:
    """Files, facts and published items of a data set, and the processor with every quirk."""
    folder: Path = request.param
    meta, items = read_json(folder / "meta.json"), read_tensors(folder / "items.safetensors")
    version, _, family = meta["model_case"].partition("_")
    processor = OvisProcessor(
        tokenizer=str(above(folder, "tokenizers") / family),
        version={"v10": "1.0"}[version],
        chat_format=family,
        canvas_px=meta["image_side"][0],
        image_rows=16,
        num_views=1,
        num_marks=2,
        max_tokens=4096,
        quirks=QUIRKS,
    )
    return folder, meta, items, processor


def read_picture(folder: Path, name: str) -> bytes:
    """A picture's file; a missing one is empty."""
    path = folder / "images" / name
    return path.read_bytes() if path.is_file() else b""


def assert_item(example: Example, items: dict[str, Tensor], stem: str) -> None:
    """The published item with its placeholder replaced by rows between marks."""
    ids, labels = items[f"{stem}.input_ids"], items[f"{stem}.labels"]
    assert example.ids[example.slots == Slot.TEXT].tolist() == ids[ids != IMAGE_ID].tolist()
    assert example.labels[example.slots == Slot.TEXT].tolist() == labels[ids != IMAGE_ID].tolist()
    assert (example.labels[example.slots != Slot.TEXT] == IGNORE).all()
    if len(example.pixels) and f"{stem}.pixel_values" in items:
        assert_close(normalised_views(example.pixels, "clip"), items[f"{stem}.pixel_values"], 1e-5, stem)


def test_caption_items_are_the_published_ones_with_their_quirks(data_set: Any) -> None:
    folder, meta, items, processor = data_set
    for form, template in (("template", meta["caption_template"]), ("notemplate", "<image>")):
        for number, (caption, name) in enumerate(meta["captions"]):
            turns = (Turn("human", template), Turn("assistant", caption or ""))
            images = (read_picture(folder, name),)
            sample = Sample(str(number), "golden", "golden", turns, images, meta={"data_format": "caption"})
            example = processor(sample)
            assert_item(example, items, f"caption.{form}.{number}")
            assert processor.lengths(sample)[:2] == (len(example), example.num_views)
            assert example.pixels[:, 3].any() == (name not in meta["invalid"])


def test_conversation_items_are_the_published_ones_with_their_quirks(data_set: Any) -> None:
    folder, _, items, processor = data_set
    for number, record in enumerate(read_json(folder / "conversations.json")):
        said, images = record["conversations"], tuple(read_picture(folder, n) for n in record.get("image", []))
        about = {"system": said[0]["value"]} if said[0]["from"] == "system" else {}
        turns = [Turn("human" if m["from"] == "human" else "assistant", m["value"]) for m in said[len(about) :]]
        example = processor(Sample(str(number), "golden", "golden", tuple(turns), images, meta=about))
        assert_item(example, items, f"conversation.{number}")
        length = int(items["collated.attention_mask"][number].sum())
        assert (
            items["collated.input_ids"][number, :length].tolist() == items[f"conversation.{number}.input_ids"].tolist()
        )


@pytest.mark.parametrize("folder", cases("ovis", has("tau.json")))
def test_the_temperature_falls_as_published(folder: Path) -> None:
    told = read_json(folder / "tau.json")
    ends = {"max_tau": told["visual_max_tau"], "min_tau": told["visual_min_tau"]}
    ours = [tau_at_step(step, told["max_steps"], **ends) for step in range(len(told["tau_at_step"]))]
    assert ours == pytest.approx(told["tau_at_step"], rel=1e-12)


@pytest.mark.parametrize("folder", cases("ovis", has("lr_schedule.json")))
def test_the_learning_rate_has_the_published_warm_up_of_whole_steps(folder: Path) -> None:
    told = read_json(folder / "lr_schedule.json")
    total, warmup = told["total_steps"], whole_warmup(told["warmup_ratio"], told["total_steps"])
    assert round(warmup * total) == told["warmup_steps"]
    ours = [lr_at_step(step, total, lr=told["learning_rate"], warmup=warmup) for step in range(total)]
    assert ours == pytest.approx(told["lr_at_step"], rel=1e-9, abs=1e-18)


def _manifests(folder: Path) -> dict[str, Any]:
    names = {path.name.removesuffix(".xz") for path in folder.glob("*.json*")}
    parsed = {name: read_json(folder / name) for name in sorted(names)}
    return {
        n: m for n, m in parsed.items() if isinstance(m, dict) and {"params", "_clip_config", "_llm_config"} <= m.keys()
    }


@pytest.mark.slow
@pytest.mark.parametrize("folder", cases("ovis", lambda folder: bool(_manifests(folder))))
def test_names_and_shapes_of_the_published_models_are_ours(folder: Path) -> None:
    for name, golden in _manifests(folder).items():
        llm, clip, params = golden["_llm_config"], golden["_clip_config"], golden["params"]
        vision = {
            "backbone": {
                "kind": "clip",
                "image_px": clip["image_size"],
                "patch_px": clip["patch_size"],
                "width": clip["hidden_size"],
                "layers": clip["num_hidden_layers"],
                "heads": clip["num_attention_heads"],
                "mlp_dim": clip["intermediate_size"],
                "activation": clip["hidden_act"],
            },
            "vocab_size": params["vte.weight"][0],
            "num_marks": params["vte.weight"][0] - params["visual_tokenizer.head.0.weight"][0],
        }
        family = "qwen2" if "Qwen" in name else "llama"
        with torch.device("meta"):
            model = build_ovis(
                vision=vision, decoder={"family": family, **{k: llm[k] for k in DECODER_SIZES if k in llm}}
            )
        assert manifest(model) == {key: tuple(shape) for key, shape in params.items()}
        assert sum(p.numel() for p in model.parameters()) == golden["_counts"]["total"]
