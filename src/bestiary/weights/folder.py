"""Imported weights as a folder of ours, written one tensor at a time and complete or absent.

    model.safetensors      the model's tensors under our names
    state.json             what a checkpoint says of itself (step 0, no stage, the tokenizer's hash, absent names)
    published.json         what export needs: layout, shards, order and dtypes of the published names (`Published`)
    config.json ...        the published side files, byte for byte
    extra.tensors          safetensors of published tensors that no model of ours has (only when asked to keep them)
    MANIFEST.json          bytes and sha256 of each, written last

It is a checkpoint folder as training writes it, so train.py takes it as `parent=` and in `model.weights`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bestiary.training import checkpoints
from bestiary.variants.sphinx.consolidated import raw

FORMAT = 1
MODEL, STATE, PUBLISHED, EXTRA, MANIFEST = (
    "model.safetensors",
    "state.json",
    "published.json",
    "extra.tensors",
    "MANIFEST.json",
)

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How a safetensors header calls them."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
"""How published.json and reports call them."""


@dataclass(frozen=True, slots=True)
class Published:
    """Where imported weights came from, enough to write them back.

    tensors: published name (with `llma.`) -> dtype, in the order of the files. extra: those of `tensors` that are in
    extra.tensors. side_files: names of the files kept byte for byte. head_dim: of the decoder.
    """

    layout: str
    num_shards: int
    llama_type: str
    head_dim: int
    tensors: dict[str, str]
    wrapped: bool = True
    extra: list[str] = field(default_factory=list)
    side_files: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Published:
        """The inverse of `to_json`, of a file; what is not one is a line of error."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            known = {item.name for item in fields(cls)}
            if told.pop("format") != FORMAT or not told.keys() <= known:
                raise KeyError("format")
            published = cls(**told)
            if odd := [name for name in published.side_files if Path(name).name != name]:
                raise KeyError(odd[0])
            if odd := [dtype for dtype in published.tensors.values() if dtype not in DTYPES]:
                raise KeyError(odd[0])
            return published
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} was not written by this version ({error}); import the weights again") from error


class TensorFile:
    """A safetensors file whose tensors are given one by one, in any order; all must be given before it closes.

    tensors: name -> (dtype, shape), all of them beforehand, because the header comes first.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str],
    ) -> None:
        self._left = set(tensors)
        self._spans: dict[str, tuple[int, int]] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        # Wide types first keep every tensor aligned to its own width.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            size = torch.Size(shape).numel() * dtype.itemsize
            self._spans[name] = (at, at + size)
            header[name] = {"dtype": dtype_name(dtype, name), "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place."""
        start, stop = self._spans[name]
        data = raw(tensor)
        assert data.numel() == stop - start and name in self._left, name
        self._file.seek(self._start + start)
        self._file.write(data.numpy().data)
        self._left.remove(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        assert kind is not None or not self._left, sorted(self._left)[:3]


def dtype_name(dtype: torch.dtype, name: str) -> str:
    """Of a safetensors header; a type it does not know is the user's error."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} is {dtype}, which safetensors cannot hold here; convert the checkpoint first")
    return DTYPE_NAMES[dtype]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when everything went well and otherwise leaves nothing behind."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the manifest that makes the folder a checkpoint."""
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": checkpoints.sha256(file)}
        for file in sorted(folder.iterdir())
    }
    text = json.dumps({"format": checkpoints.FORMAT, "step": 0, "files": entries}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
