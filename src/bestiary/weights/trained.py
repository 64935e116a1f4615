"""What a run trained, taken out of its whole weights: a folder that is the run again on the base it began from.

Adapters, a resampler, whatever is not in the base bit for bit: for Monkey on small GPUs a hundredth of the model. What
is written is a run directory whose checkpoint leaves the base out, as runs with tuning=lora write them: `eval.py`,
`Session.from_run` and `bestiary weights merge` find the base, which must be as it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bestiary.saved_tuning import BASE, base_sha256, frozen_dtype
from bestiary.training.checkpoints import TrainState
from bestiary.variants.pickles import same_bits
from bestiary.weights.merging import opened_run, origins_of, write_run
from bestiary.weights.ours import OurTensors


@dataclass(frozen=True, slots=True)
class Trained:
    """What was taken out. left: tensors that stay with the base."""

    num_tensors: int
    num_bytes: int
    left: int


def export_trained(path: Path, out: Path, *, base: Path | None = None) -> Trained:
    """Write `out`, a run directory with the tensors that the base does not hold bit for bit; ValueError else.

    path: a run directory with whole weights, or one of its checkpoint folders. base: None takes what the run began
    from. Values count, and the dtype the run held its frozen weights in: a base in bfloat16 serves a run in float32.
    """
    folder, run, own = opened_run(path)
    if BASE in own.identity:
        raise ValueError(f"{path} holds only what it trained already; use it as it is, or make it whole: weights merge")
    places = [base] if base else origins_of(folder, run)
    origins = [OurTensors(place) for place in places]
    frozen = frozen_dtype(run.tuning, run.cluster) or torch.float32
    rests = {name: origin for name in own.stored if (origin := _holder(name, own, origins, frozen)) is not None}
    kept = [name for name in own.stored if name not in rests]
    if not rests or not kept:
        what = "no tensor" if not rests else "every tensor"
        where = ", ".join(map(str, places)) or "nowhere"
        raise ValueError(f"{path} shares {what} with its base ({where}); name what it began from with --base")
    tied = {name: stored for name, stored in own.tied.items() if stored not in rests}
    absent = sorted({*rests, *own.absent, *(name for name in own.tied if name not in tied)})
    outside = {name: next((o for o in origins if name in o.shapes), own) for name in own.absent}
    digest = base_sha256(lambda name: outside.get(name, own)[name], absent, workers=1)
    identity = {**own.identity, BASE: digest}
    state = TrainState(step=0, stage=own.stage, seed=run.seed, identity=identity, tied=tied, absent=absent)
    plan = {name: (own.dtypes[name], own.shapes[name]) for name in kept}
    told = {"trained": json.dumps({"run": str(folder), "step": own.step})}
    began = [str(place.absolute()) for place in reversed(places)]
    write_run(folder, out, plan, own.__getitem__, state, told=told, changes={"model.weights": began})
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in plan.values())
    return Trained(len(kept), size, len(rests))


def _holder(name: str, own: OurTensors, origins: list[OurTensors], frozen: torch.dtype) -> OurTensors | None:
    """The origin that gives a tensor back as the run has it; None where none does."""
    found = next((origin for origin in origins if name in origin.shapes), None)
    if found is None or found.shapes[name] != own.shapes[name]:
        return None
    held = frozen if found.dtypes[name].is_floating_point else found.dtypes[name]
    is_same = own.dtypes[name] == held and same_bits(own[name], found[name].to(held))
    return found if is_same else None
