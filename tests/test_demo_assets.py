"""Every step of `make demo-assets` at a tiny size: it runs, and writes files that fit the demo model."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from bestiary.saved_run import build_pieces
from bestiary.training.parents import load_first_weights
from experiments.demo_assets import __main__ as steps
from experiments.demo_assets import (
    encoders,
    monkey_base,
    monkey_vocabulary,
    ovis_encoder,
    ovis_llm,
    prompt_fit,
    tokenizer,
)
from experiments.demo_assets.model import demo_model, demo_run

pytestmark = pytest.mark.slow


def test_the_assets_are_made_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encoders, prompt_fit):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
        monkeypatch.setattr(module, "NUM_PICTURES", 1600)
    short = {name: tuple(replace(part, steps=3) for part in parts) for name, parts in encoders.COURSES.items()}
    monkeypatch.setattr(encoders, "COURSES", short)

    def step(module: object, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["step", *arguments])
        module.main()  # type: ignore[attr-defined]

    step(tokenizer, "--out", str(tmp_path / "tokenizer.model"))
    assert (tmp_path / "tokenizer.model").stat().st_size > 1000
    for tower in short:
        step(encoders, "--tower", tower)
    eyes, base = tmp_path / "encoders.safetensors", tmp_path / "base.safetensors"
    step(encoders, "--tower", "join", "--out", str(eyes))
    step(
        prompt_fit, "--encoders", str(eyes), "--out", str(base), "--pictures", "160", "--slot-steps", "3",
        "--answer-steps", "3",
    )  # fmt: skip
    names = set()
    for file in (eyes, base):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    wanted = set(demo_model().state_dict())
    assert wanted - names == {name for name in wanted if name.startswith(prompt_fit.LEFT_TO_STAGE_1)} != set()
    assert steps.RUN_DIR.parent.name == "runs"


def test_ovis_assets_are_made_and_fit_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments in ((ovis_encoder, []), (ovis_llm, ["--seconds", "0.5", "--tokens", "200"])):
        monkeypatch.setattr(sys, "argv", ["step", "--out", str(tmp_path), *arguments])
        module.main()
    run = demo_run("experiment=ovis_s1", f"model.processor.tokenizer={tmp_path}/tokenizer")
    pieces = build_pieces(run)  # also checks that the tokenizer is the decoder's
    files = [str(tmp_path / name) for name in ("clip.safetensors", "llm.safetensors")]
    given = load_first_weights(pieces.model, files, pieces.identity)
    assert {name.split(".")[1] for name in set(pieces.model.state_dict()) - given} == {"head", "table"}
    shipped = {path.name: path.stat().st_size for path in ovis_llm.ASSETS.rglob("*") if path.is_file()}
    assert {"clip.safetensors", "llm.safetensors", "tokenizer.json"} <= set(shipped)
    assert sum(shipped.values()) < 2.5e6


def test_monkeys_assets_are_made_and_fit_the_demo_model_but_for_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--pictures", "16", "--speech-steps", "2", "--eye-steps", "2", "--steps", "2", "--batch", "4"]
    for module, arguments in ((monkey_vocabulary, []), (monkey_base, short)):
        monkeypatch.setattr(sys, "argv", ["step", "--out", str(tmp_path), *arguments])
        module.main()
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (monkey_vocabulary.ASSETS / "qwen.tiktoken").read_bytes()
    run = demo_run("experiment=monkey_finetune", f"model.processor.tokenizer={tmp_path}")
    pieces = build_pieces(run)
    given = load_first_weights(pieces.model, [str(tmp_path / "base.safetensors")], pieces.identity)
    assert all("_lora." in name for name in set(pieces.model.state_dict()) - given)
    shipped = [path for path in monkey_vocabulary.ASSETS.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 2.5e6
    for line in (monkey_vocabulary.ASSETS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((monkey_vocabulary.ASSETS / name).read_bytes()).hexdigest() == digest
