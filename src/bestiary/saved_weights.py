"""Weights on disk: a run directory, a checkpoint folder or a safetensors file, verified, opened and put into a model.

A checkpoint folder is complete or absent: its MANIFEST.json, written last, has bytes and sha256 of every other file.
Reading verifies it, so a truncated or altered file is named instead of used. Nothing is ever unpickled here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

log = logging.getLogger(__name__)

FORMAT = 1
"""Of MANIFEST.json and state.json."""
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """Weights found at `path` and what they say about themselves.

    tensors: by the model's names, tied ones under every name. stage: "" where a bare file does not say. identity: what
    weights depend on beside shapes (sha256 of the tokenizer ...). absent: names of the model that the weights leave
    out, because they lie in another file.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    stage: str
    step: int
    identity: dict[str, str]
    absent: frozenset[str]


def open_weights(path: Path, *, what: str = "parent") -> SavedWeights:
    """Read weights from a run directory (its newest complete checkpoint), a checkpoint folder or a file.

    what: the path's part in what is being done, for errors (`parent`, `run`).
    """
    if path.is_file():
        return _open_file(path, what)
    if (path / "MANIFEST.json").is_file():
        verify(path)
        return _open_folder(path)
    if (path / "checkpoints").is_dir():
        found = newest_folder(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"{what} {path} has no complete checkpoint; let that run reach one, or name another")
        return _open_folder(found)
    if path.is_dir():
        raise CheckpointError(
            f"{what} {path} is neither a run directory (checkpoints/) nor a checkpoint (MANIFEST.json)"
        )
    raise CheckpointError(f"{what} {path} does not exist; give a run directory, a checkpoint folder or a file")


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint folder with its manifest; whatever is wrong is one CheckpointError."""
    manifest_path = folder / "MANIFEST.json"
    remedy = f"remove {folder} or take another checkpoint"
    if not manifest_path.is_file():
        raise CheckpointError(f"{folder} has no MANIFEST.json: the checkpoint is incomplete; {remedy}")
    try:
        files = json.loads(manifest_path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} cannot be read ({error}); {remedy}") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is in the manifest but not there; {remedy}")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}; {remedy}")
        if sha256(path) != digest:
            raise CheckpointError(f"{path} was altered: its sha256 is not the manifest's; {remedy}")


def newest_folder(root: Path) -> Path | None:
    """The newest checkpoint folder that verifies, None without one; damaged ones are passed over with a warning."""
    for step in sorted(steps(root), reverse=True):
        folder = step_folder(root, step)
        try:
            verify(folder)
            state(folder)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
        else:
            return folder
    return None


def step_folder(root: Path, step: int) -> Path:
    """`<root>/step-000200`."""
    return root / f"step-{step:06d}"


def steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders, ascending."""
    found = (
        [_STEP.fullmatch(p.name) for p in root.iterdir() if p.is_dir() and not p.is_symlink()] if root.is_dir() else []
    )
    return sorted(int(match[1]) for match in found if match)


def state(folder: Path) -> dict[str, Any]:
    """What state.json of a checkpoint folder says; an unknown format or other kinds of values are an error."""
    file = folder / "state.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); take another checkpoint") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CheckpointError(f"{file} was written by another version of the format; take another checkpoint")
    for key, kind in _STATE_KINDS.items():
        value = told.get(key)
        inner = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(item, str) for item in inner):
            told_value = f"{key} is {str(value)[:40]!r}"
            raise CheckpointError(f"{file}: {told_value}, not what a run writes; take another checkpoint")
    return told


_STATE_KINDS = {"step": int, "stage": str, "tied": dict, "identity": dict, "absent": list}
"""What every reader takes from state.json, with the kind of its value; inside are texts alone."""


def made_by(path: Path) -> str:
    """The stage that made the weights at a path, without reading them; "" where that is not said or cannot be read."""
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                return str((file.metadata() or {}).get("stage", ""))
        root = path / "checkpoints"
        newest = max(steps(root), default=None)
        return str(state(path if newest is None else step_folder(root, newest))["stage"])
    except (OSError, ValueError, KeyError, SafetensorError):
        return ""  # whoever opens the weights says what is wrong with them


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


VIEWS = "views"
"""Key of `identity` that says which cuts of a picture a model sees: words, of which no tensor's shape depends."""
WINDOWS = "windows"
"""Key of `identity` that says of which windows, rows x columns, a model has adapters of their own."""
_IDENTITY_REMEDIES = {
    "tokenizer": "the weights would read other token ids: use the same tokenizer, or another parent",
    VIEWS: "the weights saw pictures cut in another way: name the model they are of",
    WINDOWS: "their adapters are for other windows: give the model that grid of windows (vision.image_px), or import "
    "the published folder with `bestiary weights import FOLDER OUT --leave-out '*visual*_lora*'` and train new ones",
}


def check_identity(theirs: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> None:
    """Raise if a fact both sides know differs."""
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            raise ValueError(
                f"{where} was made with {key}={theirs[key]}, this run has {key}={value}; "
                + _IDENTITY_REMEDIES.get(key, f"the weights mean nothing with another {key}: use the same")
            )


def check_beginning(theirs: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> None:
    """`check_identity` for weights that training begins from: the model may see more views than they did."""
    more = set(theirs.get(VIEWS, "").split()) <= set(ours.get(VIEWS, "").split())
    check_identity({key: value for key, value in theirs.items() if key != VIEWS or not more}, ours, where=where)


def check_names(
    model: nn.Module, tensors: Mapping[str, Any], *, where: str, may_lack: frozenset[str] = frozenset()
) -> None:
    """Raise unless `tensors` has the model's names (but those it `may_lack`) and shapes."""
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and name not in may_lack]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        problems = []
        if missing:
            problems.append(f"lacks {len(missing)} of the model's tensors ({_named(missing, list(tensors))})")
        if unexpected:
            problems.append(f"holds {len(unexpected)} that the model has not ({_named(unexpected, list(own))})")
        raise ValueError(f"{where} {' and '.join(problems)}; was it made by another model or scale?")
    for name, value in tensors.items():
        if tuple(value.shape) != tuple(own[name].shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)}, the model has {tuple(own[name].shape)}; "
                "was it made at another scale or with another vocabulary?"
            )


def _open_folder(folder: Path) -> SavedWeights:
    told, file = state(folder), folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}); take another checkpoint") from error
    if lost := [stored for stored in told["tied"].values() if stored not in tensors]:
        raise CheckpointError(f"{file} lacks {lost[0]}, which state.json says others share; take another checkpoint")
    tensors |= {name: tensors[stored] for name, stored in told["tied"].items()}
    return SavedWeights(folder, tensors, told["stage"], told["step"], told["identity"], frozenset(told["absent"]))


def _open_file(path: Path, what: str) -> SavedWeights:
    try:
        with safe_open(path, framework="pt") as file:
            says: dict[str, str] = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what} {path} is not a complete safetensors file ({error}); fetch it again") from error
    tied: dict[str, str] = json.loads(says.get("tied", "{}"))
    tensors |= {name: tensors[stored] for name, stored in tied.items()}
    absent = frozenset(json.loads(says.get("absent", "[]")))
    identity = json.loads(says.get("identity", "{}"))
    return SavedWeights(path, tensors, says.get("stage", ""), int(says.get("step", "0")), identity, absent)


def _named(names: list[str], others: list[str]) -> str:
    """The first names, each with the nearest of the others."""
    parts = []
    for name in names[:3]:
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.4)
        parts.append(f"{name}, nearest {near[0]}" if near else name)
    return "; ".join(parts) + (" ..." if len(names) > 3 else "")
