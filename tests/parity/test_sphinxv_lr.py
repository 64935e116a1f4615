"""The learning rate of SPHINX-V at fractions of its epoch, as the published code gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bestiary.training.schedule import warmup_cosine
from tests.parity.cases import cases, has, read_json

EPOCHS, MIN_LR = 1.0, 0.0
"""Both stages' scripts (reference/sphinx_v.md section 2.1); a case that carries its own values overrides them."""


def warmup_of(rows: list[dict[str, Any]], base_lr: float) -> float:
    """The length of the warm-up in epochs, read off the straight line through the first rising value."""
    first = min((r for r in rows if r["base_lr"] == base_lr and r["lr"] > 0), key=lambda r: float(r["epoch_fraction"]))
    return float(first["epoch_fraction"] * base_lr / first["lr"])


@pytest.mark.parametrize("folder", cases("sphinxv", has("lr_schedule.json")))
def test_learning_rate_follows_the_reference_over_an_epoch(folder: Path) -> None:
    rows = read_json(folder / "lr_schedule.json")
    assert rows
    for row in rows:
        ours = warmup_cosine(
            row["epoch_fraction"],
            lr=row["base_lr"],
            warmup=row.get("warmup_epochs") or warmup_of(rows, row["base_lr"]),
            end=row.get("epochs", EPOCHS),
            min_lr=row.get("min_lr", MIN_LR),
        )
        assert ours == pytest.approx(row["lr"], abs=1e-12, rel=1e-9)
