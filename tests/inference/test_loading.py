"""A session from a run directory and from weights without one: the same answers, and one line where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from bestiary.config import Cluster, Data, Evaluation, EvaluationData, Model, Run, Source, Stage
from bestiary.inference.pictures import point
from bestiary.inference.session import Session
from bestiary.named_model import named_run
from bestiary.saved_run import no_parameter_memory
from bestiary.saved_weights import step_folder
from bestiary.training.assembly import evaluated_run, load_pieces
from bestiary.training.checkpoints import TrainState, write

from ..parity.sphinx_sizes import sphinx_arguments
from .tiny import TOKENIZER, tiny_node, tiny_session

PUBLISHED = Path(__file__).parents[1] / "goldens/sphinx/llama_ens_ckpt_mp2"
CASE = Path(__file__).parents[1] / "goldens/sphinx/llama_ens"
IMAGE = Image.new("RGB", (30, 20), (200, 10, 10))


def ask(session: Session) -> str:
    return session.respond(IMAGE, "What is <Mark 1>?", [point(3, 4)], frame="pixels", max_new_tokens=8)


def write_run(folder: Path, *, absent: tuple[str, ...] = (), weights: tuple[str, ...] = (), **changes: Any) -> None:
    """A run directory as training leaves it, of the tiny model."""
    model = tiny_session().model
    node = {**tiny_node(), "weights": list(weights), **changes}
    data = Data(root="none", max_tokens=300, sources={"a": Source(path="a", weight=1.0)})
    run = Run(data=data, stage=Stage(name="tiny", max_steps=1, batch_size=1))
    run.stage.optimizer.lr = 0.1
    config = OmegaConf.structured(run)
    config.model = Model(**node)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.resolved.yaml")
    digest = tiny_session().processor.tokenizer.sha256  # type: ignore[attr-defined]
    state = TrainState(step=7, stage="tiny", seed=0, identity={"tokenizer": digest}, absent=list(absent))
    tensors = {name: value for name, value in model.state_dict().items() if name not in absent}
    write(folder / "checkpoints", state, model=tensors, optimizer={}, rng={}, keep=0)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """The working folder is not the project's."""
    before = os.getcwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_a_run_answers_as_the_model_it_saved(elsewhere: Path) -> None:
    write_run(elsewhere / "run")
    session = Session.from_run("run")
    assert ask(session) == ask(tiny_session())
    assert not session.model.training
    assert not any(value.is_meta for value in (*session.model.parameters(), *session.model.buffers()))


def test_a_run_in_bfloat16_answers_too(tmp_path: Path) -> None:
    write_run(tmp_path)
    session = Session.from_run(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16}
    assert ask(session)


def test_what_a_checkpoint_leaves_out_comes_from_where_the_run_began(tmp_path: Path) -> None:
    names = tuple(name for name in tiny_session().model.state_dict() if name.startswith("vision.clip"))
    write_run(tmp_path / "base")
    write_run(tmp_path / "run", absent=names, weights=(str(step_folder(tmp_path / "base/checkpoints", 7)),))
    assert ask(Session.from_run(tmp_path / "run")) == ask(tiny_session())
    write_run(tmp_path / "lost", absent=names)
    with pytest.raises(ValueError, match=rf"lost lacks {len(names)} of the model's tensors \(vision.clip"):
        Session.from_run(tmp_path / "lost")


@pytest.mark.parametrize("damage", ["truncate", "no checkpoint", "no run"])
def test_what_is_no_whole_run_is_one_line(tmp_path: Path, damage: str) -> None:
    write_run(tmp_path)
    file = step_folder(tmp_path / "checkpoints", 7) / "model.safetensors"
    said = "no complete checkpoint"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no checkpoint":
        (file.parent / "MANIFEST.json").unlink()
    else:
        (tmp_path / "config.resolved.yaml").unlink()
        said = "is not a run directory"
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        Session.from_run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "said"), [("gpu7", "use cpu, cuda"), ("cuda:99", "is not there"), ("xpu", "is not there")]
)
def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(device: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Session.from_run("no run", device=device)
    assert "\n" not in str(error.value)


def test_weights_of_a_file_or_a_checkpoint_answer_as_the_run_does(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_node()))
    checkpoint = step_folder(tmp_path / "run/checkpoints", 7)
    for path in (checkpoint, checkpoint / "model.safetensors"):
        assert ask(Session.from_weights(path, model=tmp_path / "tiny.yaml")) == ask(tiny_session())


