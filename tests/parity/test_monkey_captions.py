"""Monkey's published description pipeline: thresholds, equal captions, the merged form and the words of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bestiary.description.filters import iou, without_repeats
from bestiary.description.merging import Levels
from bestiary.description.prompts import summary_prompt
from bestiary.description.words import Described
from tests.parity.cases import cases, has, read_json

CASES = pytest.mark.parametrize("case", cases("monkey", has("pipeline.json")))


def _levels(inputs: dict[str, Any]) -> dict[str, Levels]:
    """What each step said, by picture; a picture may be missing from any step but the first."""

    def said(step: str, img_id: str) -> tuple[Described, ...]:
        found = next((one["objects"] for one in inputs[step] if one["img_id"] == img_id), [])
        return tuple(Described(one["caption"], tuple(one["box"]), one["score"]) for one in found)

    return {
        img_id: Levels(one["blip2_caption"], said("grit", img_id), said("sam", img_id), said("ppocr", img_id))
        for one in inputs["blip2"]
        for img_id in [one["img_id"]]
    }


@CASES
def test_outputs_of_the_steps_become_the_published_annotation_and_prompt(case: Path) -> None:
    golden = read_json(case / "pipeline.json")
    kept = {img_id: found.kept(overlap="published") for img_id, found in _levels(golden["inputs"]).items()}
    assert [found.merged(img_id) for img_id, found in kept.items()] == golden["merged"]
    assert [summary_prompt(found) for found in kept.values()] == golden["prompts"]


@CASES
def test_the_published_overlap_is_reproduced_and_ours_is_the_true_one(case: Path) -> None:
    for told in read_json(case / "pipeline.json")["iou"]:
        a, b = told["a"], told["b"]
        assert iou(a, b, overlap="published") == pytest.approx(told["iou"], abs=1e-9)
        assert iou(b, a, overlap="published") == pytest.approx(told["iou"], abs=1e-9)
        wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(wide, 0) * max(high, 0)
        whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        assert iou(a, b) == pytest.approx(shared / whole, abs=1e-9)


def test_neighbours_with_one_caption_go_by_the_published_overlap_alone() -> None:
    near = tuple(Described("a dog", (left, 0.1, left + 0.1, 0.2), 0.9) for left in (0.1, 0.16))
    assert Levels(segments=near).kept().segments == near
    assert Levels(segments=near).kept(overlap="published").segments == near[:1]


def test_later_boxes_of_a_caption_are_compared_with_the_first_one_alone() -> None:
    def dog(left: float) -> Described:
        return Described("a dog", (left, 0.0, left + 1.0, 1.0), 0.9)

    drift = [dog(0.0), dog(0.5), dog(0.7), dog(0.2)]  # the third lies over the second, the fourth over the first
    assert without_repeats(drift) == [dog(0.0), dog(0.5), dog(0.7)]
    assert without_repeats([dog(0.0), dog(0.25)]) == [dog(0.0)]  # IoU is 0.6 exactly: dropped
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
