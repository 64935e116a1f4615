"""Public weights of one part (an encoder, the decoder) to a folder of ours that `model.weights` lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bestiary.training.checkpoints import TrainState, header, seal
from bestiary.variants.conversion import Fit
from bestiary.variants.hf_folder import HfFolder, looks_like_hf
from bestiary.variants.layouts import tokenizer_of
from bestiary.variants.parts import Part
from bestiary.variants.tensor_file import TensorFile, dtype_name
from bestiary.weights.checking import check_fit, check_tokenizer
from bestiary.weights.folder import MODEL, PART, STATE, new_folder
from bestiary.weights.layouts import PARTS, layout_of


@dataclass(frozen=True, slots=True)
class ImportedPart:
    """What an import of a part did. settings: overrides that say what config.json says and no shape shows."""

    name: str
    target: str
    fit: Fit
    num_parameters: int
    settings: tuple[str, ...]


def is_part(path: Path) -> bool:
    """Whether a path holds files in Hugging Face's layout, or is one weights file, that no whole model recognises."""
    if layout_of(path) is not None:
        return False
    return looks_like_hf(path)


def part_of(folder: HfFolder, model: str | None = None) -> Part:
    """The part whose layout the folder has, of that model if one is asked for; ValueError when there is none."""
    owners = sorted({part.model for part in PARTS})
    if model is not None and model not in owners:
        raise ValueError(f"--for {model!r} is none of {', '.join(owners)}")
    for part in PARTS:
        if model in (None, part.model) and part.recognises(folder.shapes, folder.config):
            return part
    known = ", ".join(dict.fromkeys(part.name for part in PARTS))
    told = folder.config.get("model_type")
    says = f"config.json says model_type {told!r}" if told else "there is no model_type"
    raise ValueError(f"{folder.path}: {says} and the tensors begin with {next(iter(folder.shapes))}; known: {known}")


def import_part(
    path: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    model: str | None = None,
    may_lack: Sequence[str] = (),
    keep_unknown: bool = False,
) -> ImportedPart:
    """Write `out`, a folder of ours with the part's tensors, from a Hugging Face folder or a weights file.

    tokenizer: in place of that beside the weights. model: whose part is meant, where several have it (CLIP is one of
    SPHINX's and Ovis'); None takes the first. may_lack: globs of published names that may be missing.
    keep_unknown: pass over tensors that the part has not, instead of refusing them.
    """
    folder = HfFolder(path)
    part = part_of(folder, model)
    found = part.fit(folder.shapes, folder.config)
    check_fit(found, where=str(path), may_lack=may_lack, keep_unknown=keep_unknown)
    settings = tuple(part.settings(folder.config)) if part.settings else ()
    side_files = folder.side_files
    identity: dict[str, str] = {}
    if part.embedding:
        rows, where = folder.shapes[part.embedding][0], tokenizer or tokenizer_of(path, side_files)
        identity = check_tokenizer(where, rows, allows_spare=part.allows_spare_ids)
    if tokenizer is not None and tokenizer.is_file():
        side_files["tokenizer.model"] = tokenizer
    state = replace(TrainState(step=0, stage="", seed=0), identity=identity)
    with new_folder(out) as made:
        count = _write(made, folder, part, found, state)
        for name, file in side_files.items():
            if name not in (MODEL, STATE, PART):
                shutil.copyfile(file, made / name)
        told = {"part": part.name, "source": path.name, "target": part.target, "dropped": found.dropped}
        told |= {"unexpected": found.unexpected, "missing": found.missing, "settings": settings}
        (made / PART).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (made / STATE).write_text(state.to_json(), encoding="utf-8")
        seal(made, 0)
    return ImportedPart(part.name, part.target, found, count, settings)


def _write(made: Path, folder: HfFolder, part: Part, found: Fit, state: TrainState) -> int:
    """model.safetensors, one published tensor at a time; the number of parameters."""
    names = [*found.matched, *found.converted]
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        dtype_name(folder.dtypes[name], name)
        empty = torch.empty(folder.shapes[name], dtype=folder.dtypes[name], device="meta")
        plan |= {ours: (value.dtype, tuple(value.shape)) for ours, value in part.to_ours(name, empty).items()}
    with TensorFile(made / MODEL, plan, metadata=header(state)) as file:
        for name in sorted(names, key=list(folder.shapes).index):
            for ours, value in part.to_ours(name, folder.whole(name)).items():
                file.add(ours, value)
    return sum(torch.Size(shape).numel() for _, shape in plan.values())
