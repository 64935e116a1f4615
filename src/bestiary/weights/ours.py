"""Weights of ours, read tensor by tensor: a run directory, a checkpoint folder, an imported folder or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bestiary.saved_weights import CheckpointError
from bestiary.training.checkpoints import newest, read
from bestiary.variants.pickles import Windowed, window_bytes
from bestiary.variants.tensor_file import HEADER_DTYPES, Opened
from bestiary.weights.folder import MODEL


class OurTensors:
    """Lazily read tensors of weights of ours, and what they say about themselves.

    shapes, dtypes: by name, tied names included. tied: name -> the name its tensor is stored under. stage: "" where
    a bare file or an import does not say. absent: names of the model that the weights leave out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, state = _file_of(path)
        try:
            with safe_open(self.file, framework="pt") as tensors:
                says: dict[str, str] = tensors.metadata() or {}
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: HEADER_DTYPES[part.get_dtype()] for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} is not a whole safetensors file ({error}); fetch it again") from error
        except KeyError as error:
            raise ValueError(f"{self.file} holds tensors of type {error}, which no model of ours has") from error
        self.tied: dict[str, str] = (state.tied if state else {}) or json.loads(says.get("tied", "{}"))
        self.stage = state.stage if state else says.get("stage", "")
        self.step = state.step if state else int(says.get("step", "0"))
        self.identity: dict[str, str] = state.identity if state else json.loads(says.get("identity", "{}"))
        self.absent = frozenset(state.absent if state else json.loads(says.get("absent", "[]")))
        self.shapes: dict[str, tuple[int, ...]] = shapes | {name: shapes[stored] for name, stored in self.tied.items()}
        self.dtypes: dict[str, torch.dtype] = dtypes | {name: dtypes[stored] for name, stored in self.tied.items()}
        self._tensors = Windowed(lambda: Opened(self.file), window=window_bytes(self.file.stat().st_size))

    @property
    def stored(self) -> list[str]:
        """Names that have a tensor of their own, in the file's order."""
        return [name for name in self.shapes if name not in self.tied]

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, mapped; let go of it before asking for the next."""
        return self._tensors[self.tied.get(name, name)]


def _file_of(path: Path) -> tuple[Path, Any]:
    """The safetensors file at a path, and the state of its checkpoint where it has one."""
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give an imported folder, a run directory or a checkpoint")
    root = path / "checkpoints"
    checkpoint = newest(root) if root.is_dir() else read(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no complete checkpoint; let that run reach one, or name another")
    return checkpoint.path / MODEL, checkpoint.state
