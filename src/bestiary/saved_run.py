"""From a run directory, or a folder of weights and a model's name, to a model and its processor.

This is what scoring and talking begin with. A model is built without memory for its parameters, which are then the
tensors of the file, so that nothing is held twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bestiary.compose import build, load_run
from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.named_model import at_project, check_config, named_run, of_variant, published_reader
from bestiary.saved_tuning import BASE, plain_weights, rebuild, saves_all
from bestiary.saved_weights import SavedWeights, check_identity, check_names, open_weights
from bestiary.schema import Processor
from bestiary.text.qwen_tokenizer import FILE_NAME as TIKTOKEN

log = logging.getLogger(__name__)

NODE = "model.yaml"
"""What an import writes beside weights whose published config says everything about the model."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A model with the processor made for it.

    identity: what its weights depend on beside shapes. base: names that a tuned run's checkpoints leave out.
    """

    model: MultimodalLM
    processor: Processor
    identity: dict[str, str]
    base: set[str] = field(default_factory=set)


def build_pieces(run: Run, *, on_meta: bool = False) -> Pieces:
    """The model with random weights drawn from `run.seed` (or shapes alone) and its processor."""
    torch.manual_seed(run.seed)
    with torch.device("meta" if on_meta else "cpu"):
        # Shapes need no kernels: a run for other machines can be looked at on this one.
        model: MultimodalLM = build(run.model.build, attention="sdpa" if on_meta else run.attention)
    return with_processor(run, model)


def with_processor(run: Run, model: MultimodalLM, *, max_tokens: int | None = None) -> Pieces:
    """A model with its processor, which is told by the model how many positions an image and the prompts take.

    max_tokens: positions of its longest sequence; None takes those of the run.
    """
    path = at_project(run.model.processor["tokenizer"])
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist; put it there or set model.processor.tokenizer")
    room = run.data.max_tokens if max_tokens is None else max_tokens
    node = {**run.model.processor, "tokenizer": str(path)}
    processor = build(node, **model.layout, max_tokens=room, too_long=run.data.too_long)
    vocab, pieces = model.decoder.vocab_size, processor.tokenizer.vocab_size
    may_spare = getattr(processor, "allows_spare_ids", False)  # rows of a published decoder that no text has
    if pieces > vocab or (pieces < vocab and not may_spare):
        raise ValueError(
            f"the decoder has {vocab} token ids but the tokenizer {run.model.processor['tokenizer']} has {pieces}; "
            "set model.build.decoder.vocab_size, or use the tokenizer of the weights"
        )
    return Pieces(model, processor, {"tokenizer": processor.tokenizer.sha256, **model.identity})


def load_saved_run(
    folder: Path,
    *,
    run: Run | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    whole_context: bool = False,
) -> Pieces:
    """Model and processor of a run directory, in eval mode, with the weights of its newest complete checkpoint.

    run: what the directory's config.resolved.yaml says, where the caller has it. dtype: of all weights; None keeps the
    checkpoint's. whole_context: a sequence may take all the decoder's positions, not only a training row's.
    What the checkpoint leaves out is taken from the run's parent and from `model.weights`.
    """
    where = device_named(device)
    run = load_run(folder) if run is None else run
    weights = open_weights(folder, what="run")
    pieces = _empty(run, whole_context=whole_context)
    put(pieces, plain_weights(weights), origins=_origins(run, folder), where=f"run {folder}")
    if BASE in weights.identity or not saves_all(run.tuning):
        rebuild(pieces.model, run, weights, where=f"run {folder}", device=where)
    log.info("%s: stage %s, step %d", weights.path, weights.stage, weights.step)
    pieces.model.to(device=where, dtype=dtype).eval()
    return pieces


def load_named(
    path: Path,
    *,
    model: str | Path | None = None,
    scale: str = "paper",
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Model and processor of weights that come without a run, in eval mode.

    path: a folder that `bestiary weights import` made, a published folder, or a safetensors file of ours. model, scale,
    overrides: see `named_run`; None takes the model.yaml that an import wrote. The sizes must be those of the weights;
    a tokenizer beside them is theirs.
    """
    where = device_named(device)
    if not path.exists():
        raise ValueError(f"weights {path} do not exist; give an imported or published folder, or a safetensors file")
    if model is None and not (path / NODE).is_file():
        raise ValueError(f"{path} has no {NODE} that says of which model it is; name it with model=")
    model = path / NODE if model is None else model
    run = named_run(model, scale=scale, overrides=overrides)
    run.model.processor["tokenizer"] = _tokenizer_beside(path, str(run.model.processor["tokenizer"]))
    pieces = _empty(run, whole_context=True)
    check_config(path, pieces.model, called=f"model {model} at scale {scale}")
    if (check := of_variant(run, "check_config")) is not None:
        check(pieces.model, path)
    if path.is_file() or (path / "MANIFEST.json").is_file():
        put(pieces, open_weights(path, what="weights"), where=f"weights {path}")
    else:
        published_reader(run)(pieces.model, path)
    pieces.model.to(device=where, dtype=dtype).eval()
    return pieces


