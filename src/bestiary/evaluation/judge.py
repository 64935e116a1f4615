"""The MDVP-Bench judge's bookkeeping: converter, score parsing, summary. Asking the judge is someone else's job.

A judge reads a question, the reference answer (assistant 1) and a model's answer (assistant 2) and opens its review
with two scores from 1 to 10. Source: Draw-and-Understand @ 28a1bd1, accessory/eval/MDVP-Bench (summary: LLaVA's).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FAILED = (-1.0, -1.0)
"""What the published parser returns for a review without two scores."""


def parse_score(review: str, *, reference_quirks: bool = False) -> tuple[float, float] | None:
    """(reference's, model's) score from the first line of a review, or None if it has not exactly two numbers.

    reference_quirks: commas become spaces and single spaces separate, so `7, 6` and a trailing space fail; a failure
    is (-1, -1), which the published summary averages in.
    """
    line = review.split("\n")[0]
    parts = line.replace(",", " ").split(" ") if reference_quirks else re.split(r"[\s,;/]+", line.strip())
    failed = FAILED if reference_quirks else None
    if len(parts) != 2:
        return failed
    try:
        return float(parts[0]), float(parts[1])
    except ValueError:
        return failed


def summarise(reviews: Iterable[Mapping[str, Any]], *, reference_quirks: bool = False) -> dict[str, float]:
    """Model's mean score as a percentage of the reference's, over "all" and by category in sorted order.

    reviews: records with `category` and `tuple` (reference's score, model's score). Failed reviews (None or negative)
    are left out, unless `reference_quirks`.
    """
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for review in reviews:
        pair = review["tuple"]
        if not reference_quirks and (pair is None or min(pair) < 0):
            continue
        for name in ("all", review["category"]):
            scores[name].append((float(pair[0]), float(pair[1])))
    if not scores:
        raise ValueError("no judge review holds two scores; nothing to summarise")
    names = ["all", *sorted(name for name in scores if name != "all")]
    return {name: _percentage(scores[name], decimals=3 if reference_quirks else None) for name in names}


def summary_lines(name: str, summary: Mapping[str, float]) -> list[str]:
    """The summary as the published tool prints it: a title, one line a category, a rule."""
    return [name, *(f"{category} {value}" for category, value in summary.items()), "=" * 33]


def review_name(path: Path) -> str:
    """The title of a file of reviews: its stem without the tool's prefix."""
    return path.name.removesuffix(".jsonl").replace("gpt4_text_", "")


def gpt_format(
    bench: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    *,
    category: str | None = None,
    reference_quirks: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Benchmark items and results as the judge's three lists `question`, `answer`, `prediction`, ids 1..n.

    bench: items of an MDVP-Bench file. results: records with image_name, question_id, prediction, answer.
    category: None takes the items' `dataset_name`.
    reference_quirks: results are taken as they come; otherwise each item finds its own by image and question id, and a
    missing one raises.
    """
    if not reference_quirks:
        results = _in_order_of(bench, results)
    lists: dict[str, list[dict[str, Any]]] = {"question": [], "answer": [], "prediction": []}
    for i, item in enumerate(bench, start=1):
        kind = "bbox" if "bbox" in item else "points"
        annotation = {kind: item[kind], "segmentation": []}
        head = _head(i, item, category or str(item["dataset_name"]))
        lists["question"].append({**head, "text": item["question"], "annotation": annotation})
    for i, result in enumerate(results, start=1):
        head = _head(i, result, category or str(bench[min(i, len(bench)) - 1]["dataset_name"]))
        lists["answer"].append({**head, "text": result["answer"]})
        lists["prediction"].append({**head, "text": result["prediction"]})
    return lists


def _head(i: int, item: Mapping[str, Any], category: str) -> dict[str, Any]:
    return {"question_id": i, "image": item["image_name"], "category": category}


def _in_order_of(bench: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found = {(result["image_name"], result["question_id"]): result for result in results}
    keys = [(item["image_name"], item["question_id"]) for item in bench]
    if missing := [key for key in keys if key not in found]:
        raise ValueError(
            f"no prediction for question {missing[0][1]} on {missing[0][0]} ({len(missing)} of {len(keys)} missing); "
            "run the model on the whole file before judging"
        )
    return [found[key] for key in keys]


def _percentage(pairs: Sequence[tuple[float, float]], *, decimals: int | None) -> float:
    """Model's mean over the reference's, in percent; the published summary rounds both means to 3 decimals first."""
    reference, model = np.asarray(pairs, dtype=np.float64).mean(axis=0).tolist()
    if decimals is not None:
        reference, model = round(reference, decimals), round(model, decimals)
    return float(round(model / reference * 100, 2))
