"""Qwen-7B as a decoder: transformers' Qwen2 with Qwen's two stretchings of long sequences, and the 3090 adapters.

Beyond the length it was trained at, Qwen slows the rotation (dynamic NTK) and sharpens attention (log-n), in evaluation
only. Both are functions of a sequence's own length here, so that an answer never depends on its neighbours; the
published code takes the padded length of the batch instead (`padding`). Nothing is kept between calls: the slowing of
an answer is that of its prompt, which the cache remembers. Sources: reference/monkey.md, sections 2 and 3.4.

Shape letters: B rows, K positions of all sequences, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from bestiary.language.attention import Attention, PackedLayout
from bestiary.language.decoder import Decoder
from bestiary.language.generation import RaggedCache
from bestiary.variants.monkey.adapter import DECODER_RANK, DROPOUT, Adapter, Start

Padding = Literal["none", "left", "right"]
SEQ_LENGTH = 2048
"""Length Qwen was trained at (section 2)."""


def qwen_config(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
) -> Qwen2Config:
    """Qwen-7B's sizes as a Qwen2 configuration.

    intermediate_size: of w1 and of w2, half of what Qwen's own config.json calls so.
    """
    return Qwen2Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=rms_norm_eps,
        rope_parameters={"rope_theta": float(rope_theta), "rope_type": "default"},
        tie_word_embeddings=False,
    )


def ntk_alpha(length: int, seq_length: int) -> float:
    """The factor of dynamic NTK for a sequence of this length; 1 up to `seq_length`."""
    return float(max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1))


class QwenRotary(Qwen2RotaryEmbedding):  # type: ignore[misc]
    """Rotary tables of positions that may each have a base of their own, for as long as `alpha` is set."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.alpha: Tensor | None = None
        """float[B, K], factor of every position during one call."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [B, K, d]."""
        if self.alpha is None:
            return cast("tuple[Tensor, Tensor]", super().forward(x, position_ids))
        with torch.no_grad():
            width = 2 * self.inv_freq.shape[-1]
            base = self.config.rope_parameters["rope_theta"] * self.alpha.double() ** (width / (width - 2))
            exponents = torch.arange(0, width, 2, device=x.device).double() / width
            frequencies = (base[..., None] ** -exponents).float()
            angles = position_ids[..., None].float() * frequencies
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class BesideLayer:
    """A forward hook that adds an adapter's output, or one part of its columns, to a layer's."""

    def __init__(self, adapter: Adapter, part: int, parts: int) -> None:
        self.adapter, self.part, self.parts = adapter, part, parts

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output with the adapter's."""
        return output + cast(Tensor, self.adapter(inputs[0], part=self.part, parts=self.parts))


BESIDE = (
    ("self_attn", "c_attn_lora", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", "c_proj_lora", ("o_proj",)),
    ("mlp", "w1_lora", ("up_proj",)),
    ("mlp", "w2_lora", ("gate_proj",)),
)
"""Where the published adapters stand (section 3.4): owner, name, the layers that share one in thirds."""


class QwenDecoder(Decoder):
    """A Qwen-7B decoder; sizes in `config`, see `qwen_config`.

    seq_length: beyond it dynamic NTK and log-n act, in evaluation mode.
    lora: `rank`, `dropout` and `start` of adapters beside c_attn, attn.c_proj, w1 and w2; None without. Query, key and
        value share one adapter, as the published fused layer has it; in training each draws its own dropout.
    padding: "none" stretches by a sequence's own length; "left" and "right" by the longest of a call, as the published
        code does with the batch padded on that side.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        attention: Attention = "auto",
        activation_checkpointing: bool = False,
        seq_length: int = SEQ_LENGTH,
        dynamic_ntk: bool = True,
        logn_attention: bool = True,
        lora: Mapping[str, Any] | None = None,
        padding: Padding = "none",
    ) -> None:
        super().__init__(config, attention=attention, activation_checkpointing=activation_checkpointing)
        if seq_length < 2:
            raise ValueError(f"seq_length={seq_length}: give the length the decoder was trained at, {SEQ_LENGTH}")
        self.seq_length, self.dynamic_ntk, self.logn_attention = seq_length, dynamic_ntk, logn_attention
        self.padding: Padding = padding
        self.model.rotary_emb = QwenRotary(self.config)
        if lora is not None:
            add_decoder_adapters(self, **lora)

    @property
    def rotary(self) -> QwenRotary:
        """The rotary tables."""
        return cast(QwenRotary, self.model.rotary_emb)

    def run_model(
        self, positions: Tensor, *, layout: PackedLayout | None, cache: RaggedCache | None, **inputs: Any
    ) -> Tensor:
        """The model's hidden states, sequences stretched where they are long."""
        lengths = None if self.training else self._prompt_lengths(layout, cache)
        if lengths is None:
            return super().run_model(positions, layout=layout, cache=cache, **inputs)
        own, longest = lengths
        padded = own if self.padding == "none" else torch.full_like(own, longest)
        if self.logn_attention:
            places = positions + (padded - own if self.padding == "left" else 0)
            scale = ((places + 1).double().log() / math.log(self.seq_length)).clamp(min=1.0)
            inputs["query_scale"] = scale.float()
        if self.dynamic_ntk:
            doublings = torch.ceil(torch.log2(padded.double() / self.seq_length) + 1)
            self.rotary.alpha = (2**doublings - 1).clamp(min=1.0)
        try:
            return super().run_model(positions, layout=layout, cache=cache, **inputs)
        finally:
            self.rotary.alpha = None

    def _prompt_lengths(self, layout: PackedLayout | None, cache: RaggedCache | None) -> tuple[Tensor, int] | None:
        """Length of every position's prompt, int64[B, K], and the longest; None where nothing is long."""
        if layout is not None:
            if layout.max_length <= self.seq_length:
                return None
            counts, each = np.array(layout.groups).T
            return torch.from_numpy(np.repeat(each, counts * each))[None].to(layout.cu_seqlens.device), int(each[-1])
        assert cache is not None
        if max(cache.length, cache.longest_prompt) <= self.seq_length:
            return None
        return cache.prompt_lengths[:, None], cache.longest_prompt


def add_decoder_adapters(
    decoder: Decoder, *, rank: int = DECODER_RANK, dropout: float = DROPOUT, start: Start = "noop"
) -> None:
    """Put the published adapters beside the layers of every block, in place."""
    for block in cast(nn.ModuleList, decoder.model.layers):
        for owner_name, name, shared in BESIDE:
            owner = block.get_submodule(owner_name)
            layers = [cast(nn.Linear, owner.get_submodule(layer)) for layer in shared]
            out_dim = sum(layer.out_features for layer in layers)
            adapter = Adapter(layers[0].in_features, out_dim, rank=rank, dropout=dropout, start=start)
            owner.add_module(name, adapter)
            for part, layer in enumerate(layers):
                layer.register_forward_hook(BesideLayer(adapter, part, len(layers)))
