"""Starting a stage from another's weights: `parent=` is a run directory, a checkpoint folder or a safetensors file.

The parent must be of a stage this stage names, made with the same tokenizer, and hold exactly the model's tensors (but
for what the stage says a parent of another model may lack); each of these is refused with its reason before anything
is changed. Without a parent a stage starts from `model.weights`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from bestiary.config import Stage
from bestiary.saved_tuning import check_whole
from bestiary.saved_weights import SavedWeights, check_beginning, check_names, open_weights
from bestiary.training.checkpoints import TrainState, header, untied
from bestiary.training.model_state import load_model_tensors
from bestiary.training.names import any_match, matching

log = logging.getLogger(__name__)


def load_parent(
    model: nn.Module,
    path: Path | str,
    *,
    stage: Stage,
    identity: Mapping[str, str],
    weights: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> SavedWeights:
    """Put a parent's weights into the model; raises ValueError with the reason where they do not belong there.

    identity: what weights depend on beside shapes, compared key by key with what the parent recorded (tokenizer ...).
    Names the parent itself declares absent (frozen encoders kept in another file) stay as the model has them. A parent
    of another model may lack all that `stage.parent_may_lack` names: it comes from `weights`, of which `unused` are
    globs of names that the model has not, or stays as drawn.
    """
    parent = open_weights(Path(path))
    check_whole(parent)
    _check_stage(parent, stage)
    check_beginning(parent.identity, identity, where=f"parent {parent.path}")
    lacked = _lacked(model, parent, stage)
    check_names(model, parent.tensors, where=f"parent {parent.path}", may_lack=parent.absent | lacked)
    if lacked:
        _fill(model, lacked, weights, identity, unused=unused, parent=parent.path)
    load_model_tensors(model, parent.tensors, where=f"parent {parent.path}", may_lack=parent.absent | lacked)
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


def load_first_weights(
    model: nn.Module,
    files: Sequence[str],
    identity: Mapping[str, str],
    *,
    unused: Sequence[str] = (),
    only: frozenset[str] | None = None,
) -> set[str]:
    """Pretrained parts, each a file or folder of some of the model's names; returns the names they gave.

    unused: globs of names that the model has no part for. only: the names that are wanted; None takes all.
    """
    found: set[str] = set()
    own = frozenset(model.state_dict())
    if not files:
        log.warning("no parent and no model.weights: training starts from random weights")
    for file in files:
        weights = open_weights(Path(file), what="weights")
        check_whole(weights)
        check_beginning(weights.identity, identity, where=f"weights {file}")
        tensors = {
            name: tensor
            for name, tensor in weights.tensors.items()
            if (name in own or not any_match(name, unused)) and (only is None or name in only)
        }
        load_model_tensors(model, tensors, where=f"weights {file}", may_lack=own - set(tensors))
        log.info("weights %s: %d tensors, %d names left as drawn", file, len(tensors), len(own) - len(tensors))
        found |= set(tensors)
    return found


def _lacked(model: nn.Module, parent: SavedWeights, stage: Stage) -> frozenset[str]:
    """What a parent of another model does not have; of a glob all or nothing, so that a damaged one is refused."""
    names, lacked = list(model.state_dict()), set[str]()
    for glob in stage.parent_may_lack:
        may_lack = matching(names, [glob], rule=f"stage {stage.name}: parent_may_lack")
        if not may_lack & parent.tensors.keys():
            lacked |= may_lack - parent.absent
    return frozenset(lacked)


def _fill(
    model: nn.Module,
    lacked: frozenset[str],
    weights: Sequence[str],
    identity: Mapping[str, str],
    *,
    unused: Sequence[str],
    parent: Path,
) -> None:
    """Give the model what its parent lacks, from the files that hold some of it."""
    for file in weights:
        if not Path(file).exists():
            raise ValueError(
                f"parent {parent} lacks {len(lacked)} tensors ({min(lacked)} ...), which are looked for in "
                f"model.weights, but {file} does not exist; name only files that hold them, or model.weights=[] to "
                "leave them as drawn"
            )
    holding = [file for file in weights if _may_hold(Path(file), lacked)]
    found = load_first_weights(model, holding, identity, unused=unused, only=lacked) if holding else set()
    log.info("parent %s lacks %d tensors: %d from model.weights, %d left as drawn",
             parent, len(lacked), len(found), len(lacked) - len(found))  # fmt: skip


def _may_hold(path: Path, names: frozenset[str]) -> bool:
    """Whether weights may hold one of the names, from their header where it is at hand."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():  # a run directory, which says so when it is opened
        return True
    try:
        with safe_open(file, framework="pt") as opened:
            return not names.isdisjoint(opened.keys())
    except SafetensorError:  # said by whoever opens it whole
        return True


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


def wrong_stage(path: Path | str, made_by: str, stage: Stage) -> str | None:
    """Why a stage does not start from a parent that stage `made_by` made ("": it does not say); None if it does."""
    if not stage.parents:
        return (
            f"parent: stage {stage.name} starts without a parent (stage.parents is empty); leave out {path}, or name "
            "it in model.weights"
        )
    if made_by and made_by not in stage.parents:
        return (
            f"parent {path} is of stage {made_by}, but stage {stage.name} starts from "
            f"{' or '.join(stage.parents)}; train that stage first, or give a checkpoint of it"
        )
    return None


def _check_stage(parent: SavedWeights, stage: Stage) -> None:
    if why := wrong_stage(parent.path, parent.stage, stage):
        raise ValueError(why)
    if not parent.stage:
        log.warning("parent %s does not say which stage made it; only names and shapes are checked", parent.path)
