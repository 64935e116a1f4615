"""Stages: which parameters train, in which groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bestiary.config import Optimizer
from bestiary.training.stages import (
    apply_stage,
    build_optimizer,
    cast_frozen,
    parameter_groups,
    parameter_rows,
    parameter_table,
    set_lr,
    set_train_mode,
)
from tests.training.tiny import tiny_model, tiny_stage


def test_freeze_rules_are_taken_out_of_what_trains() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage(train=["head.*", "embed.*"], freeze=["*.bias"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "embed.weight"}


@pytest.mark.parametrize(("rule", "glob"), [("train", "haed.*"), ("freeze", "encodr.*")])
def test_a_glob_without_a_match_raises_and_names_the_nearest(rule: str, glob: str) -> None:
    with pytest.raises(ValueError, match=rf"stage tiny: {rule}: glob '{glob[:4]}.*nearest: .*(head|encoder)"):
        apply_stage(tiny_model(), tiny_stage(**{rule: [glob]}))


def test_a_stage_that_trains_nothing_raises() -> None:
    with pytest.raises(ValueError, match="nothing trains"):
        apply_stage(tiny_model(), tiny_stage(freeze=["*"]))


def test_frozen_modules_stay_in_eval_mode() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    model.eval()
    set_train_mode(model)
    assert not model.encoder.training and not model.encoder[1].training
    assert model.training and model.dropout.training and model.head.training


def test_groups_split_by_decay_and_learning_rate() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    groups = parameter_groups(model, Optimizer(lr=1.0, weight_decay=0.1, lr_scale={"head.*": 0.1}))
    found = {name: (g["weight_decay"], g["lr_scale"]) for g in groups for name in g["names"]}
    assert found == {
        "embed.weight": (0.1, 1.0),
        "blocks.0.weight": (0.1, 1.0),
        "blocks.0.bias": (0.0, 1.0),
        "norm.weight": (0.0, 1.0),
        "norm.bias": (0.0, 1.0),
        "head.weight": (0.1, 0.1),
        "head.bias": (0.0, 0.1),
    }


def test_a_learning_rate_factor_for_nothing_that_trains_raises() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    with pytest.raises(ValueError, match="lr_scale"):
        parameter_groups(model, Optimizer(lr=1.0, lr_scale={"encoder.*": 0.1}))


def test_the_optimiser_is_fused_and_takes_the_schedules_rate() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    optimizer = build_optimizer(model, Optimizer(lr=1.0, lr_scale={"head.*": 0.5}))
    set_lr(optimizer, 0.2)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2, 0.1}
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_table_counts_every_parameter_once() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    rows = parameter_rows(model, depth=1)
    assert sum(total for _, total, _ in rows) == sum(p.numel() for p in model.parameters())
    assert dict((part, trains) for part, _, trains in rows)["encoder"] == 0
    assert "total" in parameter_table(model)


def test_the_table_works_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10_000, 100_000))
    assert "1,000,100,000" in parameter_table(model, depth=1)


def test_frozen_weights_can_be_held_in_half_precision() -> None:
    model = tiny_model()
    apply_stage(model, tiny_stage())
    cast_frozen(model, torch.bfloat16)
    assert model.encoder[0].weight.dtype == torch.bfloat16 and model.head.weight.dtype == torch.float32