def _tokenizer_beside(path: Path, told: str) -> str:
    """The tokenizer beside weights, of the kind the model has (a .model or .tiktoken file, a folder) where several are.

    A .tiktoken is one that no other kind can stand for.
    """
    if told.endswith(".tiktoken"):
        return str(path / TIKTOKEN) if (path / TIKTOKEN).is_file() else told
    beside = {"file": path / "tokenizer.model", "folder": path / "tokenizer.json"}
    kinds = ("file", "folder") if told.endswith(".model") else ("folder", "file")
    found = next((kind for kind in kinds if beside[kind].is_file()), None)
    return told if found is None else str(beside["file"] if found == "file" else path)


def put(pieces: Pieces, weights: SavedWeights, *, where: str, origins: Iterable[SavedWeights] = ()) -> None:
    """Put weights into pieces whose parameters are on the meta device, strictly; tensors are taken, not copied.

    origins: where names that the weights declare absent are looked for, in order.
    """
    check_identity(weights.identity, pieces.identity, where=where)
    tensors = dict(weights.tensors)
    lacking = {name for name in pieces.model.state_dict() if name not in tensors} & weights.absent
    for origin in origins if lacking else ():
        tensors |= {name: origin.tensors[name] for name in lacking & origin.tensors.keys()}
        lacking -= origin.tensors.keys()
    check_names(pieces.model, tensors, where=where)
    pieces.model.load_state_dict(tensors, strict=True, assign=True)
    pieces.model.decoder.choose_precision()


def device_named(device: torch.device | str) -> torch.device:
    """The device of that name; ValueError where this machine has none."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; use cpu, cuda or cuda:1") from error
    if found.type == "cpu":
        return found
    backend = getattr(torch, found.type, None)
    count = backend.device_count() if backend is not None and backend.is_available() else 0
    if (found.index or 0) >= count:
        raise ValueError(f"device {device} is not there: torch sees {count} of {found.type}; use cpu")
    return found


@contextmanager
def no_parameter_memory() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers where they belong."""

    def shape_alone(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(shape_alone)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _empty(run: Run, *, whole_context: bool) -> Pieces:
    """The model without memory for its parameters, and its processor."""
    # Kernels that were asked for by name were those of the training machine.
    attention = "sdpa" if run.attention == "sdpa" else "auto"
    with no_parameter_memory():
        model: MultimodalLM = build(run.model.build, attention=attention)
    return with_processor(run, model, max_tokens=model.decoder.max_positions if whole_context else None)


def _origins(run: Run, folder: Path) -> Iterator[SavedWeights]:
    """Weights the run began with, nearest first, opened when asked for."""
    status = folder / "status.json"
    parent: Any = json.loads(status.read_text(encoding="utf-8")).get("parent") if status.is_file() else None
    for path in (parent, *reversed(run.model.weights)):
        if path is not None:
            yield open_weights(at_project(path))
