"""Whole tensors out of DeepSpeed's ZeRO partitions and back, by its own accessors.

`zero` is DeepSpeed's optimiser (`engine.optimizer`), `optimizer` the AdamW inside. All ranks call together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def weight(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's full float32 master, its own value where DeepSpeed holds none (frozen)."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return cast(torch.Tensor, master).detach().clone()
    if hasattr(parameter, "ds_id"):
        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def set_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put float32 masters back: the engine made its own from weights that may have been rounded to bfloat16."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in tensors:
            value = tensors[name].to(parameter.device, torch.float32)
            if hasattr(parameter, "ds_id"):
                safe_set_local_fp32_param(parameter, _own_part(value))
            else:
                safe_set_full_fp32_param(parameter, value)


def link(zero: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of every group: they link once, after stepping only the first group."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def make_room(zero: Any, optimizer: torch.optim.Optimizer, step: torch.Tensor) -> None:
    """Empty moments for every partition: before its first step the optimiser has none to write into."""
    partitions = getattr(zero, "fp32_partitioned_groups_flat", None)
    for partition in zero.single_partition_of_fp32_groups if partitions is None else partitions:
        empty = {key: torch.zeros_like(partition.data) for key in _MOMENTS}
        optimizer.state[partition] = {"step": step.clone(), **empty}
    link(zero)


def moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state of one whole parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    found = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
    return {"step": torch.as_tensor(float(steps[0])), **found}


def set_moments(parameter: nn.Parameter, state: Mapping[str, torch.Tensor]) -> None:
    """Put one parameter's whole moments back."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key in _MOMENTS:
        value = state[key].to(parameter.device)
        if hasattr(parameter, "ds_id"):
            safe_set_local_optimizer_state(parameter, _own_part(value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def _own_part(value: torch.Tensor) -> torch.Tensor:
    """This rank's equal share of a flat tensor, the last one padded: ZeRO-3's own setter fails where sizes are odd."""
    size = -(-value.numel() // dist.get_world_size())
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)
