"""Weights and optimiser moments as plain named tensors, whatever the strategy holds them as.

Sharded tensors are made whole on the way out and cut again on the way in, so a checkpoint does not know the number of
ranks. All ranks must call together; only rank 0 receives the tensors. `zero` is DeepSpeed's optimiser, None elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bestiary.language.tuning import plain_name
from bestiary.saved_weights import check_names
from bestiary.training import zero_state


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard (all ranks call), the tensor itself otherwise."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A full tensor cut and placed as `target` is."""
    tensor = tensor.to(device=target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements) if isinstance(target, DTensor) else tensor


def model_tensors(
    model: nn.Module, *, keep: bool, zero: Any = None, leave_out: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, on the CPU; empty on ranks that do not `keep` them.

    leave_out: names without tuning; neither copied nor gathered.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {}
    for name, value in model.state_dict().items():
        if leave_out and plain_name(name) in leave_out:
            continue
        full = zero_state.weight(parameters[name]) if zero and name in parameters else whole(value.detach())
        if keep:
            tensors[name] = full.cpu()
    return tensors


def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str, may_lack: frozenset[str] = frozenset()
) -> None:
    """Strict: every name and shape must be the model's; what is not is named with its nearest."""
    check_names(model, tensors, where=where, may_lack=may_lack)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in tensors:
                value.copy_(like(tensors[name], value))


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool, zero: Any = None
) -> dict[str, torch.Tensor]:
    """AdamW's `exp_avg/<name>`, `exp_avg_sq/<name>` and `step/<name>` on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    if zero:
        zero_state.link(zero)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = zero_state.moments(parameter, optimizer) if zero else optimizer.state[parameter]
            for key, value in state.items():
                full = whole(value)
                if keep:
                    tensors[f"{key}/{name}"] = full.detach().cpu().clone()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], *, zero: Any = None
) -> None:
    """Put moments back; every trainable parameter must have its own and no other."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {key.partition("/")[2] for key in tensors}
    if held != set(trainable):
        odd = sorted(held ^ set(trainable))
        raise ValueError(
            f"optimiser state and trainable parameters differ in {len(odd)} names ({', '.join(odd[:4])}); "
            "a run resumes only with the freeze rules it was started with"
        )
    if zero:
        zero_state.make_room(zero, optimizer, tensors[f"step/{next(iter(trainable))}"])
    for name, parameter in trainable.items():
        state = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        if zero:
            zero_state.set_moments(parameter, state)
            continue
        moments = {key: like(state[key], parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": state["step"].to(parameter.device), **moments}
