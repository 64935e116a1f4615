"""A stage's rules together with efficient tuning: what trains of the decoder, and which combinations make no sense."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from bestiary.config import Stage, Tuning
from bestiary.language.decoder import Decoder
from bestiary.language.tuning import linear_layers, norms_and_biases, tune
from bestiary.saved_tuning import DECODER, saves_all
from bestiary.training.names import matching, nearest
from bestiary.training.stages import trainable_names


@dataclass(frozen=True, slots=True)
class Plan:
    """What trains in a stage. adapted: linear layers of the decoder; whole: parameters, by the model's plain names."""

    adapted: tuple[str, ...]
    whole: frozenset[str]


def plan_tuning(model: nn.Module, stage: Stage, tuning: Tuning) -> Plan:
    """What trains, of a model that is not tuned yet; ValueError where the stage and the tuning do not go together.

    lora: of the layers that `targets` match, those whose weight the stage trains take an adapter. Everything outside
    the decoder trains as the stage says.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = trainable_names(names, stage)
    decoder = getattr(model, "decoder", None)
    if saves_all(tuning):
        return Plan((), frozenset(chosen))
    if not isinstance(decoder, Decoder):
        raise ValueError(f"tuning={tuning.method} needs a decoder, which {type(model).__name__} has not")
    _check_own_adapters(decoder, tuning)
    inside = {name.removeprefix(DECODER) for name in chosen if name.startswith(DECODER)}
    if tuning.method != "full" and not inside:
        raise ValueError(
            f"tuning.method={tuning.method} changes how the decoder trains, but stage {stage.name} trains nothing "
            f"of it (train={stage.train}); take tuning=full"
        )
    adapted: list[str] = []
    if tuning.method == "lora":
        adapted, own = _adapters(decoder, stage, tuning, inside)
    elif tuning.method == "bias_norm":
        own = inside & set(norms_and_biases(decoder))
        _some(own, stage, "tuning.method=bias_norm", "norm or bias")
    else:
        own = inside
        _check_quantised(decoder, stage, tuning, own)
    outside = {name for name in chosen if not name.startswith(DECODER)}
    return Plan(tuple(adapted), frozenset(outside | {DECODER + name for name in own}))


def apply_plan(model: nn.Module, tuning: Tuning, plan: Plan, *, seed: int, device: torch.device | str = "cpu") -> None:
    """Change the decoder of a model that has its weights; nothing under full tuning without quantisation."""
    if saves_all(tuning):
        return
    whole = {name.removeprefix(DECODER) for name in plan.whole if name.startswith(DECODER)}
    decoder = getattr(model, "decoder", None)
    assert isinstance(decoder, Decoder)
    tune(decoder, tuning, adapted=plan.adapted, whole=whole, seed=seed, device=device)


def _adapters(decoder: Decoder, stage: Stage, tuning: Tuning, inside: set[str]) -> tuple[list[str], set[str]]:
    """(layers that take an adapter, parameters that train themselves)."""
    layers, found = linear_layers(decoder), set()
    for target in tuning.targets:
        hits = {layer for layer in layers if _is_target(layer, target)}
        if not hits:
            short = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            near = nearest(target.rpartition(".")[2] or target, short) or short
            raise ValueError(
                f"tuning.targets: {target!r} matches no linear layer of the decoder; nearest: {', '.join(near[:8])}"
            )
        found |= hits
    adapted = [layer for layer in layers if layer in found and f"{layer}.weight" in inside]
    _some(adapted, stage, f"tuning.targets={tuning.targets}", "adapted layer")
    names = [name for name, _ in decoder.named_parameters()]
    own = matching(names, [glob.removeprefix(DECODER) for glob in tuning.beside], rule="tuning.beside")
    if twice := sorted(own & {f"{layer}.weight" for layer in adapted}):
        raise ValueError(
            f"tuning.beside: {twice[0]} has an adapter, so it would train twice; take it out of beside or of targets"
        )
    if tuning.beside:
        _some(own & inside, stage, f"tuning.beside={tuning.beside}", "named parameter")
    return adapted, own & inside


def _is_target(layer: str, target: str) -> bool:
    """A last name (`q_proj`), or a glob of the layer's name with or without `decoder.`."""
    return layer.rpartition(".")[2] == target or fnmatchcase(layer, target) or fnmatchcase(DECODER + layer, target)


def _some(found: Collection[str], stage: Stage, what: str, kind: str) -> None:
    if not found:
        raise ValueError(
            f"{what}: stage {stage.name} trains no {kind} of the decoder (train={stage.train}); widen stage.train "
            "(decoder.*), or take tuning=full"
        )


def _check_own_adapters(decoder: Decoder, tuning: Tuning) -> None:
    """Raise where a layer would be quantised that a model's own adapter reads: the layer in its place has none."""
    if tuning.quantize == "none":
        return
    hooked = [name for name in linear_layers(decoder) if decoder.get_submodule(name)._forward_hooks]
    if hooked:
        raise ValueError(
            f"tuning.quantize={tuning.quantize}: {DECODER}{hooked[0]} and {len(hooked) - 1} more layers have the "
            "model's own adapters beside them (model.build.decoder_lora), which quantised layers would lose; take "
            "tuning.quantize=none, or model.build.decoder_lora=null with tuning=lora"
        )


def _check_quantised(decoder: Decoder, stage: Stage, tuning: Tuning, own: set[str]) -> None:
    trained = sorted(f"{layer}.weight" for layer in linear_layers(decoder) if f"{layer}.weight" in own)
    if trained:
        raise ValueError(
            f"tuning.quantize={tuning.quantize} with tuning=full: stage {stage.name} trains {len(trained)} weights "
            f"that would be quantised (first {DECODER}{trained[0]}), and those cannot train; take tuning=lora"
        )
