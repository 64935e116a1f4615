"""Ovis' published names (llm.*, visual_tokenizer.*, vte.weight) and ours.

One table of rules for versions 1.0, 1.5 and 1.6; source: reference/ovis.md, section 1.1, and the manifests of the three
published models of 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule

OVIS_RULES = (
    Rule("llm.{rest}", ("decoder.{rest}",)),
    Rule("visual_tokenizer.backbone.vision_model.{rest}", ("vision.backbone.{rest}",)),
    Rule("visual_tokenizer.head.{i}.{p}", ("vision.head.{i}.{p}",)),
    Rule("vte.weight", ("vision.table.weight",)),
)
OVIS = Converter(OVIS_RULES)
_NO_ROTATION = 2
"""`Converter` asks for the width of a head, which only rotary rules read; there are none."""


def to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return OVIS.to_ours(state, head_dim=_NO_ROTATION)


def to_reference(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return OVIS.to_reference(state, head_dim=_NO_ROTATION)


def manifest(model: MultimodalLM) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return OVIS.manifest(model, head_dim=_NO_ROTATION)


def load_reference(model: MultimodalLM, state: Mapping[str, torch.Tensor], *, may_lack: Sequence[str] = ()) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`."""
    return OVIS.load_reference(model, state, head_dim=_NO_ROTATION, may_lack=may_lack)
