"""SPHINX-V's published names (2364 tensors with the prefix `llma.`) and ours: SPHINX's and the prompt parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule, load_weights
from bestiary.variants.sphinx.consolidated import read_published
from bestiary.variants.sphinx.weights import SPHINX_RULES, head_dim

__all__ = ["SPHINX_V", "load_published", "load_reference", "load_weights", "manifest", "to_ours", "to_reference"]

SPHINX_V = Converter(
    (
        *SPHINX_RULES,
        Rule("llma.start_vp", ("regions.start",)),
        Rule("llma.end_vp", ("regions.end",)),
        Rule("llma.vp_encoder.pe_layer.positional_encoding_gaussian_matrix", ("regions.encoder.gaussian",)),
        Rule("llma.vp_encoder.{rest}", ("regions.encoder.{rest}",)),
        Rule("llma.vp_proj.{i}.{p}", ("regions.proj.{i}.{p}",)),
    )
)


def to_ours(state: Mapping[str, torch.Tensor], model: MultimodalLM) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return SPHINX_V.to_ours(state, head_dim=head_dim(model))


def to_reference(state: Mapping[str, torch.Tensor], model: MultimodalLM) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return SPHINX_V.to_reference(state, head_dim=head_dim(model))


def manifest(model: MultimodalLM) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return SPHINX_V.manifest(model, head_dim=head_dim(model))


def load_reference(model: MultimodalLM, state: Mapping[str, torch.Tensor], *, may_lack: Sequence[str] = ()) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`."""
    return SPHINX_V.load_reference(model, state, head_dim=head_dim(model), may_lack=may_lack)


def load_published(model: MultimodalLM, folder: str | Path, *, may_lack: Sequence[str] = ()) -> Report:
    """Put a published checkpoint folder (consolidated.RR-of-NN.model.pth) into the model, strictly.

    SPHINX's own folder starts SPHINX-V with `may_lack=["regions.*"]`.
    """
    return SPHINX_V.load_reference(
        model,
        read_published(folder),
        head_dim=head_dim(model),
        may_lack=may_lack,
        origin=f"published weights of {folder}",
    )
