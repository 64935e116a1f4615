"""The shipped demo assets are whole, small, and fit the demo model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import safe_open

from bestiary.compose import build
from experiments.demo_assets.model import demo_run

ASSETS = Path(__file__).parents[2] / "src/bestiary/variants/sphinx_v/assets"


def test_every_file_has_its_sum_and_together_they_are_small() -> None:
    sums = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = [*ASSETS.glob("*.safetensors"), *ASSETS.glob("*.model")]
    assert {file.name for file in files} == set(sums)
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sums[file.name]
    assert sum(file.stat().st_size for file in files) < 15e6


def test_stage_1_is_the_whole_model_and_its_start_lacks_only_the_projection_it_learns() -> None:
    names = set(build(demo_run().model.build).state_dict())
    found = {}
    for file in ASSETS.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found[file.stem] = set(tensors.keys())
    assert found["stage1"] == names
    drawn = names - found["encoders"] - found["base"]
    assert drawn == {name for name in names if name.startswith("regions.proj.")} != set()
    assert not found["encoders"] & found["base"]
