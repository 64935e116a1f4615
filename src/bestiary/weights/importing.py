"""Published shards to a folder of ours, parameter by parameter: memory holds one of them at a time."""

from __future__ import annotations

import fnmatch
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bestiary.text.qwen_tokenizer import FILE_NAME as TIKTOKEN
from bestiary.training.checkpoints import TrainState, header, seal
from bestiary.training.names import matching
from bestiary.variants.conversion import Fit
from bestiary.variants.layouts import Layout, Model, Published
from bestiary.variants.tensor_file import TensorFile, dtype_name
from bestiary.weights.checking import check_fit, check_tokenizer, compare, near
from bestiary.weights.folder import EXTRA, MODEL, NODE, PUBLISHED, STATE, new_folder
from bestiary.weights.layouts import LAYOUTS, layout_of

log = logging.getLogger(__name__)

LOG_EVERY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Asked:
    """What an import was asked beside its folders.

    config, tokenizer: files in place of those beside the weights. may_lack: globs of published names (or of ours) that
    may be missing. keep_unknown: put tensors that no model of ours has into extra.tensors instead of refusing them.
    leave_out: globs of published names that are not taken although they are there; such may then be missing, too.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    may_lack: tuple[str, ...] = ()
    keep_unknown: bool = False
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did. unequal: tensors whose shards disagreed although all should hold them; shard 0 was taken."""

    fit: Fit
    model: Model
    published: Published
    num_parameters: int
    unequal: tuple[str, ...]
    has_tokenizer: bool


CONFIGS = ("config.json", "params.json")
"""Of which one asked for takes the place."""


class Sources:
    """Several published folders as one: a later one overrides an earlier one, a delta is added to what was before."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.layout: Layout = layout_of(paths[0]) or LAYOUTS[0]  # whose line of error says what is missing there
        self.folders = [self.layout.open(path) for path in paths]
        first = self.folders[0]
        if first.is_delta:
            raise ValueError(f"{first.path} holds differences to a base; name the base's folder before it")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for folder in self.folders:
            for name in folder.shapes:
                known = name in self.shapes
                if folder.is_delta and not known:
                    hint = near(name, self.shapes)
                    raise ValueError(f"{folder.path}: {name} has no base to be added to; nearest there: {hint}")
                if known and self.shapes[name] != folder.shapes[name]:
                    raise ValueError(
                        f"{folder.path}: {name} is {folder.shapes[name]}, before it was {self.shapes[name]}; the "
                        "folders are of models of two sizes"
                    )
                self.shapes[name] = folder.shapes[name]
                if not folder.is_delta:
                    self.dtypes[name] = folder.dtypes[name]

    def whole(self, name: str) -> torch.Tensor:
        """One tensor of all folders; a sum with a delta has the base's dtype."""
        holders = [folder for folder in self.folders if name in folder.shapes]
        last = max(n for n, folder in enumerate(holders) if not folder.is_delta)
        value = holders[last].whole(name)
        for folder in holders[last + 1 :]:
            value = (value + folder.whole(name)).to(value.dtype)
        return value

    def leave_out(self, globs: Sequence[str]) -> None:
        """Forget the tensors that these globs match; one that matches none raises."""
        for name in matching(list(self.shapes), globs, rule="--leave-out"):
            del self.shapes[name], self.dtypes[name]

    @property
    def unequal(self) -> tuple[str, ...]:
        """See `ShardFolder.unequal`."""
        return tuple(dict.fromkeys(name for folder in self.folders for name in folder.unequal))

    def side_files(self, asked: Asked) -> dict[str, Path]:
        """Name -> the file to keep under it; a later folder's, and before all the one that was asked for."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            found |= self.layout.side_files(folder.path)
        if asked.config is not None:
            config = self.layout.config_name(self.folders[0].layout)
            found = {name: path for name, path in found.items() if name not in CONFIGS}
            found[config] = asked.config
        if asked.tokenizer is None:
            return found
        kept = TIKTOKEN if asked.tokenizer.suffix == Path(TIKTOKEN).suffix else "tokenizer.model"
        return found | {kept: asked.tokenizer}


def import_weights(paths: Sequence[Path], out: Path, asked: Asked) -> Imported:
    """Write `out`, a folder of ours, from published folders; ValueError, and no folder, when they do not fit."""
    sources = Sources(paths)
    sources.leave_out(asked.leave_out)
    side_files = sources.side_files(asked)
    config = sources.layout.config(side_files)
    model = sources.layout.model_of(sources.shapes, side_files, asked.may_lack)
    head_dim = model.head_dim(sources.shapes, config)
    tokenizer = sources.layout.tokenizer(paths[-1], side_files)
    rows = sources.shapes[model.embedding][0]
    identity = check_tokenizer(tokenizer, rows, allows_spare=model.allows_spare_ids)
    found = compare(model, sources.shapes, config)
    extra = _check(found, model, asked, paths)
    published = Published(
        layout=sources.folders[0].layout,
        num_shards=len(sources.folders[0].file_bytes),
        llama_type=model.key,
        head_dim=head_dim,
        tensors={name: str(sources.dtypes[name]).removeprefix("torch.") for name in sources.shapes},
        wrapped=sources.folders[0].wrapped,
        extra=extra,
        side_files=sorted(side_files),
        record=sources.folders[0].record,
    )
    node = sources.layout.node(sources.shapes, config)
    with new_folder(out) as folder:
        state = _state(found, model, published, {**identity, **model.identity})
        state = replace(state, tied=_tied(model, sources.shapes, config))
        _write_tensors(folder, sources, model, published, state)
        for name, path in side_files.items():
            shutil.copyfile(path, folder / name)
        (folder / PUBLISHED).write_text(published.to_json(), encoding="utf-8")
        if node is not None:
            (folder / NODE).write_text(OmegaConf.to_yaml(OmegaConf.create(node)), encoding="utf-8")
        seal(folder, 0)
    size = sum(torch.Size(shape).numel() for shape in sources.shapes.values())
    return Imported(found, model, published, size, sources.unequal, bool(identity))


def _check(found: Fit, model: Model, asked: Asked, paths: Sequence[Path]) -> list[str]:
    """Names to keep as extra; raises when tensors are missing, unknown or of another shape."""
    unknown = [name for name in found.unexpected if not model.derived.fullmatch(name)]
    check_fit(
        found,
        where=" + ".join(map(str, paths)),
        may_lack=(*asked.may_lack, *(glob for glob in asked.leave_out if fnmatch.filter(found.missing, glob))),
        keep_unknown=asked.keep_unknown,
        unknown=unknown,
        ours=model.converter.names_of,
    )
    return list(found.unexpected)


def _state(found: Fit, model: Model, published: Published, identity: dict[str, str]) -> TrainState:
    """The folder's words as a checkpoint; what the weights lack is declared absent under our names."""
    absent = [ours for name in found.missing for ours in model.converter.names_of(name)]
    return replace(TrainState(step=0, stage="", seed=0), identity=identity, absent=sorted(absent))


