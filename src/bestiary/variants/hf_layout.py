"""What the layouts of whole models in Hugging Face folders share: files, shards, side files; see `layouts.Layout`.

A folder that was imported is given back as it was. A variant's layout adds its models and the words of its config.json.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from bestiary.variants.hf_folder import Format, HfFolder, HfRecord, plan_hf, read_object, write_hf
from bestiary.variants.layouts import Model, Source, Writing
from bestiary.variants.tensor_file import DTYPES, Tensors

OURS = ("published.json", "MANIFEST.json", "state.json", "model.yaml")
"""Files of our own folders, which no side file may take the place of."""
NO_ROTATION = 2
"""The head's width where no tensor's rows are ordered by heads; only rotary rules read it."""
KINDS: tuple[Format, ...] = ("safetensors", "bin")


class HfSource:
    """A published folder as `bestiary.weights` reads it, see `layouts.Source`. name: of its layout."""

    is_delta = False

    def __init__(self, folder: HfFolder, name: str) -> None:
        self._folder = folder
        self.path, self.file_bytes = folder.path, folder.file_bytes
        self.shapes, self.dtypes = folder.shapes, folder.dtypes
        self.layout, self.wrapped = f"{name}-{folder.format}", bool(folder.wrapped)
        self.unequal: list[str] = []

    @property
    def record(self) -> str:
        """What the files looked like."""
        return self._folder.record.to_json()

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, mapped."""
        return self._folder.whole(name)


class HfLayout(ABC):
    """Hugging Face folders whose config.json says of which model they are. name: begins the names of both formats."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.formats: tuple[str, ...] = tuple(f"{name}-{kind}" for kind in KINDS)

    @abstractmethod
    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json tells of one of this layout's models."""

    @abstractmethod
    def require(self, config: Mapping[str, Any]) -> None:
        """Raise where config.json leaves out what no tensor shows."""

    @abstractmethod
    def model_called(self, key: str) -> Model:
        """See `layouts.Layout`."""

    def recognises(self, path: Path) -> bool:
        """By config.json, except where the folder is one of ours."""
        file = path / "config.json"
        if not file.is_file() or (path / "published.json").exists():
            return False
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # whoever opens it says what is wrong
            return False
        return isinstance(told, dict) and self.is_of(told)

    def open(self, path: Path) -> Source:
        """All shards of the folder."""
        return HfSource(HfFolder(path), self.name)

    def cut_dim(self, name: str) -> int | None:
        """Files hold whole tensors."""
        return None

    def side_files(self, path: Path) -> dict[str, Path]:
        """Every small file beside the weights."""
        found = HfFolder(path).side_files
        if taken := [name for name in OURS if name in found]:
            raise ValueError(f"{path} holds {taken[0]}, which is a file of our own folders; is it one already?")
        return found

    def config(self, side_files: Mapping[str, Path]) -> dict[str, Any]:
        """config.json; ValueError where it leaves out what no tensor shows."""
        if "config.json" not in side_files:
            return {}
        told = read_object(side_files["config.json"])
        self.require(told)
        return told

    def config_name(self, layout: str) -> str:
        """Always the same."""
        return "config.json"

    def write(self, folder: Path, asked: Writing) -> tuple[list[str], int]:
        """The recorded files again, or new ones where another format or number of them is asked for."""
        published = asked.published
        dtypes = {name: DTYPES[published.tensors[name]] for name in asked.shapes if name in published.tensors}
        embedding = self.model_called(published.llama_type).embedding
        dtypes |= {name: dtypes[embedding] for name in asked.shapes if name not in dtypes}
        tensors = {name: (dtypes[name], tuple(shape)) for name, shape in asked.shapes.items()}
        is_same = published.record and asked.layout == published.layout and asked.num_shards is None
        record = HfRecord.from_json(published.record) if is_same else None
        if record is None or set(record.dtypes) != set(tensors):
            record = _planned(tensors, cast(Format, asked.layout.rpartition("-")[2]), asked.num_shards)
        files = write_hf(folder, record, asked.whole)
        for name, path in asked.side_files.items():
            shutil.copyfile(path, folder / name)
        return files, _num_bytes(tensors)


def _planned(tensors: Tensors, kind: Format, num_shards: int | None) -> HfRecord:
    """A new shard map; a number of files is met as nearly as whole tensors allow."""
    if num_shards is None:
        return plan_hf(tensors, kind=kind)
    if num_shards < 1:
        raise ValueError(f"--shards {num_shards}: a folder has at least one file")
    room = -(-_num_bytes(tensors) // num_shards)
    record = plan_hf(tensors, kind=kind, max_shard_bytes=room)
    while len(record.files) > num_shards:
        room += max(1, room // 50)
        record = plan_hf(tensors, kind=kind, max_shard_bytes=room)
    return record


def _num_bytes(tensors: Tensors) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def json_text(told: Mapping[str, Any]) -> str:
    """A file beside the weights, as transformers writes them."""
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"
