"""The grouped order of SPHINX's and SPHINX-V's fine-tuning: the same places for every rank, epoch and start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_modules.grouped_sampler import GroupedSampler, length_groups
from tests.parity.cases import cases, has, read_json


def _sampler(args: dict[str, Any]) -> GroupedSampler:
    return GroupedSampler(
        group_sizes=args["group_sizes"],
        batch_size=args["batch_size"],
        num_ranks=args["num_replicas"],
        accumulation=args["acc_grad"],
        seed=args["seed"],
        shuffle=args.get("shuffle", True),
    )


@pytest.mark.parametrize("case", cases("sphinx", has("sampler.json")))
def test_ranks_take_the_published_places_in_every_epoch(case: Path) -> None:
    for entry in read_json(case / "sampler.json"):
        sampler = _sampler(entry["args"])
        assert len(entry["ranks"]) == sampler.num_ranks
        for golden in entry["ranks"]:
            starts = entry["args"]["epoch_startiter"]
            ours = [sampler.places(golden["rank"], epoch, first_micro_step=start) for epoch, start in starts]
            assert ours == golden["indices_per_epoch"]
            assert len(sampler) == golden["len"]


@pytest.mark.parametrize("case", cases("sphinxv", has("dist_sampler.json")))
def test_ranks_of_sphinxv_take_the_published_places(case: Path) -> None:
    for entry in read_json(case / "dist_sampler.json"):
        sampler = _sampler(entry)
        assert sampler.places(entry["rank"], entry["epoch"], first_micro_step=entry["start_iter"]) == entry["indices"]
        assert len(sampler) == entry["length"]


@pytest.mark.parametrize("case", cases("sphinxv", has("annotations.json", "config.json")))
def test_annotations_stand_in_the_published_order(case: Path) -> None:
    annotations = read_json(case / "annotations.json")
    lengths = [sum(len(turn["value"]) for turn in item["conversations"]) for item in annotations]
    order, sizes = length_groups(["vp"] * len(annotations), lengths)
    assert sizes == [len(annotations)]
    for item in read_json(case / "config.json")["items"]:
        found = annotations[order[item["index"]]]
        assert found["image"] == item["image"]
        assert found["conversations"][0]["value"] == item["first_question"]