def test_what_is_evaluated_is_a_run_or_weights_without_one(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_node()))
    heldout = {"held": Source(path="held")}
    asked = Evaluation(run="", data=EvaluationData(heldout=heldout))
    run = evaluated_run(asked, tmp_path / "run")
    assert run.data.root == "none" and list(run.data.heldout) == ["held"]
    ours = load_pieces(asked, run, tmp_path / "run").model.state_dict()

    path = step_folder(tmp_path / "run/checkpoints", 7) / "model.safetensors"
    bare = replace(asked, model=str(tmp_path / "tiny.yaml"))
    run = evaluated_run(bare, path)
    assert run.data.root == Cluster().data_root and run.suite == {} and list(run.data.heldout) == ["held"]
    assert evaluated_run(replace(bare, data=EvaluationData(root="there")), path).data.root == "there"
    theirs = load_pieces(bare, run, path).model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    with pytest.raises(ValueError, match=r"model=.*tiny\.yaml and .* no effect: .* is a run directory"):
        evaluated_run(bare, tmp_path / "run")
    with pytest.raises(ValueError, match=r"scale=demo have no effect: .* is a run directory"):
        evaluated_run(replace(asked, scale="demo"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"scale=demo has no effect without model=NAME"):
        evaluated_run(replace(asked, scale="demo"), path)
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        evaluated_run(asked, tmp_path / "nothing")


def published_yaml(folder: Path, **decoder: Any) -> Path:
    """The model node of the published golden's sizes."""
    sizes = sphinx_arguments(json.loads((CASE / "config.json").read_text()))
    sizes["decoder"] |= decoder
    tokenizer = {"_target_": "bestiary.variants.sphinx.processor.SphinxProcessor", "tokenizer": "not/there.model"}
    build = {"_target_": "bestiary.variants.sphinx.model.build_sphinx", "reference_quirks": True, **sizes}
    node = {
        "name": "golden",
        "build": build,
        "processor": tokenizer,
        "module": {"_target_": "bestiary.mllm.Likelihood"},
    }
    (folder / "golden.yaml").write_text(yaml.safe_dump({**node, "module": tiny_node()["module"]}))
    return folder / "golden.yaml"


@pytest.mark.slow
def test_a_published_folder_and_its_import_answer_alike(tmp_path: Path) -> None:
    from bestiary.weights.importing import Asked, import_weights

    model = published_yaml(tmp_path)
    import_weights([PUBLISHED], tmp_path / "imported", Asked())
    sessions = [Session.from_weights(path, model=model) for path in (PUBLISHED, tmp_path / "imported")]
    for one, other in zip(*(s.model.state_dict().items() for s in sessions), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    answers = {session.respond(IMAGE, "What is it?", max_new_tokens=6) for session in sessions}
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [({"n_heads": 2}, "says n_heads=4"), ({"rope_theta": 5.0}, "says rope_theta=10000"), ({"dim": 64}, "says dim=32")],
)
def test_sizes_that_are_not_those_of_the_weights_are_one_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Session.from_weights(PUBLISHED, model=published_yaml(tmp_path, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_imported", [False, True])
def test_weights_of_five_views_are_no_model_of_one(tmp_path: Path, is_imported: bool) -> None:
    from bestiary.weights.importing import Asked, import_weights

    model, folder = published_yaml(tmp_path), tmp_path / "five"
    shutil.copytree(PUBLISHED, folder, copy_function=shutil.copyfile)
    (folder / "meta.json").write_text(json.dumps({"llama_type": "llama_ens5"}))
    if is_imported:
        import_weights([folder], tmp_path / "imported", Asked())
        folder = tmp_path / "imported"
    with pytest.raises(ValueError, match=r"views=whole 0,0 0,1 1,0 1,1, this run has views=whole; .*cut in") as error:
        Session.from_weights(folder, model=model)
    assert "\n" not in str(error.value)


def test_an_unknown_model_is_answered_with_the_nearest(elsewhere: Path) -> None:
    with pytest.raises(ValueError, match=r"'sphnx' is unknown; nearest valid: .*sphinx"):
        Session.from_weights(PUBLISHED, model="sphnx")
    with pytest.raises(ValueError, match="nowhere do not exist"):
        Session.from_weights("nowhere", model="sphinx_v", scale="demo")
    with pytest.raises(ValueError, match="no such file"):
        Session.from_weights(PUBLISHED, model="mine.yaml")


@pytest.mark.slow
def test_a_model_of_conf_is_composed_from_any_folder_with_overrides(elsewhere: Path) -> None:
    with pytest.raises(ValueError, match="no scale=huge"):
        named_run("sphinx_v", scale="huge")
    assert named_run("sphinx_v", scale="demo", overrides=["model.build.num_slots=3"]).model.build["num_slots"] == 3
    with pytest.raises(ValueError, match=r"model sphinx_v at scale demo: .*num_slot"):
        named_run("sphinx_v", scale="demo", overrides=["model.build.num_slts=3"])


def test_a_model_is_built_without_memory_for_its_parameters_and_with_its_buffers() -> None:
    with no_parameter_memory():
        layer = torch.nn.BatchNorm1d(3)
    assert layer.weight.is_meta and not layer.running_mean.is_meta  # type: ignore[union-attr]
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert TOKENIZER.is_file()
