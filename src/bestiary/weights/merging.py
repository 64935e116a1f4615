"""A run that holds adapters, or only what trained, as whole weights; and its adapters alone in peft's own layout.

merge      base + (alpha / rank) B A at every adapted layer, what trained otherwise in its place: weights that serve as
           `parent=`, for eval.py and for export, without any trace of how they were trained. Of whole weights whose
           model was built with adapters that a weight can take in: without these adapters
adapter    adapter_config.json and adapter_model.safetensors, which peft puts on the decoder in its Hugging Face layout

Tensors are read and written one at a time. The base is the run's parent or its pretrained files, and must be as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from bestiary.compose import load_run
from bestiary.config import Run, Tuning
from bestiary.language.tuning import (
    ADAPTER,
    BuiltInAdapters,
    adapted_modules,
    is_adapter,
    lora_config,
    lora_names,
    merged_weight,
    plain_name,
)
from bestiary.named_model import at_project, of_variant
from bestiary.saved_tuning import BASE, DECODER, base_sha256, check_base, frozen_dtype
from bestiary.training.checkpoints import LAST, TrainState, header, seal
from bestiary.training.run_dir import RunDir
from bestiary.variants.tensor_file import TensorFile
from bestiary.weights.folder import MODEL, STATE, new_folder
from bestiary.weights.ours import OurTensors

_CONFIGS = ("config.yaml", "config.resolved.yaml")


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did. adapted: weights that an adapter was added to; trained: others taken from the run."""

    num_tensors: int
    adapted: int
    trained: int


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export of adapters did. left: tensors the run trained that are no adapter's and so are not in it."""

    num_layers: int
    left: int


