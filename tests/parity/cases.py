"""Finds the golden cases: folders of data made by running the published systems, under `$BESTIARY_GOLDENS`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(os.environ.get("BESTIARY_GOLDENS") or Path(__file__).parents[1] / "goldens").resolve()


def cases(system: str, is_case: Callable[[Path], bool]) -> list[Any]:
    """Folders below `ROOT/system` (itself included) for which `is_case` holds, as pytest parameters.

    The test id is the folder's path below the root with dots for slashes, so it contains the system's name.
    """
    top = ROOT / system
    folders = [top, *sorted(p for p in top.rglob("*") if p.is_dir())] if top.is_dir() else []
    return [pytest.param(p, id=".".join(p.relative_to(ROOT).parts)) for p in folders if is_case(p)]


def has(*names: str) -> Callable[[Path], bool]:
    """A predicate: the folder holds all the named files."""
    return lambda folder: all((folder / name).is_file() for name in names)


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
