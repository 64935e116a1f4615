"""The one reader of torch pickles: memory-mapped, without running code, and mapped anew so that memory stays small.

Mapped pages that were read count as memory of the process until the mapping goes, so a file is mapped anew after
every `window` bytes.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

WINDOW_BYTES = (4 << 20, 512 << 20)
"""Least and most bytes of mapped pages that a folder holds at a time; between them, a share of its largest file."""
WINDOW_SHARE = 0.03
_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
"""What a pickle wants beside tensors, in torch's words."""


class Windowed:
    """Named tensors of a mapped file, whose pages are given back after every `window` bytes that were handed out.

    read: maps the file and returns its tensors by name; tensors: what it returned, if it was called already.
    A mapping lives as long as one of its tensors is held, so who copies a tensor and lets go keeps memory small.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, torch.Tensor]],
        *,
        window: int,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._read = read
        self._window = window
        self._used = 0
        self._tensors: Mapping[str, torch.Tensor] = read() if tensors is None else tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        self.trim()
        tensor = self._tensors[name].detach()
        self._used += tensor.nbytes
        return tensor

    def trim(self) -> None:
        """Give pages back if more than the window's were handed out."""
        if self._used > self._window:
            self._tensors = {}  # the old mapping goes before the new one comes
            self._tensors, self._used = self._read(), 0


def window_bytes(file_bytes: int) -> int:
    """Bytes of mapped pages to hold of files whose largest has this size."""
    least, most = WINDOW_BYTES
    return int(min(max(WINDOW_SHARE * file_bytes, least), most))


def load_pickle(path: Path) -> dict[str, object]:
    """A torch pickle of tensors, memory-mapped and without running code; ValueError when it is not whole."""
    mapped = _is_zip(path)  # files of before torch 1.6 cannot be mapped
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of other versions of pickle
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = _OBJECT.search(str(error))
        reason = f"it asks to run {found[1]}, which is never done" if found else "it is no pickle of tensors alone"
        raise ValueError(f"{path} is not a whole checkpoint of tensors ({reason}); fetch it again") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole checkpoint of tensors ({reason}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name; is it a published checkpoint?")
    return content


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: uint8[nbytes], without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes (NaN equal to itself)."""
    return one.dtype == other.dtype and torch.equal(raw(one), raw(other))


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); fetch it again") from error
