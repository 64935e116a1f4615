"""The floors of the house, held by import-linter, and the size of its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_imports_go_down_the_floors() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_files_stay_under_400_lines() -> None:
    files = [p for top in ("src", "data_modules", "experiments", "tests") for p in (ROOT / top).rglob("*.py")]
    assert files
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_entry_points_stay_under_60_lines() -> None:
    for name in ("train.py", "eval.py"):
        assert len((ROOT / name).read_text().splitlines()) < 60


@pytest.mark.parametrize(
    "module", ["bestiary.schema", "bestiary.compose", "bestiary.text.tokenizer", "data_modules.shards"]
)
def test_light_modules_import_without_lightning_or_transformers(module: str) -> None:
    code = f"import sys, {module}; assert not {{'lightning', 'transformers', 'wandb'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
