"""Weights in Meta's layout, run by a LLaMA written here in Meta's convention, against the decoder that loads them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.llama_names import decoder_name, halves_to_pairs, pairs_to_halves, to_decoder, to_reference

SIZES: list[dict[str, Any]] = [
    {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "rope_scaling": 0.5, "multiple_of": 32},
    {"dim": 60, "n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "rope_scaling": None, "multiple_of": 8},
    {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 1, "rope_scaling": 0.3, "ffn_dim_multiplier": 1.3},
    {"dim": 40, "n_layers": 2, "n_heads": 5, "rope_theta": 1e6, "norm_eps": 1e-3},
]


def random_state(sizes: dict[str, Any], vocab: int) -> dict[str, Tensor]:
    """A checkpoint in Meta's names; norms away from one."""
    dim, heads = sizes["dim"], sizes["n_heads"]
    kv = (sizes.get("n_kv_heads") or heads) * dim // heads
    hidden = int(sizes.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    hidden = -(-hidden // sizes.get("multiple_of", 256)) * sizes.get("multiple_of", 256)
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for n in range(sizes["n_layers"]):
        attention = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
        shapes |= {f"layers.{n}.attention.{name}.weight": shape for name, shape in attention.items()}
        feed_forward = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
        shapes |= {f"layers.{n}.feed_forward.{name}.weight": shape for name, shape in feed_forward.items()}
        shapes |= {f"layers.{n}.{name}_norm.weight": (dim,) for name in ("attention", "ffn")}
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def meta_logits(state: dict[str, Tensor], sizes: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence: adjacent pairs as complex numbers, double precision."""
    w = {name: tensor.double() for name, tensor in state.items()}
    heads = sizes["n_heads"]
    kv, width = sizes.get("n_kv_heads") or heads, sizes["dim"] // heads
    eps = sizes.get("norm_eps", 1e-5)
    theta = sizes.get("rope_theta", 10000.0) ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.outer(torch.arange(len(ids)).double() * (sizes.get("rope_scaling") or 1.0), theta)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def split(x: Tensor, count: int, rotate: bool) -> Tensor:
        x = x.view(len(ids), count, width).transpose(0, 1)
        if rotate:
            pairs = torch.view_as_complex(x.reshape(count, len(ids), -1, 2))
            x = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return x.repeat_interleave(heads // count, 0)

    x = w["tok_embeddings.weight"][ids]
    for n in range(sizes["n_layers"]):
        a, f = f"layers.{n}.attention.", f"layers.{n}.feed_forward."
        h = norm(x, w[f"layers.{n}.attention_norm.weight"])
        q, k = split(h @ w[a + "wq.weight"].T, heads, True), split(h @ w[a + "wk.weight"].T, kv, True)
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(
            torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf
        )
        out = scores.softmax(-1) @ split(h @ w[a + "wv.weight"].T, kv, False)
        x = x + out.transpose(0, 1).flatten(1) @ w[a + "wo.weight"].T
        h = norm(x, w[f"layers.{n}.ffn_norm.weight"])
        x = x + (F.silu(h @ w[f + "w1.weight"].T) * (h @ w[f + "w3.weight"].T)) @ w[f + "w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("sizes", SIZES)
def test_a_decoder_with_converted_weights_computes_what_metas_llama_does(sizes: dict[str, Any]) -> None:
    state = random_state(sizes, vocab=90)
    decoder = Decoder(llama_config(**sizes, vocab_size=90, max_seq_len=64)).eval()
    heads = {"n_heads": sizes["n_heads"], "n_kv_heads": sizes.get("n_kv_heads")}
    decoder.load_state_dict(to_decoder(state, **heads))
    ids = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = decoder.head(decoder(decoder.embed(ids), torch.arange(17).expand(3, -1)))
    expected = torch.stack([meta_logits(state, sizes, row) for row in ids])
    assert (logits - expected).abs().max() < 2e-5
    back = to_reference(decoder.state_dict(), **heads)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_row_orders_are_inverse(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(halves_to_pairs(pairs_to_halves(weight, 3), 3), weight)
    assert torch.equal(pairs_to_halves(halves_to_pairs(weight, 3), 3), weight)
    assert pairs_to_halves(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_unknown_names_are_refused() -> None:
    assert decoder_name("layers.3.attention.bias") is None
    with pytest.raises(ValueError, match=r"visual_proj\.0\.weight"):
        to_decoder({"visual_proj.0.weight": torch.zeros(2, 2)}, n_heads=1)
    with pytest.raises(ValueError, match=r"model\.other"):
        to_reference({"model.other": torch.zeros(2, 2)}, n_heads=1)
