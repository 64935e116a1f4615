"""Every demo recipe learns, resumes bit for bit, is scored, and starts only from the stages it names.

In one process: what `python train.py` and `python eval.py` do, without their start.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

import eval as scoring
import train
from bestiary.compose import register_schema, typed
from bestiary.saved_run import build_pieces
from bestiary.training.parents import load_parent
from bestiary.training.run_dir import TIME_FIELDS, RunDir
from data_modules.embedded.plain import HELDOUT

ROOT = Path(__file__).parents[1]
STEPS, STOP = 20, 10
ROWS = 2
SIZES = {
    "build_plain": {
        "caption": 96,
        "documents": 48,
        "vqa": 64,
        "rec": 64,
        "grounded": 24,
        "dialogs": 24,
        "ovis_caption": 64,
        "ovis_description": 64,
        "ovis_questions": 64,
        "monkey_texts": 64,
    },
    "build": {"stage1": 24, "stage2": 24, "heldout": 2, "heldout_tasks": 1},
}
"""Training samples of a source; a held-out source of build_plain has 4."""
PARENTS = {
    "sphinx_stage1": [],
    "sphinx_stage2": ["sphinx_stage1", "sphinx_stage2"],
    "sphinx_1k_stage1": ["sphinx_stage1"],
    "sphinx_1k_stage2": ["sphinx_stage1", "sphinx_stage2", "sphinx_1k_stage1", "sphinx_1k_stage2"],
    "sphinx_v2_1k_finetune": ["sphinx_1k_stage2", "sphinx_v2_1k_finetune"],
    "sphinxv_stage1": ["sphinx_1k_stage2", "sphinx_v2_1k_finetune"],
    "sphinxv_stage2": ["sphinxv_stage1", "sphinxv_stage2"],
    "ovis_s1": [],
    "ovis_s2": ["ovis_s1", "ovis_s2"],
    "ovis_s3": ["ovis_s2", "ovis_s3"],
    "monkey_finetune": ["monkey_finetune"],
    "monkey_lora_3090": ["monkey_finetune", "monkey_lora_3090"],
    "monkey_1344x896": ["monkey_1344x896"],
}
"""Recipe -> the stages whose runs it starts from."""
STARTS = {"ovis_s2": "ovis_s1", "ovis_s3": "ovis_s2"}
"""Recipe -> the recipe whose run it starts from, where the command needs parent=; the others run as they stand."""
FINISHED: list[str] = []
"""Recipes that were run from beginning to end, in order; a run directory has its recipe's name."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def composed(name: str, *overrides: str) -> DictConfig:
    """The configuration of a command; scoring cut to a test's size."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # as Hydra's own main does
    with open_dict(config):
        del config["hydra"]
        for node in config.suite.values():
            node.max_samples, node.batch_size = 4, 8
            if "max_new_tokens" in node:
                node.max_new_tokens = 2
    return config


def recipe(root: Path, experiment: str, run: str, *overrides: str) -> DictConfig:
    """A recipe on little data, as its command stands or from its parent of STARTS; without `run` it is a resume."""
    config = composed(
        "config",
        f"experiment={experiment}",
        "logger=csv",
        "logger.progress=false",
        f"cluster.data_root={root}/data",
        "cluster.threads=1",
        f"stage.max_steps={STEPS}",
        f"stage.checkpoint_every={STOP}",
        "stage.eval_at_start=false",
        f"stage.batch_size={ROWS}",
        *([f"run_dir={root}/{run}"] if run else []),
        *([f"parent={root}/{STARTS[experiment]}"] if run and experiment in STARTS else []),
        *overrides,
    )
    with open_dict(config):
        config.data.prepare.sizes = sizes_of(config.data.prepare)
    return config


def sizes_of(prepare: DictConfig) -> dict[str, Any]:
    """Samples a source, as the recipe's own preparation takes them; what the recipe leaves out stays out."""
    if prepare._target_.endswith("build_plain"):
        wanted = SIZES["build_plain"]
        tasks = [source for source in prepare.sources if not source.endswith(HELDOUT)]
        train_sizes = {task: wanted[task.removeprefix("sphinx_")] for task in tasks}
        return train_sizes | {source.removesuffix(HELDOUT) + HELDOUT: 4 for source in prepare.sources}
    return SIZES["build"] | OmegaConf.to_container(prepare.get("sizes", OmegaConf.create({})))


