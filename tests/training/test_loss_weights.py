"""Loss weights: what is minimised is sum(weight * token losses) / sum(weight * tokens), however the batch is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.schema import Batch, Example
from bestiary.training.run_dir import RunDir
from data_modules.collate import collate_rows
from tests.training.tiny import TinyData, tiny_model, tiny_stage, train

WEIGHTS = {"alpha": 2.5, "beta": 0.25}
WHOLE = [[[0, 1], [2, 3], [4, 5]]]
"""Micro-batches of rows of sample numbers."""
LAYOUTS = [
    WHOLE,
    [[[0, 1]], [[2, 3]], [[4, 5]]],
    [[[0], [1], [2], [3], [4], [5]]],
    [[[5, 0, 3]], [[1], [2, 4]]],
]


class Fixed(TinyData):
    """The same six samples at every step, in the micro-batches and rows it is told."""

    def __init__(self, layout: list[list[list[int]]], weights: Mapping[str, float]) -> None:
        super().__init__(lanes=sum(map(len, layout)), weights=weights)
        self.layout = layout

    def samples(self) -> list[Example]:
        return [example for lane in range(4) for example in self.row(lane, 0)]

    def step_of(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        samples, first, batches = self.samples(), 0, []
        for rows in self.layout:
            lanes = list(range(first, first + len(rows)))
            states = [str(step + 1).encode()] * len(rows)
            packed = collate_rows([[samples[n] for n in row] for row in rows], lanes=lanes, states=states, step=step)
            named = [replace(s, loss_weight=self.weights.get(s.source, 1.0)) for s in packed.segments]
            batches.append(replace(packed, segments=tuple(named)))
            first += len(rows)
        return batches


def one_step(path: Path, data: Fixed) -> tuple[torch.Tensor, dict[str, Any]]:
    """The gradient of a step, all parameters in one row, and its line of metrics."""
    model = tiny_model(dropout=0.0)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("encoder")]
    sums = [torch.zeros_like(p) for p in parameters]

    def add(number: int, gradient: torch.Tensor) -> None:
        sums[number] += gradient

    for number, parameter in enumerate(parameters):
        parameter.register_hook(partial(add, number))  # type: ignore[no-untyped-call]
    train(path, stage=tiny_stage(max_steps=1, batch_size=data.num_lanes, clip_norm=0.0), data=data, model=model)
    return torch.cat([total.flatten() for total in sums]), RunDir(path).metrics.read()[0]


def expected(data: Fixed) -> tuple[torch.Tensor, float, float]:
    """Gradient, weighted and plain loss by the definition, one sample at a time."""
    model = tiny_model(dropout=0.0)
    model.encoder.requires_grad_(False)
    model.encoder.eval()
    total, plain, weight, count = torch.zeros(()), 0.0, 0.0, 0
    for sample in data.samples():
        values = model(collate_rows([[sample]])).values
        total = total + data.weights.get(sample.source, 1.0) * values.sum()
        weight += data.weights.get(sample.source, 1.0) * len(values)
        plain, count = plain + values.sum().item(), count + len(values)
    (total / weight).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients), (total / weight).item(), plain / count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_split_and_packing_gives_the_gradient_of_the_definition(tmp_path: Path, layout: Any) -> None:
    data = Fixed(layout, WEIGHTS)
    gradient, line = one_step(tmp_path, data)
    wanted, weighted, plain = expected(data)
    assert torch.allclose(gradient, wanted, atol=1e-6)
    assert line["weighted_loss"] == pytest.approx(weighted, rel=1e-6)
    assert line["loss"] == pytest.approx(plain, rel=1e-6) and line["loss"] != pytest.approx(weighted, rel=1e-3)


def test_a_common_factor_changes_nothing_and_weights_of_one_not_even_a_bit(tmp_path: Path) -> None:
    plain, line = one_step(tmp_path / "plain", Fixed(WHOLE, {}))
    ones, same = one_step(tmp_path / "ones", Fixed(WHOLE, {"alpha": 1, "beta": 1.0}))
    threes, other = one_step(tmp_path / "threes", Fixed(WHOLE, {"alpha": 3.0, "beta": 3.0}))
    assert torch.equal(plain, ones) and line == same and "weighted_loss" not in line
    assert torch.allclose(plain, threes, atol=1e-7) and other["weighted_loss"] == pytest.approx(line["loss"])


def test_samples_of_weight_zero_are_seen_but_not_learned(tmp_path: Path) -> None:
    data = Fixed(WHOLE, {"beta": 0.0})
    is_alpha = [sample.source == "alpha" for sample in data.samples()]
    assert 0 < sum(is_alpha) < 6
    gradient, line = one_step(tmp_path / "zero", data)
    alone, only = one_step(tmp_path / "alone", Fixed([[[n for n in range(6) if is_alpha[n]]]], {}))
    assert torch.allclose(gradient, alone, atol=1e-6)
    assert line["weighted_loss"] == pytest.approx(only["loss"], rel=1e-6)
    assert line["samples"] == 6 and len(RunDir(tmp_path / "zero").samples.read()[0].samples) == 6


def test_a_step_of_nothing_but_weight_zero_has_no_gradient(tmp_path: Path) -> None:
    gradient, line = one_step(tmp_path, Fixed(WHOLE, {"alpha": 0.0, "beta": 0.0}))
    assert not gradient.any() and line["weighted_loss"] == 0.0 and line["loss"] > 0
