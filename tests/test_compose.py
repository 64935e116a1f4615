"""Composition: typed keys, allowed targets, the nearest valid name in every error."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from bestiary.compose import base_of, build, check_targets, explain, load_run, register_schema, signature, typed
from bestiary.config import Run

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml"))


def composed(*overrides: str) -> Run:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose("config", overrides=list(overrides)))


def _settings() -> Iterator[Any]:
    """Every experiment at every scale on every cluster; of every second experiment one of the six is fast, in turn."""
    for place, experiment in enumerate(EXPERIMENTS):
        for turn, (scale, cluster) in enumerate(product(["demo", "paper"], ["cpu", "gpu", "zero2"])):
            marks = () if place % 2 == 0 and turn == place // 2 % 6 else pytest.mark.slow
            yield pytest.param(experiment, scale, cluster, marks=marks)


@pytest.mark.parametrize(("experiment", "scale", "cluster"), _settings())
def test_every_experiment_composes_at_every_scale(experiment: str, scale: str, cluster: str) -> None:
    run = composed(f"experiment={experiment}", f"scale={scale}", f"cluster={cluster}")
    assert run.stage.name == experiment
    assert run.scale == scale


def test_an_experiment_value_wins_over_the_scale(tmp_path: Path) -> None:
    register_schema()
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\nstage: {max_steps: 7}\n")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert OmegaConf.select(config, "stage.max_steps") == 7


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("stage: {max_step: 7}", "max_step", "max_steps"),
        pytest.param("stage: {optimizer: {ler: 1}}", "ler", "lr", marks=pytest.mark.slow),
        pytest.param("data: {packin: true}", "packin", "packing", marks=pytest.mark.slow),
        ("sead: 3", "sead", "seed"),
        ("data: {sources: {x: {path: p, domian: d}}}", "domian", "domain"),
        pytest.param("cluster: {device: 1}", "device", "devices", marks=pytest.mark.slow),
        pytest.param("model: {buidl: {}}", "buidl", "build", marks=pytest.mark.slow),
    ],
)
def test_a_typo_in_an_experiment_file_fails_and_names_the_nearest_key(
    tmp_path: Path, text: str, key: str, near: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    done = train(f"--config-dir={tmp_path}", "experiment=mine", "--cfg", "job")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"'{key}'" in done.stderr
    assert near in done.stderr


@pytest.mark.parametrize("where", ["model.build", "model.processor", "model.build.vision", "suite.regions"])
def test_a_typo_inside_a_target_node_names_the_nearest_argument(where: str) -> None:
    run = composed("experiment=sphinxv_stage2")
    node: object = run
    for part in where.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    assert isinstance(node, dict)
    node["canvas_pxx"] = 1
    if "_target_" in node:
        with pytest.raises(ValueError, match="canvas_pxx"):
            check_targets(node, where)


@pytest.mark.slow
def test_unknown_overrides_and_choices_end_with_one_line() -> None:
    for arguments, near in [
        (["experiment=sphinxv_stge2"], "sphinxv_stage2"),
        (["scale=papr"], "paper"),
        (["stage.optimizer.l=3"], "lr"),
        (["modle=sphinx_v"], "model"),
        (["experiment=sphinx_stage1", "model.decoder_weights=null", "dry_run=true"], "set model.weights without it"),
        (["decoder=llama2_70"], "llama2_70b"),
    ]:
        done = train(*arguments, *([] if "dry_run=true" in arguments else ["--cfg", "job"]))
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert near in done.stderr


def test_an_unknown_key_of_eval_is_told_the_keys_that_eval_has() -> None:
    register_schema()
    for wrong, near in [("acelerator=gpu", "accelerator"), ("cluster.threads=1", "suite")]:
        with (
            initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
            pytest.raises(HydraException) as raised,
        ):
            compose("eval", overrides=["run=x", wrong])
        assert f"in Evaluation; nearest valid: {near}  (" in explain(raised.value)


def test_targets_outside_the_allowlist_are_refused() -> None:
    outside = [
        "os.system",
        "torch.load",
        "pathlib.Path.unlink",
        "bestiary_evil.x",
        "builtins.eval",
        "bestiary.cli.main",
    ]
    imported = ["bestiary.evaluation.report.replace", "bestiary.variants.tensor_file.safe_open"]
    private = ["bestiary.evaluation.report._flat"]
    for target in [*outside, *imported, *private]:
        with pytest.raises(ValueError, match="not allowed"):
            check_targets({"a": [{"_target_": target}]})
        with pytest.raises(ValueError, match="not allowed"):
            build({"_target_": target})


@pytest.mark.parametrize("where", ["model.build._target_", "model.build.vision.clip._target_", "data.prepare._target_"])
def test_a_run_directory_from_elsewhere_reaches_no_other_callable(tmp_path: Path, where: str) -> None:
    run = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(composed("experiment=sphinxv_stage1"))))
    for target, refusal in [("os.system", "not allowed"), ("bestiary.evaluation.report.replace", "only imports")]:
        OmegaConf.update(run, where, target, force_add=True)
        (tmp_path / "config.resolved.yaml").write_text(OmegaConf.to_yaml(run))
        with pytest.raises(ValueError, match=refusal):
            load_run(tmp_path)


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("data.prepare", "data_modules.surgery.resume"),
        ("model.build.vision", "bestiary.variants.sphinx.consolidated.save_shard"),
        ("model.processor", "data_modules.embedded.build.build"),
        ("model.module", "bestiary.variants.ovis.model.build_ovis"),
        ("suite.mine.rule", "bestiary.evaluation.report.write_atomically"),
        ("suite", "data_modules.embedded.build.build"),
    ],
)
def test_a_target_is_only_what_its_place_in_a_run_is_for(place: str, target: str) -> None:
    tree: object = {"_target_": target}
    for key in reversed(place.split(".")):
        tree = {key: tree}
    with pytest.raises(ValueError, match=rf"{place}: _target_ .* is not allowed there; name "):
        check_targets(tree)


def test_arguments_that_a_target_does_not_take_or_lacks_are_one_line() -> None:
    with pytest.raises(ValueError, match="takes no 'tolerance'"):
        check_targets({"_target_": "bestiary.evaluation.rules.ExactMatch", "tolerance": 1})
    with pytest.raises(ValueError, match=r"QuestionBenchmark: missing a required argument: 'rule'"):
        build({"_target_": "bestiary.evaluation.question_benchmark.QuestionBenchmark", "name": "a"})


def test_a_target_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="check_targets"):
        signature("bestiary.compose.chek_targets")
    with pytest.raises(ValueError, match="no module"):
        signature("bestiary.nowhere.thing")


@pytest.mark.slow
def test_values_that_contradict_are_named_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="cannot be dealt evenly to 5"):
        composed("cluster.devices=5")
    with pytest.raises(ValueError, match="resume=a continues a run"):
        composed("resume=a", "parent=b")
    with pytest.raises(ValueError, match="attention=fast is not one of"):
        composed("attention=fast")
    with pytest.raises(ValueError, match="every source has weight 0"):
        composed(*(f"data.sources.{name}.weight=0" for name in composed().data.sources))
    with pytest.raises(ValueError, match=r"data\.row_tokens=900 has no effect with data\.packing=false"):
        composed("data.row_tokens=900", "data.packing=false")
    with pytest.raises(ValueError, match=r"data\.row_tokens=9: .* at least data\.max_tokens=384, or leave it out"):
        composed("data.row_tokens=9")
    assert composed("data.row_tokens=900").data.row_tokens == 900
    assert "resume" in explain(ValueError("resume"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("experimnt=sphinxv_stage2", "nearest valid: experiment"),
        ("+stage.max_step=3", r"there is no stage\.max_step; nearest valid: max_steps"),
        (
            "data.sources.natural_stag2.weight=3",
            r"there is no data\.sources\.natural_stag2; nearest valid: natural_stage2",
        ),
        ("data.root=a{1}", r"""cannot read 'data\.root=a\{1\}': .*write 'data\.root="a\{1\}"'$"""),
        ("+data.sources.mine.path=x", r"\+dataset@data\.sources\.NAME=FILE$"),
        ("data.sources.natural_stage2.weight=heavy", "'heavy' of type 'str' could not be converted to Float$"),
        ("~data.sources.nowhere", r"^Could not delete from config\. 'data\.sources\.nowhere' does not exist\.$"),
    ],
)
def test_a_wrong_override_is_explained_with_the_remedy(override: str, line: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        composed(override)
    assert re.search(line, explain(caught.value))


def test_an_error_of_ours_is_said_once_whatever_it_came_from() -> None:
    try:
        raise ValueError("shard 3 is cut: write it again") from OSError("cut in the middle")
    except ValueError as error:
        assert explain(error) == "shard 3 is cut: write it again"


@pytest.mark.slow
def test_help_and_cfg_are_quick() -> None:
    for arguments, limit in [(["--help"], 2.0), (["--cfg", "job"], 1.0)]:
        best = min(timed(*arguments) for _ in range(3))
        assert best < limit, f"{arguments} took {best:.2f} s of CPU"


def timed(*arguments: str) -> float:
    """CPU seconds of the program: what else runs on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert train(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def saved_run(folder: Path, *overrides: str) -> Path:
    """What a start with these options leaves of its configuration."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        text = OmegaConf.to_yaml(compose("config", overrides=["experiment=sphinxv_stage1", *overrides]))
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    (folder / "status.json").write_text("{}")
    return folder


def resumed(run: Path, *overrides: str) -> Run:
    """What `python train.py resume=RUN ...` is asked to be."""
    given = [f"resume={run}", *overrides]
    name = base_of(given, "config", ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose(name, overrides=given))


def test_a_resume_stands_on_the_configuration_of_its_run(tmp_path: Path) -> None:
    first = ["run_dir=x", "seed=7", "stage.max_steps=9", "stream.on_change=remix", "cluster=gpu", "cluster.data_root=d"]
    run = saved_run(tmp_path / "a", *first, "parent=p")
    asked = resumed(run, "stage.batch_size=32")
    assert (asked.resume, asked.run_dir, asked.parent, asked.stream.on_change) == (str(run), None, None, "refuse")
    assert (asked.seed, asked.stage.max_steps, asked.stage.batch_size) == (7, 9, 32)
    assert (asked.stage.name, asked.cluster.precision, asked.data.root) == ("sphinxv_stage1", "bf16-true", "d")


def test_a_group_chosen_at_a_resume_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "a", "cluster=gpu", "cluster.data_root=d", "+suite.mine._target_=bestiary.x")
    asked = resumed(run, "cluster=zero2", "logger=csv", "suite=regions", "~data.sources.natural_stage1")
    assert (asked.cluster.strategy, asked.cluster.devices, asked.cluster.data_root) == ("zero2", 8, "d")
    assert resumed(run, "cluster=cpu", "suite=regions").cluster.precision == "32-true"
    assert not asked.logger.wandb and set(asked.suite) == {"regions"}
    assert "natural_stage1" not in asked.data.sources and asked.data.sources


def test_a_resume_that_chooses_an_experiment_is_composed_anew(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "a", "seed=7")
    assert base_of([f"resume={run}", "experiment=sphinxv_stage1"], "config", ROOT / "conf") == "config"
    assert base_of(["resume=auto"], "config", ROOT / "conf") == "config"
    with pytest.raises(ValueError, match=r"resume=.*/b is not a run directory.*nearest valid: a"):
        base_of([f"resume={tmp_path / 'b'}"], "config", ROOT / "conf")


def test_a_repeated_command_may_drop_a_source_that_its_run_has_dropped(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "a", "~data.sources.natural_stage1")
    with pytest.raises(HydraException, match="Could not delete"):
        resumed(run, "~data.sources.natural_stage1")
    (run / "changes.jsonl").write_text('{"step": 4, "lines": ["  removed  natural_stage1: its share was 25.00%"]}\n')
    assert "natural_stage1" not in resumed(run, "~data.sources.natural_stage1").data.sources
    with pytest.raises(HydraException, match="Could not delete"):
        resumed(run, "~data.sources.natural_stage")
