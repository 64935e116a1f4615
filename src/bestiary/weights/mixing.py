"""Two trained models of one kind as one: every tensor is beta * A + (1 - beta) * B, a coefficient a part.

SPHINX's "domain mixing": a decoder trained on photographs' captions and one trained on synthetic captions are joined
without training. The published code has no such tool; the formula is the paper's (section 3.2, weight mix strategy).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bestiary.saved_tuning import BASE
from bestiary.saved_weights import check_identity, step_folder
from bestiary.training.checkpoints import LAST, TrainState, header, seal
from bestiary.training.names import matching, nearest
from bestiary.variants.pickles import same_bits
from bestiary.variants.tensor_file import TensorFile
from bestiary.weights.folder import MODEL, STATE, new_folder
from bestiary.weights.ours import OurTensors

MIXED = "mixed.json"
"""Where a mixed folder says what it was made of."""
CONFIG = "config.yaml"
RUN_FILES = (CONFIG, "config.resolved.yaml")


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a mix did. mixed: tensors that differ in both and were combined; equal: bit-equal in both, kept."""

    num_tensors: int
    mixed: int
    equal: int
    stage: str


def mix(a: Path, b: Path, out: Path, *, beta: float, parts: Sequence[tuple[str, float]] = ()) -> Mixed:
    """Write `out`, a folder that is a `parent=`, with beta * A + (1 - beta) * B of every tensor; ValueError else.

    a, b: run directories, checkpoint folders, imported folders or safetensors files. Both must be of one stage, one
    tokenizer, and hold the same names and shapes. beta: any finite number; 1 gives A and 0 gives B bit for bit.
    parts: (glob of our names, beta of those names); a later one wins over an earlier.
    Sums are taken in float32 (float64 for float64) and stored in A's and B's dtype, the wider one where they differ.
    Where one of them is a run directory `out` is one as well, with its config (A's of two), so eval.py takes it.
    """
    one, other = OurTensors(a), OurTensors(b)
    _check(one, other)
    betas = coefficients(list(one.shapes), beta, parts)
    for name, stored in one.tied.items():
        if betas.pop(name) != betas[stored]:
            raise ValueError(f"{name} and {stored} are one tensor; give both the same coefficient")
    state = TrainState(step=0, stage=one.stage or other.stage, seed=0)
    state = replace(state, identity=one.identity | other.identity, tied=one.tied, absent=sorted(one.absent))
    origin = {"a": str(a), "b": str(b), "beta": beta, "parts": [list(part) for part in parts]}
    with new_folder(out) as folder:
        place = _run_files([a, b], folder)
        counts = _write(place, one, other, betas, state, origin)
        (place / STATE).write_text(state.to_json(), encoding="utf-8")
        (place / MIXED).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        seal(place, 0)
        if place != folder:
            (place.parent / LAST).symlink_to(place.name)
    return Mixed(len(one.stored), *counts, stage=state.stage)