def merge(path: Path, out: Path, *, base: Path | None = None, dtype: torch.dtype | None = None) -> Merged:
    """Write `out`, a run directory with whole weights at step 0, from a run that saved what trained; ValueError else.

    path: a run directory (its newest checkpoint) or one of its checkpoint folders. base: where the base is now, if not
    where the run began from. dtype: of all weights; None keeps what the run held, float32 or its `frozen_dtype`, and
    adds to what it held. A base that the run had quantised is merged as it was before. What a run with whole weights
    trained, taken out by `trained.export_trained`, is put on its base bit for bit.
    """
    folder, run, delta = opened_run(path)
    if BASE not in delta.identity:
        return _take_in(folder, run, delta, out, base=base, dtype=dtype)
    origins = [OurTensors(origin) for origin in ([base] if base else origins_of(folder, run))]
    frozen = _Base(origins, delta, folder, dtype=frozen_dtype(run.tuning, run.cluster) or torch.float32)
    plain = {plain_name(name): name for name in delta.shapes if not is_adapter(name)}
    pairs = {f"{module}.weight": module for module in adapted_modules(delta.shapes)}
    tied = {plain_name(name): plain_name(stored) for name, stored in delta.tied.items()} | frozen.tied
    names = [name for name in sorted({*delta.absent, *plain}) if name not in tied]
    scale = run.tuning.alpha / run.tuning.rank if pairs else 0.0

    def tensor(name: str) -> torch.Tensor:
        value = delta[plain[name]] if name in plain else frozen[name]
        if name in pairs:
            a, b = lora_names(pairs[name])
            value = merged_weight(value, delta[a], delta[b], scale)
        return value.to(shape(name)[0])

    def shape(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        kind = delta.dtypes[plain[name]] if name in plain else frozen.dtype_of(name)
        for matrix in lora_names(pairs[name]) if name in pairs else ():
            kind = torch.promote_types(kind, delta.dtypes[matrix])
        kind = dtype if dtype is not None and kind.is_floating_point else kind
        return kind, delta.shapes[plain[name]] if name in plain else frozen.shapes[name]

    identity = {key: value for key, value in delta.identity.items() if key not in (BASE, "tuning")}
    state = TrainState(step=0, stage=delta.stage, seed=run.seed, identity=identity, tied=tied)
    told = {"merged": json.dumps({"run": str(folder), "step": delta.step})}
    whole = OmegaConf.to_container(OmegaConf.structured(Tuning(frozen_dtype=run.tuning.frozen_dtype)))
    plan = {name: shape(name) for name in names}
    write_run(folder, out, plan, tensor, state, told=told, changes={"tuning": whole})
    return Merged(len(names), len(pairs), len(plain))


def _take_in(
    folder: Path, run: Run, own: OurTensors, out: Path, *, base: Path | None, dtype: torch.dtype | None
) -> Merged:
    """Whole weights without the adapters that their model was built with, which its linear layers take in."""
    find = of_variant(run, "built_in_adapters")
    found: BuiltInAdapters | None = find(own.stored) if find else None
    if found is None:
        raise ValueError(f"{folder} holds whole weights already (tuning.method={run.tuning.method}); use it as it is")
    if base is not None:
        raise ValueError(f"--base {base} has no effect: {folder} holds whole weights; leave it out")
    beside = found.beside
    adapters = {module for module, _, _ in beside.values()}
    names = [name for name in own.stored if not _owners(name, adapters)]

    def tensor(name: str) -> torch.Tensor:
        value = own[name]
        if name in beside:
            module, part, parts = beside[name]
            rows = own[f"{module}.lora_b.weight"].chunk(parts)[part]
            value = merged_weight(value, own[f"{module}.lora_a.weight"], rows, float(own[f"{module}.lora_scale"]))
        return value.to(plan[name][0])

    def kind(name: str) -> torch.dtype:
        stored = own.dtypes[name]
        if name in beside:
            stored = torch.promote_types(stored, own.dtypes[f"{beside[name][0]}.lora_a.weight"])
        return dtype if dtype is not None and stored.is_floating_point else stored

    plan = {name: (kind(name), own.shapes[name]) for name in names}
    state = TrainState(step=0, stage=own.stage, seed=run.seed, identity=own.identity, tied=own.tied)
    told = {"merged": json.dumps({"run": str(folder), "step": own.step})}
    write_run(folder, out, plan, tensor, state, told=told, changes={f"model.build.{found.argument}": None})
    return Merged(len(names), len(beside), len(names) - len(beside))


def _owners(name: str, adapters: Collection[str]) -> list[str]:
    """The adapter that a tensor is one of, if any."""
    parts = name.split(".")
    return [module for count in range(1, len(parts)) if (module := ".".join(parts[:count])) in adapters]


def write_run(
    folder: Path,
    out: Path,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
    state: TrainState,
    *,
    told: Mapping[str, str],
    changes: Mapping[str, Any],
) -> None:
    """Write `out`, a run directory at step 0 of a run's weights in another form, one tensor at a time.

    plan: dtype and shape of every tensor. changes: of the run's configuration, by dotted keys.
    """
    words = {"absent": json.dumps(state.absent), "tied": json.dumps(state.tied), **told}
    with new_folder(out) as target:
        place = _write_configs(folder, target, changes)
        with TensorFile(place / MODEL, plan, metadata=header(state) | words) as file:
            for name in plan:
                file.add(name, tensor(name))
        (place / STATE).write_text(state.to_json(), encoding="utf-8")
        seal(place, 0)
        (place.parent / LAST).symlink_to(place.name)


def export_adapter(path: Path, out: Path) -> Exported:
    """Write `out`, a folder that `peft.PeftModel.from_pretrained` puts on the decoder in its Hugging Face layout."""
    _, run, delta = opened_run(path)
    tensors = adapter_tensors({name: delta[name] for name in delta.shapes if is_adapter(name)})
    if not tensors:
        raise ValueError(f"{path} was trained with tuning.method={run.tuning.method} and holds no adapter; merge it")
    with new_folder(out) as target:
        write_adapter(tensors, run.tuning, target)
    return Exported(len(tensors) // 2, len(delta.shapes) - len(tensors))


def adapter_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters of a model's state under the names they have in the decoder."""
    return {name.removeprefix(DECODER): value.clone() for name, value in state.items() if is_adapter(name)}


def write_adapter(tensors: Mapping[str, torch.Tensor], tuning: Tuning, folder: Path) -> None:
    """Both files of peft's layout into a folder that is there."""
    lora_config(tuning, adapted_modules(tensors), is_trainable=False).save_pretrained(folder)
    told = folder / "adapter_config.json"
    config = json.loads(told.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set, whose order is of the moment
    told.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class _Base:
    """The tensors that a run left out, from the files it began with, checked to be the same.

    dtype: what the run held its frozen weights in. tied: names that share a tensor.
    """

    def __init__(self, origins: Sequence[OurTensors], delta: OurTensors, folder: Path, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places: dict[str, OurTensors] = {}
        for name in delta.absent:
            found = [origin for origin in origins if name in origin.shapes]
            if not found:
                places = ", ".join(str(origin.path) for origin in origins) or "nowhere"
                raise ValueError(
                    f"{folder} leaves {name} to its base, but {places} lacks it; name the base with --base"
                )
            self._places[name] = found[0]
        self.shapes = {name: origin.shapes[name] for name, origin in self._places.items()}
        self.tied = {
            name: origin.tied[name]
            for name, origin in self._places.items()
            if origin.tied.get(name) in self._places and self._places[origin.tied[name]] is origin
        }
        digest = base_sha256(lambda name: self._places[name][name], delta.absent, workers=1)
        check_base(delta.identity, digest, where=str(folder))

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor as it is given."""
        stored = self._places[name].dtypes[name]
        return self._dtype if stored.is_floating_point else stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name][name].to(self.dtype_of(name))


def opened_run(path: Path) -> tuple[Path, Run, OurTensors]:
    """(run directory, what it was asked to be, what it holds)."""
    folder = path.resolve().parent.parent if (path / "MANIFEST.json").is_file() else path
    if not (folder / _CONFIGS[1]).is_file():
        raise ValueError(f"{path} is no run directory and no checkpoint folder of one; name the run that was tuned")
    return folder, load_run(folder), OurTensors(path)


def origins_of(folder: Path, run: Run) -> list[Path]:
    """Where the base came from: the parent, else the pretrained files, of which the last counts first."""
    parent = RunDir(folder).status.parent if (folder / "status.json").is_file() else None
    places = [at_project(place) for place in ([parent] if parent else reversed(run.model.weights))]
    for place in places:
        if not place.exists():
            raise ValueError(f"{folder} began from {place}, which is not there any more; name its place with --base")
    return places


def _write_configs(folder: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    """What makes weights a run directory, a run's configuration with changes; the folder for the weights."""
    for name in _CONFIGS:
        config = OmegaConf.load(folder / name)
        assert isinstance(config, DictConfig)
        for key, value in changes.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        (target / name).write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    place = target / "checkpoints" / "step-000000"
    place.mkdir(parents=True)
    return place
