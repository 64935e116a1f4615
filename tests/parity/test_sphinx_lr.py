"""SPHINX's learning rates: per micro step in epochs (fine-tuning) and per iteration (pre-training)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bestiary.training.schedule import lr_at_micro_step, warmup_cosine
from bestiary.training.stages import set_lr
from tests.parity.cases import cases, has, read_json

LAST_GROUP_SCALE = 0.1
"""`scaled_group_last` is the last learning rate of a group with this lr_scale (goldens' README)."""


@pytest.mark.parametrize("folder", cases("sphinx", has("lr.json")))
def test_epoch_schedule_changes_only_where_an_accumulation_begins(folder: Path) -> None:
    for case in read_json(folder / "lr.json")["epoch_schedule"]:
        ours = [lr_at_micro_step(step, **case["args"]) for step in range(len(case["lr_per_micro_step"]))]
        assert ours == pytest.approx(case["lr_per_micro_step"], abs=1e-12, rel=0)


@pytest.mark.parametrize("folder", cases("sphinx", has("lr.json")))
def test_a_scaled_group_gets_its_share(folder: Path) -> None:
    for case in read_json(folder / "lr.json")["epoch_schedule"]:
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": LAST_GROUP_SCALE}
        optimizer = torch.optim.AdamW([group], lr=0.0)
        set_lr(optimizer, lr_at_micro_step(len(case["lr_per_micro_step"]) - 1, **case["args"]))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(case["scaled_group_last"], abs=1e-12, rel=0)


@pytest.mark.parametrize("folder", cases("sphinx", has("lr.json")))
def test_iteration_schedule_holds_its_minimum_after_the_decay(folder: Path) -> None:
    case = read_json(folder / "lr.json")["iter_schedule"]
    runs = case if isinstance(case, list) else [case]
    for run in runs:
        args = run["args"]
        ours = [
            warmup_cosine(
                iteration,
                lr=args["lr"],
                warmup=args["warmup_iters"],
                end=args["lr_decay_iters"],
                min_lr=args["min_lr"],
            )
            for iteration in run["iters"]
        ]
        assert ours == pytest.approx(run["lr"], abs=1e-12, rel=0)
