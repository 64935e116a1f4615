"""Starting a stage from another's weights: `parent=` is a run directory, a checkpoint folder or a safetensors file.

The parent must be of a stage this stage names, made with the same tokenizer, and hold exactly the model's tensors;
each of these is refused with its reason before anything is changed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bestiary.config import Stage
from bestiary.training.checkpoints import CheckpointError, TrainState, header, newest, read, untied
from bestiary.training.model_state import load_model_tensors
from bestiary.training.names import any_match

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parent:
    """Weights found at `path` and what they say about themselves.

    stage: "" where a bare file does not say. absent: names of the model that the weights leave out.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    stage: str
    step: int
    identity: dict[str, str]
    absent: frozenset[str]


def load_parent(model: nn.Module, path: Path | str, *, stage: Stage, identity: Mapping[str, str]) -> Parent:
    """Put a parent's weights into the model; raises ValueError with the reason where they do not belong there.

    identity: what weights depend on beside shapes, compared key by key with what the parent recorded (tokenizer ...).
    Names the parent itself declares absent (frozen encoders kept in another file) stay as the model has them.
    """
    parent = open_parent(Path(path))
    _check_stage(parent, stage)
    check_identity(parent.identity, identity, where=f"parent {parent.path}")
    load_model_tensors(model, parent.tensors, where=f"parent {parent.path}", may_lack=parent.absent)
    left = f", {len(parent.absent)} left as they were" if parent.absent else ""
    log.info(
        "parent %s: stage %s, step %d, %d tensors%s",
        parent.path,
        parent.stage or "?",
        parent.step,
        len(parent.tensors),
        left,
    )
    return parent


def open_parent(path: Path) -> Parent:
    """Read weights from a run directory (its newest complete checkpoint), a checkpoint folder or a file."""
    if path.is_file():
        return _open_file(path)
    if (path / "MANIFEST.json").is_file():
        checkpoint = read(path)
    elif (path / "checkpoints").is_dir():
        found = newest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"parent {path} has no complete checkpoint; let that run reach one, or name another")
        checkpoint = found
    elif path.is_dir():
        raise CheckpointError(
            f"parent {path} is neither a run directory (checkpoints/) nor a checkpoint (MANIFEST.json)"
        )
    else:
        raise CheckpointError(f"parent {path} does not exist; give a run directory, a checkpoint folder or a file")
    state = checkpoint.state
    return Parent(checkpoint.path, checkpoint.model(), state.stage, state.step, state.identity, frozenset(state.absent))


def check_identity(theirs: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> None:
    """Raise if a fact both sides know differs."""
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            raise ValueError(
                f"{where} was made with {key}={theirs[key]}, this run has {key}={value}; "
                "the weights would read other token ids: use the same tokenizer, or another parent"
            )


def export_weights(
    model: nn.Module,
    path: Path,
    *,
    stage: str,
    identity: Mapping[str, str],
    step: int = 0,
    leave_out: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's weights as one safetensors file that can be a parent.

    leave_out: globs of names not written (encoders that ship in their own file). dtype: of floating tensors.
    """
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    absent = [name for name in tensors if any_match(name, leave_out)]
    kept, tied = untied({name: value for name, value in tensors.items() if name not in absent})
    if dtype is not None:
        kept = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    says = header(TrainState(step=step, stage=stage, seed=0, identity=dict(identity)))
    save_file(kept, path, metadata={**says, "absent": json.dumps(absent), "tied": json.dumps(tied)})


def _open_file(path: Path) -> Parent:
    try:
        with safe_open(path, framework="pt") as file:
            says: dict[str, str] = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"parent {path} is not a complete safetensors file ({error}); fetch it again") from error
    tied: dict[str, str] = json.loads(says.get("tied", "{}"))
    tensors |= {name: tensors[stored] for name, stored in tied.items()}
    absent = frozenset(json.loads(says.get("absent", "[]")))
    identity = json.loads(says.get("identity", "{}"))
    return Parent(path, tensors, says.get("stage", ""), int(says.get("step", "0")), identity, absent)


def _check_stage(parent: Parent, stage: Stage) -> None:
    if not stage.parents:
        raise ValueError(
            f"stage {stage.name} starts without a parent (stage.parents is empty); leave out {parent.path}"
        )
    if not parent.stage:
        log.warning("parent %s does not say which stage made it; only names and shapes are checked", parent.path)
    elif parent.stage not in stage.parents:
        raise ValueError(
            f"parent {parent.path} is of stage {parent.stage}, but stage {stage.name} starts from "
            f"{' or '.join(stage.parents)}; train that stage first, or give a checkpoint of it"
        )
