"""A model by its name in conf/model, or by a yaml of one's own, and whether weights beside a config.json are of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import bestiary
from bestiary.compose import check_targets, explain, nearest, register_schema, typed
from bestiary.config import Model, Run
from bestiary.language.decoder import llama_config
from bestiary.mllm import MultimodalLM

_DECODER_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
}
"""What a published config.json may say of the decoder -> what transformers calls it."""


def at_project(path: str | Path) -> Path:
    """A path as a YAML file spells it: absolute, or from the working folder, or else from the project's folder."""
    here = Path(path)
    there = Path(bestiary.__file__).resolve().parents[2] / here
    return there if not here.exists() and there.exists() else here


def named_run(model: str | Path, *, scale: str = "paper", overrides: Sequence[str] = ()) -> Run:
    """A run whose `model` is what conf/model/<model>.yaml says at that scale; nothing else of it means anything.

    model: such a name, or the path of a yaml that holds a whole model node, as config.resolved.yaml has under `model`.
    overrides: more of what train.py's command line takes (`decoder=llama2_7b`).
    """
    if str(model).endswith((".yaml", ".yml")):
        return Run(model=_model_of(Path(model), overrides))
    conf = at_project("conf")
    known = sorted(path.stem for path in (conf / "model").glob("*.yaml"))
    if not known:
        raise ValueError(f"model {model}: there is no conf/model here; work in the project's folder, or name a yaml")
    if model not in known:
        raise ValueError(f"model {model!r} is unknown{nearest(str(model), known)}")
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    register_schema()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            run = typed(compose("config", [f"model={model}", f"scale={scale}", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"model {model} at scale {scale}: {explain(error)}") from error
    assert isinstance(run, Run)
    return run


def check_config(folder: Path, model: MultimodalLM, *, called: str) -> None:
    """Raise where config.json or params.json beside weights contradicts the model, also in what no tensor shows."""
    file = next((f for name in ("config.json", "params.json") if (f := folder / name).is_file()), None)
    if file is None:
        return
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from error
    told = told if isinstance(told, dict) else {}
    says = {key: told[key] for key in _DECODER_KEYS if told.get(key) is not None}
    if not {"dim", "n_layers", "n_heads"} <= says.keys():
        return  # not in the words of LLaMA's files
    theirs = llama_config(**says, vocab_size=model.decoder.vocab_size, max_seq_len=model.decoder.max_positions)
    for key, name in _DECODER_KEYS.items():
        ours, value = getattr(model.decoder.config, name, None), getattr(theirs, name)
        if ours != value:
            raise ValueError(
                f"{file} says {key}={says.get(key)} ({name} {value}) but {called} has {name} {ours}; name the model, "
                "scale and decoder that these weights are of"
            )


def published_reader(run: Run) -> Callable[[MultimodalLM, Path], Any]:
    """What puts a published folder into a model: `load_published` of the `weights` module beside its builder."""
    reader = of_variant(run, "load_published")
    if reader is None:
        raise ValueError(f"{run.model.name} reads no published folder; give a safetensors file or an imported folder")
    return reader


def of_variant(run: Run, name: str) -> Callable[..., Any] | None:
    """A function of the `weights` module beside the model's builder; None where there is none of that name."""
    package = str(run.model.build["_target_"]).rsplit(".", 2)[0]
    found = importlib.util.find_spec(f"{package}.weights")
    return getattr(importlib.import_module(f"{package}.weights"), name, None) if found else None


def _model_of(path: Path, overrides: Sequence[str]) -> Model:
    if not path.is_file():
        raise ValueError(f"model {path}: no such file; name one of conf/model, or a yaml with a model node")
    if overrides:
        raise ValueError(f"overrides={list(overrides)} are for models of conf/model; change {path} itself")
    try:
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ValueError(f"model {path}: {explain(error)}") from error
    assert isinstance(model, Model)
    check_targets({"model": {"build": model.build, "processor": model.processor}})
    return model
