"""The order in which files of tests run; a quicker start of every process that runs them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

gc.disable()  # while everything is imported, see bestiary.quick_imports

ROOT = Path(__file__).parent
LONGEST = (
    "test_train.py",
    "test_readme.py",
    "test_demo_recipes.py",
    "training/test_strategies.py",
    "training/test_resume.py",
    "test_cli_describe.py",
    "test_throughput.py",
)
"""Files of few, long tests. They go first, or one process ends alone with them while the others have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of LONGEST first; all else stays as collected."""
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays for ever."""
    gc.freeze()
    gc.enable()
