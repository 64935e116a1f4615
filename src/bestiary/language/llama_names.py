"""Names and layout of Meta's LLaMA checkpoints against transformers', both ways.

Meta rotates neighbouring pairs (2i, 2i + 1) of a head, transformers the halves (i, i + d/2): the rows of wq and wk are
reordered within each head. Everything else is renamed only. Reference names here are without a checkpoint's prefix
(`llma.`), ours without the prefix of the decoder in a larger model (`decoder.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_TOP_BACK = {ours: reference for reference, ours in _TOP.items()}
_BLOCK_BACK = {ours: reference for reference, ours in _BLOCK.items()}


def decoder_name(reference: str) -> str | None:
    """Our name of a reference tensor, or None where it is no part of the decoder."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", reference):
        tail = _BLOCK.get(match[2])
        return tail and f"model.layers.{match[1]}.{tail}"
    return _TOP.get(reference)


def reference_name(ours: str) -> str | None:
    """The reference's name of one of our tensors, or None where it is no part of the decoder."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", ours):
        tail = _BLOCK_BACK.get(match[2])
        return tail and f"layers.{match[1]}.{tail}"
    return _TOP_BACK.get(ours)


def pairs_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * d, D], from Meta's order within each head to transformers'."""
    rows = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


def halves_to_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `pairs_to_halves`."""
    rows = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


def rotated_heads(ours: str, *, n_heads: int, n_kv_heads: int) -> int | None:
    """Heads of a tensor whose rows are reordered (query, key), None for any other; by our name."""
    if ours.endswith("self_attn.q_proj.weight"):
        return n_heads
    return n_kv_heads if ours.endswith("self_attn.k_proj.weight") else None


def to_decoder(reference: Mapping[str, Tensor], *, n_heads: int, n_kv_heads: int | None = None) -> dict[str, Tensor]:
    """A reference state dict as a `Decoder`'s; an unknown name raises."""
    state = {}
    for name, tensor in reference.items():
        ours = decoder_name(name)
        if ours is None:
            raise ValueError(f"{name} is no tensor of a LLaMA decoder")
        heads = rotated_heads(ours, n_heads=n_heads, n_kv_heads=n_kv_heads or n_heads)
        state[ours] = tensor if heads is None else pairs_to_halves(tensor, heads)
    return state


def to_reference(decoder: Mapping[str, Tensor], *, n_heads: int, n_kv_heads: int | None = None) -> dict[str, Tensor]:
    """A `Decoder`'s state dict (or its gradients) as the reference's; an unknown name raises."""
    state = {}
    for name, tensor in decoder.items():
        reference = reference_name(name)
        if reference is None:
            raise ValueError(f"{name} has no counterpart in the LLaMA reference")
        heads = rotated_heads(name, n_heads=n_heads, n_kv_heads=n_kv_heads or n_heads)
        state[reference] = tensor if heads is None else halves_to_pairs(tensor, heads)
    return state
