"""Published shards to a folder of ours, parameter by parameter: memory holds one of them at a time."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bestiary.text.tokenizer import load_tokenizer
from bestiary.training.checkpoints import TrainState, header
from bestiary.variants.sphinx.consolidated import ShardFolder
from bestiary.weights.families import DERIVED, EMBEDDING, Family, Fit, compare, family_of, head_dim, nearest
from bestiary.weights.folder import EXTRA, MODEL, PUBLISHED, STATE, Published, TensorFile, dtype_name, new_folder, seal

log = logging.getLogger(__name__)

SIDE_FILES = ("config.json", "params.json", "meta.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
"""What lies beside published weights and is kept byte for byte."""
LOG_EVERY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Asked:
    """What an import was asked beside its folders.

    config, tokenizer: files in place of those beside the weights. may_lack: globs of published names that may be
    missing. keep_unknown: put tensors that no model of ours has into extra.tensors instead of refusing them.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    may_lack: tuple[str, ...] = ()
    keep_unknown: bool = False


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did. unequal: tensors whose shards disagreed although all should hold them; shard 0 was taken."""

    fit: Fit
    family: Family
    published: Published
    num_parameters: int
    unequal: tuple[str, ...]
    has_tokenizer: bool


class Sources:
    """Several published folders as one: a later one overrides an earlier one, a delta is added to what was before."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.folders = [ShardFolder(path) for path in paths]
        first = self.folders[0]
        if first.layout == "delta":
            raise ValueError(f"{first.path} holds differences to a base; name the base's folder before it")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for folder in self.folders:
            for name in folder.names:
                is_delta, known = folder.layout == "delta", name in self.shapes
                if is_delta and not known:
                    near = nearest(name, list(self.shapes))
                    raise ValueError(f"{folder.path}: {name} has no base to be added to; nearest there: {near}")
                if known and self.shapes[name] != folder.shapes[name]:
                    raise ValueError(
                        f"{folder.path}: {name} is {folder.shapes[name]}, before it was {self.shapes[name]}; the "
                        "folders are of models of two sizes"
                    )
                self.shapes[name] = folder.shapes[name]
                if not is_delta:
                    self.dtypes[name] = folder.dtypes[name]

    def whole(self, name: str) -> torch.Tensor:
        """One tensor of all folders; a sum with a delta has the base's dtype."""
        holders = [folder for folder in self.folders if name in folder.shapes]
        last = max(n for n, folder in enumerate(holders) if folder.layout != "delta")
        value = holders[last].whole(name)
        for folder in holders[last + 1 :]:
            value = (value + folder.whole(name)).to(value.dtype)
        return value

    @property
    def unequal(self) -> tuple[str, ...]:
        """See `ShardFolder.unequal`."""
        return tuple(dict.fromkeys(name for folder in self.folders for name in folder.unequal))

    def side_files(self, asked: Asked) -> dict[str, Path]:
        """Name -> the file to keep under it; a later folder's, and before all the one that was asked for."""
        found = {name: f.path / name for f in self.folders for name in SIDE_FILES if (f.path / name).is_file()}
        if asked.config is not None:
            found.pop("params.json", None)
            found["params.json" if self.folders[0].layout == "meta" else "config.json"] = asked.config
        return found | ({"tokenizer.model": asked.tokenizer} if asked.tokenizer is not None else {})


def import_weights(paths: Sequence[Path], out: Path, asked: Asked) -> Imported:
    """Write `out`, a folder of ours, from published folders; ValueError, and no folder, when they do not fit."""
    sources = Sources(paths)
    side_files = sources.side_files(asked)
    config = model_config(side_files)
    if not config.get("n_heads"):
        raise ValueError(
            f"{paths[0]} has no config.json or params.json that says n_heads, which the order of the rotary rows "
            "needs; give --config FILE"
        )
    family = family_of(sources.shapes, read_object(side_files.get("meta.json")).get("llama_type"))
    identity = check_tokenizer(side_files.get("tokenizer.model"), sources.shapes)
    found = compare(family, sources.shapes, config)
    extra = _check(found, asked, paths)
    published = Published(
        layout=sources.folders[0].layout,
        num_shards=len(sources.folders[0].files),
        llama_type=family.llama_type,
        head_dim=head_dim(sources.shapes[EMBEDDING][1], int(config["n_heads"])),
        tensors={name: str(sources.dtypes[name]).removeprefix("torch.") for name in sources.shapes},
        wrapped=sources.folders[0].wrapped,
        extra=extra,
        side_files=sorted(side_files),
    )
    with new_folder(out) as folder:
        _write_tensors(folder, sources, family, published, _state(found, family, published, identity))
        for name, path in side_files.items():
            shutil.copyfile(path, folder / name)
        (folder / PUBLISHED).write_text(published.to_json(), encoding="utf-8")
        seal(folder)
    size = sum(torch.Size(shape).numel() for shape in sources.shapes.values())
    return Imported(found, family, published, size, sources.unequal, bool(identity))


