"""The demo-scale model as the experiment files compose it."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from bestiary.compose import build, register_schema, typed
from bestiary.config import Run
from bestiary.mllm import MultimodalLM

ROOT = Path(__file__).resolve().parents[2]


def demo_run(*overrides: str) -> Run:
    """`experiment=sphinxv_stage1` at demo scale."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=sphinxv_stage1", *overrides])
    run = typed(config)
    assert isinstance(run, Run)
    return run


def demo_model() -> MultimodalLM:
    """The model of that run with random weights."""
    model = build(demo_run().model.build)
    assert isinstance(model, MultimodalLM)
    return model
