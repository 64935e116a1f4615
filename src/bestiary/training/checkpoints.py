"""Checkpoints that are complete or absent: written beside their place, hashed, then renamed.

A checkpoint folder holds model.safetensors, optimizer.safetensors, rng.safetensors, state.json and, written last,
MANIFEST.json with bytes and sha256 of each. Nothing is pickled. Reading verifies the manifest, so a truncated
or altered file is named instead of trained on.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bestiary.saved_weights import FORMAT, CheckpointError, newest_folder, sha256, step_folder, steps, verify
from bestiary.training.report import Totals

log = logging.getLogger(__name__)

LAST = "last"


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything of a run at a step boundary that is not a tensor.

    lanes: lane -> the stream's state after this step, of all ranks. fingerprint: what shaped the stream. identity: what
    weights depend on beside their shapes (sha256 of the tokenizer ...). tied: name -> the name its tensor is stored
    under. absent: names left out of model.safetensors (frozen, loaded from elsewhere).
    """

    step: int
    stage: str
    seed: int
    totals: Totals = field(default_factory=Totals)
    lanes: dict[int, bytes] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    config_sha256: str = ""
    world_size: int = 1
    tied: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """As JSON text; lanes' bytes in base64."""
        lanes = {str(lane): base64.b64encode(state).decode() for lane, state in sorted(self.lanes.items())}
        return json.dumps({**asdict(self), "lanes": lanes, "format": FORMAT}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """The inverse of `to_json`; an unknown format is an error."""
        raw = json.loads(text)
        if raw.pop("format", None) != FORMAT:
            raise CheckpointError("state.json was written by another version of the format")
        lanes = {int(lane): base64.b64decode(state) for lane, state in raw.pop("lanes").items()}
        return cls(lanes=lanes, totals=Totals(**raw.pop("totals")), **raw)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: TrainState

    def model(self) -> dict[str, torch.Tensor]:
        """Weights by the model's names, tied ones under every name."""
        tensors = load_file(self.path / "model.safetensors")
        return tensors | {name: tensors[stored] for name, stored in self.state.tied.items()}

    def optimizer(self) -> dict[str, torch.Tensor]:
        """Optimiser moments by `<moment>/<parameter>`."""
        return load_file(self.path / "optimizer.safetensors")

    def rng(self, rank: int) -> dict[str, torch.Tensor] | None:
        """Generator states of a rank; None if the run had fewer ranks."""
        states = load_file(self.path / "rng.safetensors")
        own = {key.partition("/")[2]: value for key, value in states.items() if key.startswith(f"{rank}/")}
        return own or None


def write(
    root: Path,
    state: TrainState,
    *,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    rng: Mapping[str, torch.Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint of `state.step`, point `last` at it, and remove all but the newest `keep` (0 = keep all)."""
    root.mkdir(parents=True, exist_ok=True)
    final = step_folder(root, state.step)
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    _remove(temporary)
    temporary.mkdir()
    weights, tied = untied(model)
    state = replace(state, tied=tied)
    save_file(weights, temporary / "model.safetensors", metadata=header(state))
    save_file(dict(optimizer), temporary / "optimizer.safetensors")
    save_file(dict(rng), temporary / "rng.safetensors")
    (temporary / "state.json").write_text(state.to_json(), encoding="utf-8")
    seal(temporary, state.step)
    old = root / f".{final.name}.{os.getpid()}.old"
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    sync(root)
    _point_last(root, final)
    _remove(old)
    _retain(root, keep)
    size = sum(file.stat().st_size for file in final.iterdir())
    log.info("checkpoint %s (%.1f MB, weights %.1f MB)", final, size / 1e6, _megabytes(final / "model.safetensors"))
    return final


def read(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder and read its state; whatever is wrong is one CheckpointError."""
    verify(folder)
    return _opened(folder)


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning. None if there is none."""
    folder = newest_folder(root)
    return None if folder is None else _opened(folder)


def untied(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Contiguous tensors without repeats, and for every repeat the name it is stored under."""
    first: dict[tuple[Any, ...], str] = {}
    kept, tied = {}, {}
    for name, value in tensors.items():
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        kept[name] = value.contiguous()
    return kept, tied


def header(state: TrainState) -> dict[str, str]:
    """What a weights file says about itself: enough to check it as a parent when it travels alone."""
    return {"format": "pt", "stage": state.stage, "step": str(state.step), "identity": json.dumps(state.identity)}


def rng_states() -> dict[str, torch.Tensor]:
    """States of torch's, numpy's and python's global generators as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937" and version == 3 and gauss is None
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([float(position), float(has_gauss), float(cached)], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put global generators back."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _opened(folder: Path) -> Checkpoint:
    file = folder / "state.json"
    try:
        return Checkpoint(folder, TrainState.from_json(file.read_text(encoding="utf-8")))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); take another checkpoint") from error


def seal(folder: Path, step: int) -> None:
    """Flush every file of a folder to disk, then write the manifest that makes it a checkpoint."""
    entries = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1) + "\n", "utf-8")
    sync(manifest)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_last(root: Path, target: Path) -> None:
    """Make the symbolic link `last` name the target, in one step."""
    link = root / f".{LAST}.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, root / LAST)


def _retain(root: Path, keep: int) -> None:
    """Remove older checkpoints and what killed writers left behind."""
    if keep:
        for step in steps(root)[:-keep]:
            _remove(step_folder(root, step))
    for path in root.glob(".step-*"):
        _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder; its manifest goes first, so that a half-removed checkpoint never looks complete."""
    if folder.exists():
        (folder / "MANIFEST.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6