def model_config(side_files: dict[str, Path]) -> dict[str, Any]:
    """The sizes beside the weights: config.json's, or Meta's params.json's; empty without either."""
    return read_object(side_files.get("config.json") or side_files.get("params.json"))


def read_object(path: Path | None) -> dict[str, Any]:
    """The JSON object of a file, empty without a file; anything else in it is a line of error."""
    if path is None:
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds a {type(told).__name__}, not an object of settings; fetch it again")
    return told


def check_tokenizer(path: Path | None, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The identity that weights with this tokenizer have; raises when its pieces are not the embedding's rows."""
    if path is None:
        return {}
    tokenizer = load_tokenizer(path)
    rows = shapes.get(EMBEDDING, (0,))[0]
    if tokenizer.vocab_size != rows:
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces but the embedding {rows} rows; it is not the "
            "tokenizer of these weights: give theirs with --tokenizer FILE"
        )
    return {"tokenizer": tokenizer.sha256}


def _check(found: Fit, asked: Asked, paths: Sequence[Path]) -> list[str]:
    """Names to keep as extra; raises when tensors are missing, unknown or of another shape."""
    where = " + ".join(map(str, paths))
    for glob in asked.may_lack:
        if not fnmatch.filter(found.missing, glob):
            raise ValueError(f"--may-lack {glob!r} matches none of the {len(found.missing)} missing names")
    lacking = [name for name in found.missing if not any(fnmatch.fnmatchcase(name, g) for g in asked.may_lack)]
    unknown = [name for name in found.unexpected if not DERIVED.fullmatch(name)]
    problems = []
    if found.wrong:
        problems.append(f"{len(found.wrong)} of another shape, first {found.wrong[0]}")
    if lacking:
        near = nearest(lacking[0], found.unexpected)
        problems.append(f"{len(lacking)} missing, first {lacking[0]} (nearest: {near}; --may-lack GLOB allows it)")
    if unknown and not asked.keep_unknown:
        near = nearest(unknown[0], found.missing or found.matched)
        problems.append(f"{len(unknown)} unexpected, first {unknown[0]} (nearest: {near}; --keep-unknown keeps them)")
    if problems:
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems)}")
    return list(found.unexpected)


def _state(found: Fit, family: Family, published: Published, identity: dict[str, str]) -> TrainState:
    """The folder's words as a checkpoint; what the weights lack is declared absent under our names."""
    # Any shape will do that stacks of two and three and whole heads divide: only the names are wanted.
    empty = {name: torch.empty((6 * published.head_dim, 1), device="meta") for name in found.missing}
    absent = family.converter.to_ours(empty, head_dim=published.head_dim)
    return replace(TrainState(step=0, stage="", seed=0), identity=identity, absent=sorted(absent))


def _write_tensors(folder: Path, sources: Sources, family: Family, published: Published, state: TrainState) -> None:
    """model.safetensors, extra.tensors and state.json."""
    extra = set(published.extra)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in sources.shapes.items():
        dtype_name(sources.dtypes[name], name)
        if name not in extra:
            empty = {name: torch.empty(shape, dtype=sources.dtypes[name], device="meta")}
            ours = family.converter.to_ours(empty, head_dim=published.head_dim)
            plan |= {our_name: (value.dtype, tuple(value.shape)) for our_name, value in ours.items()}
    with TensorFile(folder / MODEL, plan, metadata=header(state)) as file:
        done = 0
        for number, name in enumerate(sources.shapes, start=1):
            if name not in extra:
                done += _convert(file, name, sources, family, published.head_dim)
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


def _convert(file: TensorFile, name: str, sources: Sources, family: Family, head_dim: int) -> int:
    """Write one published tensor as ours, and forget it; its bytes."""
    whole = sources.whole(name)
    for our_name, value in family.converter.to_ours({name: whole}, head_dim=head_dim).items():
        file.add(our_name, value)
    return whole.nbytes