def _tied(model: Model, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> dict[str, str]:
    """Our names that are another tensor of ours, and which."""
    names = model.converter.names_of
    pairs = model.tied(shapes, config).items()
    return {ours: stored for theirs, at in pairs for ours, stored in zip(names(theirs), names(at), strict=True)}


def _write_tensors(folder: Path, sources: Sources, model: Model, published: Published, state: TrainState) -> None:
    """model.safetensors, extra.tensors and state.json."""
    extra = set(published.extra)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in sources.shapes.items():
        dtype_name(sources.dtypes[name], name)
        if name not in extra:
            empty = {name: torch.empty(shape, dtype=sources.dtypes[name], device="meta")}
            ours = model.converter.to_ours(empty, head_dim=published.head_dim)
            plan |= {our_name: (value.dtype, tuple(value.shape)) for our_name, value in ours.items()}
    with TensorFile(folder / MODEL, plan, metadata=header(state)) as file:
        done = 0
        for number, name in enumerate(sources.shapes, start=1):
            if name not in extra:
                done += _convert(file, name, sources, model, published.head_dim)
            if done >= LOG_EVERY_BYTES:
                log.info("%d of %d tensors", number, len(sources.shapes))
                done = 0
    if extra:
        held = {name: (sources.dtypes[name], sources.shapes[name]) for name in published.extra}
        with TensorFile(folder / EXTRA, held, metadata={"format": "pt"}) as file:
            for name in published.extra:
                file.add(name, sources.whole(name))
    if torn := sorted(extra & set(sources.unequal)):
        raise ValueError(f"{torn[0]} is not the same in all shards, and how an unknown tensor is cut nobody knows")
    (folder / STATE).write_text(state.to_json(), encoding="utf-8")


def _convert(file: TensorFile, name: str, sources: Sources, model: Model, head_dim: int) -> int:
    """Write one published tensor as ours, and forget it; its bytes."""
    whole = sources.whole(name)
    for our_name, value in model.converter.to_ours({name: whole}, head_dim=head_dim).items():
        file.add(our_name, value)
    return whole.nbytes