def coefficients(names: Sequence[str], beta: float, parts: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Name -> its beta; a glob that matches nothing raises with the nearest names."""
    found = dict.fromkeys(names, _finite("--beta", beta))
    for glob, value in parts:
        _finite(f"--part {glob}", value)
        found |= dict.fromkeys(matching(names, [glob], rule="--part"), value)
    return found


def combine(name: str, a: torch.Tensor, b: torch.Tensor, beta: float) -> torch.Tensor:
    """beta * a + (1 - beta) * b of one tensor; what does not allow it raises with the tensor's name."""
    if beta == 1 or same_bits(a, b):
        return a
    if beta == 0:
        return b
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{name} holds {a.dtype}, which differ in A and B and cannot be mixed; give it beta 0 or 1")
    dtype = torch.promote_types(a.dtype, b.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    mixed = a.to(exact).mul(beta).add_(b.to(exact), alpha=1 - beta).to(dtype)
    if not bool(mixed.isfinite().all()):
        raise ValueError(f"{name} would not be finite in {dtype} with beta {beta:g}; take one nearer to 0..1")
    return mixed


def _finite(what: str, beta: float) -> float:
    if not math.isfinite(beta):
        raise ValueError(f"{what} is {beta}, which is no coefficient; give a finite number, 1 for A alone")
    return beta


def _check(one: OurTensors, other: OurTensors) -> None:
    """As for a parent: whole weights of one stage, one tokenizer, the same names and shapes."""
    for side in (one, other):
        if BASE in side.identity:
            raise ValueError(
                f"{side.path} holds what was trained without its base, which cannot be mixed; make it whole first with "
                "bestiary weights merge"
            )
    if one.stage and other.stage and one.stage != other.stage:
        raise ValueError(
            f"{one.path} is of stage {one.stage} but {other.path} of stage {other.stage}; mix two runs of one stage"
        )
    check_identity(other.identity, one.identity, where=f"{other.path} (beside {one.path})")
    for here, there in ((one, other), (other, one)):
        if lost := [name for name in here.shapes if name not in there.shapes]:
            near = ", ".join(nearest(lost[0], there.shapes)) or "none"
            raise ValueError(
                f"{there.path} lacks {len(lost)} of the tensors of {here.path}, first {lost[0]} (nearest: {near}); mix "
                "two of one model, with the same parts left out"
            )
    for name, shape in one.shapes.items():
        if shape != other.shapes[name]:
            raise ValueError(
                f"{name} is {shape} in {one.path} but {other.shapes[name]} in {other.path}; mix two models of one size"
            )
    if one.tied != other.tied or one.absent != other.absent:
        raise ValueError(f"{one.path} and {other.path} tie or leave out different tensors; mix two of one model")
    _check_builds(one.path / CONFIG, other.path / CONFIG)


def _check_builds(one: Path, other: Path) -> None:
    """Facts that no shape shows (heads, rotary base, views) stand in the configs of runs."""
    if not (one.is_file() and other.is_file()):
        return
    ours, theirs = _build(one), _build(other)
    if differing := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        key = differing[0]
        raise ValueError(
            f"{one} says model.build.{key}={ours.get(key)} but {other} {theirs.get(key)}; mix two runs of one model"
        )


def _build(path: Path) -> dict[str, Any]:
    told: Any = OmegaConf.to_container(OmegaConf.load(path))
    found: dict[str, Any] = {}
    _flatten(told.get("model", {}).get("build", {}), "", found)
    return found


def _flatten(node: object, prefix: str, into: dict[str, Any]) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _flatten(value, f"{prefix}{key}.", into)
    else:
        into[prefix.rstrip(".")] = node


def _write(
    folder: Path,
    one: OurTensors,
    other: OurTensors,
    betas: Mapping[str, float],
    state: TrainState,
    origin: Mapping[str, Any],
) -> tuple[int, int]:
    """The tensors, one at a time; how many were mixed and how many are equal in both."""
    plan = {name: (_dtype(one, other, name, beta), one.shapes[name]) for name, beta in betas.items()}
    told = {"absent": json.dumps(state.absent), "tied": json.dumps(state.tied), "mixed": json.dumps(origin)}
    num_mixed = num_equal = 0
    with TensorFile(folder / MODEL, plan, metadata=header(state) | told) as file:
        for name, beta in betas.items():
            a, b = one[name], other[name]
            equal = same_bits(a, b)
            num_equal += equal
            num_mixed += not equal
            file.add(name, combine(name, a, b, beta).to(plan[name][0]))
            del a, b
    return num_mixed, num_equal


def _dtype(one: OurTensors, other: OurTensors, name: str, beta: float) -> torch.dtype:
    if beta in (0, 1):
        return one.dtypes[name] if beta == 1 else other.dtypes[name]
    wider: torch.dtype = torch.promote_types(one.dtypes[name], other.dtypes[name])
    return wider


def _run_files(paths: Sequence[Path], folder: Path) -> Path:
    """Copy what makes a run directory, if one of the paths is one; the folder that takes the weights."""
    run = next((path for path in paths if (path / CONFIG).is_file()), None)
    if run is None:
        return folder
    for name in RUN_FILES:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    place = step_folder(folder / "checkpoints", 0)
    place.mkdir(parents=True)
    return place
