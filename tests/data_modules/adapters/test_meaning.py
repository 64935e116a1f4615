"""What adapters read means what the published loaders mean: their stored ids and prompts come out of our samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bestiary.schema import IGNORE, RegionKind, Sample, Slot
from tests.data_modules.adapters.making import adapted, adapter, picture, put, put_json, stored
from tests.parity.cases import cases, has, read_json

SPHINX = cases("sphinx", has("tokens.json"))
SPHINX_V = cases("sphinxv", has("annotations.json", "dataset_items.safetensors", "config.json", "tokenizer.model"))
OVIS = cases("ovis", has("captions.parquet", "conversations.json", "meta.json", "items.safetensors"))
IMAGE_ID = -200


@pytest.mark.parametrize("case", SPHINX_V)
def test_annotations_with_marks_become_the_published_tensors(case: Path, tmp_path: Path) -> None:
    from bestiary.variants.sphinx_v.processor import SphinxVProcessor

    golden, config = load_file(case / "dataset_items.safetensors"), read_json(case / "config.json")
    samples, _ = adapted(adapter("mdvp", case / "annotations.json", case / "images"))
    by_length = sorted(stored(tmp_path / "shards", samples), key=lambda s: sum(len(turn.text) for turn in s.turns))
    num_slots = len(golden["0.sparse_vp"])
    processor = SphinxVProcessor(
        tokenizer=str(case / "tokenizer.model"),
        num_slots=num_slots,
        canvas_px=config["image_size"],
        image_rows=config["image_words"] - num_slots - 2,
        num_views=5,
        max_tokens=config["max_words"],
        reference_quirks=True,
    )
    for entry in config["items"]:
        sample = by_length[entry["index"]]
        assert (sample.meta["image"], sample.turns[0].text) == (entry["image"], entry["first_question"])
        ours = processor(sample, rng=np.random.RandomState(entry["np_seed"]))
        expected = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith(f"{entry['index']}.")}
        is_text = ours.slots == Slot.TEXT
        assert ours.ids[is_text].tolist() == expected["input_ids"][: is_text.sum()].tolist()
        learned = np.where(ours.labels == IGNORE, 0, ours.labels)[is_text]
        assert learned.tolist() == expected["labels"][: is_text.sum()].tolist()
        rows = ours.regions
        assert rows is not None
        coords = np.array(rows.coords)
        coords[np.asarray(rows.kinds) == RegionKind.POINT, 2:] = -1
        np.testing.assert_allclose(coords, expected["sparse_vp"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", SPHINX)
def test_dialogs_and_single_turns_become_the_published_ids(case: Path, tmp_path: Path) -> None:
    from bestiary.variants.sphinx.processor import SphinxProcessor

    golden = read_json(case / "tokens.json")
    published = golden["per_tokenizer"]["tiny"]
    tokenizer = next(path for up in (case, *case.parents[:1]) for path in sorted(up.glob("tiny*.model")))

    def processor(template: str) -> SphinxProcessor:
        return SphinxProcessor(
            tokenizer=str(tokenizer),
            canvas_px=8,
            image_rows=golden["image_words"],
            num_views=1,
            max_tokens=golden["max_words"],
            template=template,
            reference_quirks=True,
        )

    root = put(tmp_path / "pictures", x_png=picture())
    forms = (("items", "dialog_head", "current"), ("alpaca_items", "alpaca", "alpaca"))
    for name, stage, template in forms:
        path = put_json(tmp_path / f"{name}.json", golden[name])
        samples, lines = adapted(adapter("sphinx", path, root, keep_empty=True))
        assert not lines
        num_compared = 0
        for sample, expected in zip(stored(tmp_path / name, samples), published[stage], strict=True):
            if "raises" in expected or expected["n_nonpad"] == expected["length_total"]:
                continue
            ours = processor(template)(sample)
            is_text = ours.slots == Slot.TEXT
            assert ours.ids[is_text].tolist() == expected["input_ids"][: expected["n_nonpad"]]
            labels = np.where(ours.labels == IGNORE, 0, ours.labels)[is_text]
            assert labels.tolist() == expected["labels"][: expected["n_nonpad"]]
            num_compared += 1
        assert num_compared >= 3


@pytest.mark.parametrize("case", OVIS)
def test_captions_and_conversations_become_the_published_ids(case: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    golden, items = read_json(case / "meta.json"), load_file(case / "items.safetensors")
    family = golden["model_case"].rpartition("_")[2]
    folder = next(up / "tokenizers" / family for up in case.parents if (up / "tokenizers" / family).is_dir())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        """Ids with a placeholder for every picture, the words around it by themselves."""
        chunks = [tokenizer.encode(chunk, add_special_tokens=False).ids for chunk in text.split("<image>")]
        return [*chunks[0], *(number for chunk in chunks[1:] for number in (IMAGE_ID, *chunk))]

    common = {"image_dir": str(case / "images")}
    sets = {
        "template": {"meta_file": str(case / "captions.parquet"), "data_format": "caption"},
        "conversation": {"meta_file": str(case / "conversations.json"), "data_format": "conversation"},
    }
    sets["notemplate"] = dict(sets["template"])
    sets["template"]["caption_template"] = golden["caption_template"]
    listed = put_json(tmp_path / "info.json", {name: entry | common for name, entry in sets.items()})
    for name in sets:
        samples, _ = adapted(adapter("ovis", listed, dataset=name, keep_empty=True))
        stem = name if name == "conversation" else f"caption.{name}"
        for sample in stored(tmp_path / name, samples):
            expected = items[f"{stem}.{sample.meta['file_record']}.input_ids"].tolist()
            labels = items[f"{stem}.{sample.meta['file_record']}.labels"].tolist()
            if name == "conversation":
                assert ids(_qwen_text(sample)) == expected
                continue
            question, answer = (turn.text for turn in sample.turns)
            learned = tokenizer.encode(answer, add_special_tokens=False).ids
            if all(label == IGNORE for label in labels):
                learned = []  # the published loader could not use this picture and taught nothing
            assert ids(question) + learned == expected
            assert [IGNORE] * len(ids(question)) + learned == labels


def _qwen_text(sample: Sample) -> str:
    """The conversation as version 1.0 writes it for Qwen."""
    names = {"human": "user", "assistant": "assistant"}
    system = sample.meta.get("system", "You are a helpful assistant.")
    said = [("system", system), *((names[turn.role], turn.text) for turn in sample.turns)]
    return "\n".join(f"<|im_start|>{name}\n{text}<|im_end|>" for name, text in said)
