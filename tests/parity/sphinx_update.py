"""One update by the platform's own optimiser and clipping against `after_step.*` of a SPHINX golden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from bestiary.config import Optimizer
from bestiary.training.stages import build_optimizer, set_lr
from bestiary.training.strategies import clip_gradients
from tests.parity.sphinx_examples import assert_close

LEAST_GRADIENT = 1e-6
"""Below it the direction of Adam's first step is not told (goldens' README)."""


def assert_update(
    model: nn.Module,
    train: Mapping[str, Any],
    io: Mapping[str, Tensor],
    published: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Clips and steps the gradients `model` holds. published: tensors by our names -> by published ones."""
    asked = train["adamw_step"]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = published({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
    total = clip_gradients(SingleDeviceStrategy("cpu"), list(named.values()), asked["clip_grad"])
    assert total is not None and total.item() == pytest.approx(train["total_grad_norm"], rel=1e-4)
    decay = asked["weight_decay_decay_group"]
    settings = Optimizer(lr=asked["lr"], betas=tuple(asked["betas"]), eps=asked["eps"], weight_decay=decay)
    optimizer = build_optimizer(model, settings)
    for key, value in (("decay_group", decay), ("no_decay_group", 0.0)):
        names = [name for group in optimizer.param_groups if group["weight_decay"] == value for name in group["names"]]
        assert sorted(published({name: named[name] for name in names})) == sorted(train[key])
    set_lr(optimizer, settings.lr)
    optimizer.step()
    after = published({name: p.detach() for name, p in named.items()})
    expected = {name.removeprefix("after_step."): x for name, x in io.items() if name.startswith("after_step.")}
    assert expected
    for name, value in expected.items():
        is_told = (grads[name] * asked["clip_coef"]).abs() > LEAST_GRADIENT
        assert_close(after[name][is_told], value[is_told], 2e-5, name)
