"""Finds the golden cases: folders of data made by running the published systems, under `$BESTIARY_GOLDENS`."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from torch import Tensor

ROOT = Path(os.environ.get("BESTIARY_GOLDENS") or Path(__file__).parents[1] / "goldens").resolve()


def cases(system: str, is_case: Callable[[Path], bool]) -> list[Any]:
    """Folders below `ROOT/system` (itself included) for which `is_case` holds, as pytest parameters.

    The test id is the folder's path below the root with dots for slashes, so it contains the system's name.
    """
    top = ROOT / system
    folders = [top, *sorted(p for p in top.rglob("*") if p.is_dir())] if top.is_dir() else []
    return [pytest.param(p, id=".".join(p.relative_to(ROOT).parts)) for p in folders if is_case(p)]


def find_file(path: Path) -> Path | None:
    """Where a file is: at `path`, or compressed by xz at `path`.xz."""
    packed = path.with_name(path.name + ".xz")
    return next((place for place in (path, packed) if place.is_file()), None)


def has(*names: str) -> Callable[[Path], bool]:
    """A predicate: the folder holds all the named files, compressed or not."""
    return lambda folder: all(find_file(folder / name) is not None for name in names)


def read_bytes(path: Path) -> bytes:
    """A file's content, from `path` or from `path`.xz."""
    found = find_file(path)
    assert found is not None, path
    content = found.read_bytes()
    return lzma.decompress(content) if found.suffix == ".xz" else content


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file, compressed or not."""
    return json.loads(read_bytes(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, compressed or not."""
    return load(read_bytes(path))
