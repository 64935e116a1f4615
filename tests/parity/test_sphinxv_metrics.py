"""SPHINX-V's published scorers: what they gave on their inputs, ours give too."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bestiary.evaluation.captions import CaptionScores, caption_scores
from bestiary.evaluation.judge import gpt_format, parse_score, review_name, summarise, summary_lines
from bestiary.evaluation.scorers import captions, label_pairs, mean, mean_semantic_iou, ocr_accuracy, ocr_pairs
from bestiary.evaluation.scorers import semantic_iou as iou
from bestiary.evaluation.semantic import SentenceEncoder, load_sentence_encoder

from .cases import cases, has, read_json

SYSTEM = "sphinxv"
roc = pytest.mark.parametrize("case", cases(SYSTEM, has("roc_predictions.json", "roc_scores.json")))
ocr = pytest.mark.parametrize("case", cases(SYSTEM, has("ocr_predictions.json", "ocr_scores.json")))
caption = pytest.mark.parametrize("case", cases(SYSTEM, has("caption_predictions.json", "caption_scores.json")))
judge = pytest.mark.parametrize("case", cases(SYSTEM, has("judge_summary.json")))


@cache
def encoder() -> SentenceEncoder:
    return load_sentence_encoder()


def roc_pairs(case: Path) -> list[list[Any]]:
    items = read_json(case / "roc_predictions.json")
    return [label_pairs(item["prediction"], item["answer"], reference_quirks=True) for item in items]


@roc
def test_regions_are_read_and_overlap_as_published(case: Path) -> None:
    true = read_json(case / "roc_scores.json")
    pairs = [pair for item in roc_pairs(case) for pair in item]
    assert len(pairs) == true["n"]
    read = [
        (i, p.predicted, p.truth, iou(p.predicted, p.truth)) for i, item in enumerate(roc_pairs(case)) for p in item
    ]
    assert read == [(p["item"], p["pred"], p["gt"], p["s_iou"]) for p in true["pairs"]]
    assert mean_semantic_iou(pairs) == true["semantic_iou"]


@roc
def test_semantic_similarity_is_the_published_one(case: Path) -> None:
    true = read_json(case / "roc_scores.json")
    similarity = encoder().similarity([pair for item in roc_pairs(case) for pair in item]).tolist()
    assert similarity == pytest.approx([p["ss"] for p in true["pairs"]], abs=1e-4)
    assert mean(similarity) == pytest.approx(true["semantic_similarity"], abs=1e-4)


@ocr
def test_ocr_accuracy_is_the_published_one(case: Path) -> None:
    true = read_json(case / "ocr_scores.json")
    items = read_json(case / "ocr_predictions.json")
    pairs = [ocr_pairs(item["answer"], item["annotation"], reference_quirks=True) for item in items]
    read = [{"pred": [p.predicted for p in item], "gt": [p.truth for p in item]} for item in pairs]
    assert read == true["per_item"]
    assert ocr_accuracy([p for item in pairs for p in item], reference_quirks=True) == true["overall_acc"]


@caption
def test_region_captions_are_read_as_published(case: Path) -> None:
    given, true = read_json(case / "caption_predictions.json"), read_json(case / "caption_scores.json")
    for extraction in true["extract_region_descriptions"]:
        assert captions(extraction["text"], reference_quirks=True) == extraction["out"]
    for raw, side in (("raw_predictions", "res"), ("raw_gt", "gts")):
        read = [captions(text, reference_quirks=True) for text in given[raw]]
        assert read == [entries[0]["caption"] for entries in given[side].values()]


def scored(case: Path, *metrics: str) -> CaptionScores:
    given = read_json(case / "caption_predictions.json")
    references = {key: [text for e in entries for text in e["caption"]] for key, entries in given["gts"].items()}
    predictions = {key: entries[0]["caption"][0] for key, entries in given["res"].items()}
    return caption_scores(references, predictions, metrics=metrics)


def assert_same_score(scores: CaptionScores, true: Any, name: str, tolerance: float) -> None:
    assert scores.overall[name] == pytest.approx(true["overall"][name], abs=tolerance)
    assert {image["image_id"] for image in true["per_image"]} == set(scores.per_key)
    for image in true["per_image"]:
        assert scores.per_key[image["image_id"]][name] == pytest.approx(image[name], abs=tolerance)


@caption
def test_captions_are_tokenised_and_cider_is_the_published_one(case: Path) -> None:
    true = read_json(case / "caption_scores.json")
    scores = scored(case, "CIDEr", "Bleu", "ROUGE_L")
    assert scores.references == true["tokenized_gts"]
    assert scores.predictions == true["tokenized_res"]
    assert_same_score(scores, true, "CIDEr", 1e-6)
    if extra := true.get("extra_not_in_reference_script"):
        assert [scores.overall[f"Bleu_{i}"] for i in range(1, 5)] == pytest.approx(extra["Bleu_1to4"], abs=1e-6)
        assert scores.overall["ROUGE_L"] == pytest.approx(extra["ROUGE_L"], abs=1e-6)


@caption
@pytest.mark.slow
def test_meteor_is_the_published_one(case: Path) -> None:
    assert_same_score(scored(case, "METEOR"), read_json(case / "caption_scores.json"), "METEOR", 1e-4)


@pytest.mark.parametrize("case", cases(SYSTEM, has("judge_parse_score.json")))
def test_judge_scores_are_parsed_as_published(case: Path) -> None:
    for review in read_json(case / "judge_parse_score.json"):
        assert parse_score(review["review"], reference_quirks=True) == tuple(review["tuple"]), review["review"]


@judge
def test_judge_summary_is_the_published_one(case: Path) -> None:
    true = read_json(case / "judge_summary.json")
    names = true["order"].split(": ")[1].split(", ")
    files = [next(path for path in case.glob("judge_reviews_*.jsonl") if path.name.endswith(name)) for name in names]
    summaries = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        summaries.append(summarise([json.loads(line) for line in lines], reference_quirks=True))
    assert summaries == true["metrics"]
    assert [list(summary) for summary in summaries] == [list(metrics) for metrics in true["metrics"]]
    printed = [
        line
        for name, summary in zip(names, summaries, strict=True)
        for line in summary_lines(review_name(Path(name)), summary)
    ]
    assert [*printed, ""] == true["stdout"]


@pytest.mark.parametrize("case", cases(SYSTEM, has("mdvp_gpt_format.json")))
@pytest.mark.parametrize("reference_quirks", [True, False])
def test_mdvp_items_are_converted_as_published(case: Path, reference_quirks: bool) -> None:
    given = read_json(case / "mdvp_gpt_format.json")
    converted = gpt_format(given["bench"], given["results"], reference_quirks=reference_quirks)
    assert converted == {name: given[name] for name in ("question", "answer", "prediction")}
