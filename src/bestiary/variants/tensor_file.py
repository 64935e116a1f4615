"""Safetensors files written one tensor at a time, and the names that their headers give to dtypes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bestiary.variants.pickles import raw

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
"""How our own files and reports call them."""
HEADER_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Opened(Mapping[str, torch.Tensor]):
    """A mapped safetensors file as a mapping."""

    def __init__(self, file: Path) -> None:
        try:
            self._file: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


class TensorFile:
    """A safetensors file whose tensors are given one by one, in any order; all must be given before it closes.

    tensors: name -> (dtype, shape), all of them beforehand, because the header comes first.
    header: the text of the header if it is to be a known one, padding included; made from `tensors` otherwise.
    """

    def __init__(
        self, path: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None, header: str | None = None
    ) -> None:
        self._left = set(tensors)
        if header is None:
            header = header_text(tensors, metadata or {})
        told: dict[str, Any] = json.loads(header)
        self._spans = {name: tuple(told[name]["data_offsets"]) for name in tensors}
        text = header.encode()
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


def header_text(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    """Wide types first, which keeps every tensor aligned to its own width; padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": dtype_name(dtype, name), "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def dtype_name(dtype: torch.dtype, name: str) -> str:
    """Of a safetensors header; a type it does not know is the user's error."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} is {dtype}, which safetensors cannot hold here; convert the checkpoint first")
    return DTYPE_NAMES[dtype]


def read_header(path: Path) -> str:
    """The text of a safetensors file's header, padding included; ValueError when it is not whole.

    Its offsets must fill the rest of the file exactly, so a truncated file is refused before a tensor is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        told = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in told.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a whole safetensors file (no header); fetch it again") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is not a whole safetensors file ({size:,} bytes, its header tells of {8 + length + end:,}); "
            "fetch it again"
        )
    return text.decode()
