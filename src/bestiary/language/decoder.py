"""The decoder: any causal language model of transformers, run on packed embeddings.

`Decoder` keeps two parts of the transformers model, `model` (embeddings, blocks, final norm) and `lm_head`, under
their own names, so that its state dict is the published one. Hidden states and logits are apart: only positions that
predict something pay for the output head.

Shape letters: B rows, T positions of a row, K real positions of all rows, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from bestiary.language.attention import ATTENTION_NAME, Attention, PackedLayout, check_attention

if TYPE_CHECKING:
    from bestiary.language.generation import RaggedCache


def llama_config(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    n_kv_heads: int | None = None,
    multiple_of: int = 256,
    ffn_dim_multiplier: float | None = None,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: float | None = None,
) -> LlamaConfig:
    """The configuration of a LLaMA decoder in the words of its `params.json`.

    multiple_of, ffn_dim_multiplier: the feed-forward width is 8/3 of `dim` (times the multiplier), rounded up.
    rope_scaling: factor on the position (0.5 interpolates by two); the inverse of transformers' linear factor.
    """
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    rope: dict[str, object] = {"rope_theta": float(rope_theta), "rope_type": "default"}
    if rope_scaling is not None:
        rope |= {"rope_type": "linear", "factor": 1.0 / rope_scaling}
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=multiple_of * math.ceil(hidden / multiple_of),
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads or n_heads,
        max_position_embeddings=max_seq_len,
        rms_norm_eps=norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


class Decoder(nn.Module):
    """A causal language model over embeddings of packed rows.

    config: of any causal language model of transformers; `llama_config` makes LLaMA's.
    attention: auto picks by device and dtype; an explicit wish that this machine cannot meet raises here, unless the
        model is being built on the meta device, where nothing will run.
    activation_checkpointing: recompute each block in the backward pass (training mode only).

    tunable: names of the parameters that may train after `language.tuning.tune`; None = all that a stage names.
    """

    def __init__(
        self, config: PretrainedConfig, *, attention: Attention = "auto", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":
            check_attention(attention)
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"{type(config).__name__} scales its logits ({name}), which this decoder does not do")
        language_model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME)
        self.config: PretrainedConfig = language_model.config
        self.attention: Attention = attention
        self.model: nn.Module = language_model.model
        self.lm_head: nn.Module = language_model.lm_head
        self.tunable: frozenset[str] | None = None
        self._autocast: torch.dtype | None = None
        self.set_activation_checkpointing(activation_checkpointing)

    @property
    def dim(self) -> int:
        """Width of embeddings and hidden states."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int:
        """Positions of the longest sequence the model was made for (images, prompts and text)."""
        return int(self.config.max_position_embeddings)

    def set_activation_checkpointing(self, is_on: bool) -> None:
        """Recompute blocks in the backward pass, or keep their activations."""
        model = self.model
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            # Only reentrant checkpoints need inputs with gradients; frozen embeddings could then not be written into.
            model.disable_input_require_grads()  # type: ignore[operator]
        else:
            model.activation_checkpointing_disable()  # type: ignore[operator]

    def choose_precision(self) -> None:
        """Compute in bfloat16, under autocast, where parameters are held in it beside others in float32.

        To be called after the dtype of some parameters was changed (frozen ones in bfloat16, adapters in float32).
        """
        dtypes = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}
        self._autocast = torch.bfloat16 if torch.bfloat16 in dtypes and len(dtypes) > 1 else None

    def restore_buffers(self) -> None:
        """Compute the rotary tables again, after weights were put into a model built on the meta device."""
        self.choose_precision()
        device = next(self.parameters()).device
        for name, module in list(self.model.named_modules()):
            if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
                with torch.device(device):
                    self.model.set_submodule(name, type(module)(self.config))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids, int64[...], to embeddings [..., D]."""
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        return cast(Tensor, table(ids))

    def forward(
        self,
        embeds_BTD: Tensor,
        positions_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D], zeros at padding.

        positions: int64[B, T], restarting at 0 in every segment. segment_ids: int[B, T], 0 for padding; each row is
        one segment where neither they nor `layout` (which spares looking at them) are given.
        """
        rows, width = embeds_BTD.shape[:2]
        if layout is None:
            layout = (
                PackedLayout.from_spans([(r, 0, width) for r in range(rows)], (rows, width), embeds_BTD.device)
                if segment_ids_BT is None
                else PackedLayout.from_segment_ids(segment_ids_BT)
            )
        if not layout.groups:  # padding only: run one position, so that all parameters and ranks take part, for nothing
            one = PackedLayout.from_spans([(0, 0, 1)], (1, 1), embeds_BTD.device)
            return self.run_packed(embeds_BTD[:1, :1], positions_BT[:1, :1], one) * 0.0 + embeds_BTD * 0.0
        return layout.unpack(self.run_packed(layout.pack(embeds_BTD), layout.pack(positions_BT), layout))

    def run_packed(
        self,
        embeds_1KD: Tensor,
        positions_1K: Tensor,
        layout: PackedLayout,
        cache: RaggedCache | None = None,
    ) -> Tensor:
        """Hidden states [1, K, D] of a flat row in the order of `layout`; a `cache` keeps its keys and values."""
        return self.run_model(
            positions_1K, layout=layout, cache=cache, inputs_embeds=embeds_1KD, attention=self.attention
        )

    def run_step(self, embeds_B1D: Tensor, positions_B1: Tensor, cache: RaggedCache) -> Tensor:
        """Hidden states [B, 1, D] of one new position per cached sequence."""
        return self.run_model(positions_B1, layout=None, cache=cache, inputs_embeds=embeds_B1D, key_mask=cache.key_mask)

    def run_model(
        self, positions: Tensor, *, layout: PackedLayout | None, cache: RaggedCache | None, **inputs: Any
    ) -> Tensor:
        """Hidden states of the transformers model: what `run_packed` and `run_step` share, and what a decoder whose
        attention depends on lengths extends.

        layout: of the packed row, None for one new position per sequence. inputs: `inputs_embeds`, and words that
        reach `packed_attention`.
        """
        with self._precision(positions.device):
            out = self.model(
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **({} if layout is None else {"packed": layout}),
                **inputs,
            )
        return cast(Tensor, out.last_hidden_state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        with self._precision(hidden.device):
            logits = cast(Tensor, self.lm_head(hidden))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Autocast for parts of mixed dtypes, else nothing; an autocast around the whole step stays as it is."""
        if self._autocast is None or torch.is_autocast_enabled(device.type):
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self._autocast)
