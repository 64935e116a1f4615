"""Sources that several files read."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data_modules.making import source


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three weighted sources: one with undecodable pictures, one smaller than the number of lanes."""
    root = tmp_path_factory.mktemp("mix")
    source(root / "big" / "train", "big", 40)
    source(root / "bad", "bad", 21, bad=(3, 4, 11), domain="chart")
    source(root / "tiny", "tiny", 5, domain="text")
    return {
        "big": {"path": root / "big", "split": "train", "weight": 6.0, "domain": "natural"},
        "bad": {"path": root / "bad", "weight": 3.0},
        "tiny": {"path": root / "tiny", "weight": 1.0},
    }
