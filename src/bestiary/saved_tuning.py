"""Runs whose checkpoints hold what trained and not the base: what they say about it, and how they are whole again.

Under lora and bias_norm, and wherever weights are quantised, the base stays in the file it came from: the parent, or
the pretrained files. `identity["base"]` is the hash of its tensors, so that nothing goes on from another unnoticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from bestiary.config import Cluster, Run, Tuning
from bestiary.language.tuning import adapted_modules, check_quantization, is_adapter, plain_name, tune
from bestiary.mllm import MultimodalLM
from bestiary.saved_weights import SavedWeights, check_names

DECODER = "decoder."
BASE = "base"
"""Key of `identity` that only weights without their base have."""


def saves_all(tuning: Tuning) -> bool:
    """True where checkpoints hold the whole model."""
    return tuning.method == "full" and tuning.quantize == "none"


def says(tuning: Tuning) -> str:
    """What the weights of a tuned run depend on beside their shapes and their base."""
    if tuning.method != "lora":
        return f"{tuning.method}, quantize {tuning.quantize}"
    return f"lora, rank {tuning.rank}, alpha {tuning.alpha:g}, quantize {tuning.quantize}"


def frozen_dtype(tuning: Tuning, cluster: Cluster) -> torch.dtype | None:
    """The dtype that frozen parameters are cast to; None leaves them in float32.

    Unasked it is bfloat16 under bf16-mixed on GPUs, where autocast would round them at each use anyway.
    """
    asked = tuning.frozen_dtype
    if asked is None and cluster.accelerator == "gpu" and cluster.precision == "bf16-mixed":
        asked = "bfloat16"
    return torch.bfloat16 if asked == "bfloat16" else None


def base_sha256(tensor: Callable[[str], Tensor], names: Collection[str], *, workers: int | None = None) -> str:
    """One hash of these tensors' names and values; the same values in bfloat16 and in float32 have the same.

    tensor: gives one by its name, called from several threads unless workers is 1.
    """
    ordered = sorted(names)
    workers = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:  # hashing lets go of the interpreter
        hashes = list(pool.map(lambda name: _sha256(tensor(name)), ordered))
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(ordered, hashes, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_base(theirs: Mapping[str, str], ours: str, *, where: str) -> None:
    """Raise unless this is the base that the weights at `where` were trained on."""
    if theirs.get(BASE) != ours:
        raise ValueError(
            f"{where} holds only what it trained, on a base of sha256 {str(theirs.get(BASE))[:12]}, but what lies "
            f"where its base came from has {ours[:12]}; put the parent or the pretrained files back as they were"
        )


def check_whole(weights: SavedWeights) -> None:
    """Raise where weights lack their base: they are no start for another model."""
    if BASE in weights.identity:
        raise ValueError(
            f"parent {weights.path} holds only what its run trained, not the base; "
            "make it whole with `bestiary weights merge RUN OUT` and give OUT"
        )


def rebuild(
    model: MultimodalLM,
    run: Run,
    weights: SavedWeights,
    *,
    where: str,
    device: torch.device | str = "cpu",
) -> None:
    """Tune a model that has its base, as its run did, and put in what that run trained; the base must be that run's.

    Afterwards it computes as it did when the run scored itself.
    """
    check_quantization(run.tuning.quantize)
    check_base(weights.identity, base_sha256(model.state_dict().__getitem__, weights.absent), where=where)
    trained = set(plain_weights(weights).tensors)
    dtype = frozen_dtype(run.tuning, run.cluster) or torch.float32
    if saves_all(run.tuning):  # what trained was taken out of whole weights afterwards, each in its own dtype
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(parameter.dtype if name in trained else dtype)
        model.decoder.choose_precision()
        return
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in trained else dtype)
    whole = {name.removeprefix(DECODER) for name in trained if name.startswith(DECODER)}
    modules = [name.removeprefix(DECODER) for name in adapted_modules(weights.tensors)]
    tune(model.decoder, run.tuning, adapted=modules, whole=whole, device=device)
    adapters = {name: tensor for name, tensor in weights.tensors.items() if is_adapter(name)}
    own = dict(model.named_parameters())
    check_names(model, adapters, where=where, may_lack=frozenset(model.state_dict()))
    for name, tensor in adapters.items():  # in the dtype they trained in: peft makes them in that of the base
        own[name].data = tensor.to(own[name].device, copy=True)
    model.decoder.choose_precision()


def plain_weights(weights: SavedWeights) -> SavedWeights:
    """The weights without adapters, under the names of a model that is not tuned."""
    plain = {plain_name(name): tensor for name, tensor in weights.tensors.items() if not is_adapter(name)}
    return replace(weights, tensors=plain)


def _sha256(tensor: Tensor) -> str:
    values = tensor.detach().cpu()
    values = values.float() if values.is_floating_point() else values
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
