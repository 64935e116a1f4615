"""A stage applied to a model: what trains, in which optimiser groups, and the table that says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bestiary.config import Optimizer, Stage
from bestiary.language.decoder import Decoder
from bestiary.language.tuning import is_adapter, num_elements, plain_name
from bestiary.training.names import any_match, matching


def trainable_names(names: list[str], stage: Stage) -> set[str]:
    """Names that train in this stage: `stage.train` less `stage.freeze`; a glob without a match raises."""
    chosen = matching(names, stage.train, rule=f"stage {stage.name}: train")
    chosen -= matching(names, stage.freeze, rule=f"stage {stage.name}: freeze")
    if not chosen:
        raise ValueError(f"stage {stage.name}: nothing trains; freeze={stage.freeze} covers all of train={stage.train}")
    return chosen


def apply_stage(model: nn.Module, stage: Stage) -> None:
    """Set `requires_grad` of every parameter as the stage says, and put frozen modules in eval mode.

    In a tuned decoder what the tuning left trains (adapters, norms); the stage's globs chose it from the plain names.
    """
    names = {plain_name(name): name for name, _ in model.named_parameters() if not is_adapter(name)}
    chosen = {names[name] for name in trainable_names(list(names), stage)}
    tunable = getattr(getattr(model, "decoder", None), "tunable", None)
    if tunable is not None:
        chosen = {name for name in chosen if not name.startswith("decoder.")} | {f"decoder.{name}" for name in tunable}
    for name, parameter in model.named_parameters():
        trains = name in chosen
        if trains and not parameter.is_floating_point():
            raise ValueError(f"stage {stage.name}: {name} holds {parameter.dtype} and cannot train; add it to freeze")
        parameter.requires_grad_(trains)
    set_train_mode(model)


def frozen_roots(module: nn.Module) -> Iterator[nn.Module]:
    """The topmost submodules that own parameters of which none trains."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_roots(child)


def set_train_mode(model: nn.Module) -> None:
    """Train mode everywhere but in frozen modules: their dropout would only add noise to constant features."""
    model.train()
    for root in list(frozen_roots(model)):
        root.eval()


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Trainable parameters by (weight decay, factor on lr), in the model's order.

    Groups carry `lr_scale` and `names` beside what AdamW reads. Of several `lr_scale` globs the last match counts.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for glob in settings.lr_scale:
        matching(list(trainable), [glob], rule="optimizer.lr_scale (trainable parameters)")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        decay = 0.0 if any_match(name, settings.no_decay) else settings.weight_decay
        scales = [factor for glob, factor in settings.lr_scale.items() if any_match(name, [glob])]
        scale = scales[-1] if scales else 1.0
        empty = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale, "lr": 0.0}
        group = groups.setdefault((decay, scale), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; the learning rate is set before every step from the schedule."""
    groups = parameter_groups(model, settings)
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=settings.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold frozen parameters in `dtype`; what trains stays as it is (the references keep float32 masters).

    A part of a model that then holds both must compute with both: a `Decoder` does so under autocast, encoders give
    features that their projections cast.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Decoder):
            module.choose_precision()


def parameter_rows(model: nn.Module, *, depth: int = 2) -> list[tuple[str, int, int]]:
    """(part, parameters, of these trainable) by the first `depth` levels of the names, in the model's order."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        owner = name.split(".")[:-1] or [name]
        part = ".".join(owner[:depth])
        counts = rows.setdefault(part, [0, 0])
        counts[0] += num_elements(parameter)
        counts[1] += num_elements(parameter) if parameter.requires_grad else 0
    return [(part, total, trainable) for part, (total, trainable) in rows.items()]


def parameter_table(model: nn.Module, *, depth: int = 2) -> str:
    """The rows of `parameter_rows` and their sum as text, one part a line."""
    rows = parameter_rows(model, depth=depth)
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    width = max(len(part) for part, _, _ in rows)
    lines = [f"{'part':<{width}}  {'parameters':>16}  {'trainable':>16}"]
    lines += [f"{part:<{width}}  {total:>16,}  {trainable:>16,}" for part, total, trainable in rows]
    return "\n".join(lines)