def unscored(config: DictConfig) -> DictConfig:
    """The same run without benchmarks: two of a recipe's three runs are compared by their losses alone."""
    with open_dict(config):
        config.suite = {}
    return config


def run_command(config: DictConfig) -> int:
    return train.main(typed(config), config)


def finish(root: Path, experiment: str) -> None:
    """Run a recipe, and before it those that it starts from, where this was not done yet."""
    if experiment in FINISHED:
        return
    if experiment in STARTS:
        finish(root, STARTS[experiment])
    assert run_command(recipe(root, experiment, experiment)) == 0
    FINISHED.append(experiment)


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in RunDir(run).metrics.read()]


def learned(run: Path) -> None:
    """A run of STEPS steps whose loss has fallen."""
    losses = [line["loss"] for line in metrics(run)]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


class StopAfterCheckpoint(logging.Handler):
    """Asks this process to stop when the checkpoint of step STOP is written, as a scheduler does."""

    def emit(self, record: logging.LogRecord) -> None:
        if f"step-{STOP:06d}" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(config: DictConfig) -> int:
    log, handler = logging.getLogger("bestiary"), StopAfterCheckpoint()
    log.addHandler(handler)
    try:
        return run_command(config)
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("experiment", PARENTS)
def test_a_demo_recipe_learns_resumes_bit_for_bit_and_is_scored(root: Path, experiment: str) -> None:
    finish(root, experiment)
    whole, broken = root / experiment, root / f"{experiment}-stopped"
    learned(whole)

    assert stopped(unscored(recipe(root, experiment, broken.name))) == 128 + signal.SIGTERM
    assert STOP <= RunDir(broken).status.step < STEPS
    assert run_command(unscored(recipe(root, experiment, "", f"resume={broken}"))) == 0
    assert metrics(broken) == metrics(whole)
    assert RunDir(broken).samples.read() == RunDir(whole).samples.read()

    reports = {path.parent.name: json.loads(path.read_text()) for path in whole.glob("eval/*/report.json")}
    assert reports and all(report["metrics"] for report in reports.values()), "nothing was scored"
    assert set(reports) == set(composed("config", f"experiment={experiment}").suite)


@pytest.mark.parametrize(
    ("experiment", "parent"), [("sphinx_stage2", "sphinx_stage1"), ("sphinxv_stage1", "sphinx_1k_stage2")]
)
def test_a_recipe_that_runs_without_a_parent_learns_from_one_too(root: Path, experiment: str, parent: str) -> None:
    finish(root, parent)
    child = root / f"{experiment}-child"
    assert run_command(unscored(recipe(root, experiment, child.name, f"parent={root / parent}"))) == 0
    learned(child)


def test_a_stage_starts_from_the_stages_it_names_and_refuses_others_in_one_line(root: Path) -> None:
    for experiment in PARENTS:
        finish(root, experiment)
    for experiment, parents in PARENTS.items():
        run = typed(recipe(root, experiment, "never"))
        pieces = build_pieces(run)
        given = {"weights": run.model.weights, "unused": run.model.unused_weights}
        for parent in PARENTS:
            try:
                load_parent(pieces.model, root / parent, stage=run.stage, identity=pieces.identity, **given)
            except ValueError as refused:
                assert parent not in parents, refused
                assert "\n" not in str(refused) and str(root / parent) in str(refused)
            else:
                assert parent in parents, f"{experiment} took a parent of {parent}"


def test_a_refused_parent_starts_nothing_and_a_finished_run_scores_again_as_it_did(root: Path) -> None:
    for experiment in ("sphinxv_stage2", "sphinx_stage2"):
        finish(root, experiment)
    wrong = recipe(root, "sphinx_stage2", "refused")
    wrong.parent = f"{root}/sphinxv_stage2"
    with pytest.raises(ValueError, match="sphinxv_stage2, but stage sphinx_stage2 starts from"):
        run_command(wrong)
    assert not list((root / "refused").glob("checkpoints/step-*"))

    run = root / "sphinx_stage2"
    before = {path: json.loads(path.read_text())["metrics"] for path in run.glob("eval/*/report.json")}
    for path in before:
        path.unlink()
    config = composed("eval", f"run={run}", "threads=1")  # the suite is the run's own
    scoring.main(typed(config), config)
    assert {path: json.loads(path.read_text())["metrics"] for path in run.glob("eval/*/report.json")} == before
