"""Ovis from plain sizes: the visual tokenizer with its table, in front of any causal language model of transformers.

Versions 1.0, 1.5 and 1.6 are arguments (see `formatters.py` for what they say of the text), not classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from bestiary.language.attention import Attention
from bestiary.language.decoder import Decoder
from bestiary.mllm import MultimodalLM, TokenLosses
from bestiary.schema import Batch
from bestiary.variants.ovis.visual_tokenizer import OvisVision

FAMILIES = ("qwen2", "llama", "gemma2")
"""Decoders of the published models: Qwen1.5 and Qwen2 are qwen2, Llama 3 is llama."""


class ErasedLabelsLM(MultimodalLM):
    """A model that has no losses outside training, as the published one (section 1.4, point 8): their mean is NaN."""

    def forward(self, batch: Batch) -> TokenLosses:
        """The losses in training mode, none in evaluation mode."""
        losses = super().forward(batch)
        return losses if self.training else TokenLosses(losses.values[:0], losses.segment[:0])


def build_ovis(
    *,
    vision: Mapping[str, Any],
    decoder: Mapping[str, Any],
    attention: Attention = "auto",
    erased_eval_labels: bool = False,
) -> MultimodalLM:
    """Ovis from plain sizes; reads no files.

    vision: arguments of `OvisVision` but out_dim. decoder: `family` and its sizes, see `decoder_config`.
    erased_eval_labels: a quirk of the published code, see `ErasedLabelsLM`.
    """
    config = decoder_config(**decoder)
    kind = ErasedLabelsLM if erased_eval_labels else MultimodalLM
    return kind(decoder=Decoder(config, attention=attention), vision=OvisVision(**vision, out_dim=config.hidden_size))


def decoder_config(*, family: str, **sizes: Any) -> PretrainedConfig:
    """The configuration of a published decoder, in the words of its own config.json (hidden_size and so on)."""
    if family not in FAMILIES:
        raise ValueError(f"decoder family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    config = AutoConfig.for_model(family, **sizes)
    moved = ("rope_theta", "rope_scaling")  # transformers reads them into rope_parameters
    if unknown := [name for name in sizes if name not in moved and not hasattr(type(config)(), name)]:
        raise ValueError(f"a {family} decoder has no {', '.join(unknown)}; see its config.json")
    return config


def redraw_layers(vision: OvisVision, first_layer: int, *, seed: int) -> list[str]:
    """Draw the backbone's layers from `first_layer` on anew, as stage 1 begins; returns their parameters' names.

    first_layer: from 0, or from -1 backwards. The distributions are those of transformers' own CLIP or SigLIP
    (section 2, "Re-init"), drawn from `seed`.
    """
    layers = vision.backbone.encoder.layers
    if not -len(layers) <= first_layer < len(layers):
        raise ValueError(f"first layer {first_layer} to draw anew, but the backbone has {len(layers)}; count from 0")
    first_layer %= len(layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers[first_layer:]:
            for parameter in layer.parameters():
                parameter._is_hf_initialized = False  # transformers would skip what was loaded or drawn before
            layer.apply(vision.backbone._init_weights)  # parts first: their owners have the last word on weights
    names = [f"backbone.encoder.layers.{i}.{n}" for i in range(first_layer, len(layers)) for n in _names(layers[i])]
    return names


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
