"""The resampler: learned queries read the tokens of one view, whatever their number.

Positions are added to queries and keys and not to values. Their table is a parameter: published weights may carry
another one than `sincos_table`, which is only how it starts. Source: reference/monkey.md, section 1.4.

Shape letters: B views, T tokens of a view, C their width, Q queries, D width of the decoder.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestiary.variants.monkey.vit import NORM_EPS, resize_table

HEAD_DIM = 128  # section 1.4
_STD = 0.02
"""Of queries and projections before training (Qwen-VL's initialisation)."""
_PERIOD = 10000.0


def sincos_table(dim: int, side: int) -> Tensor:
    """Positions of a square grid, [side * side, dim]: first half the column, second half the row, each [sin | cos]."""
    if dim % 4:
        raise ValueError(f"sine and cosine positions need a width that is a multiple of 4, not {dim}")
    omega = _PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for place in (column, row):
        angles = place.flatten()[:, None].double() * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


class StackedAttention(nn.Module):
    """The parameters of an attention with query, key and value projections stacked in that order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.in_proj_weight, std=_STD)
        nn.init.trunc_normal_(self.out_proj.weight, std=_STD)
        nn.init.zeros_(self.out_proj.bias)


class Resampler(nn.Module):
    """Tokens [B, T, C] to [B, num_queries, out_dim]; num_queries must be a square."""

    def __init__(self, *, num_queries: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        side = math.isqrt(num_queries)
        if side**2 != num_queries:
            raise ValueError(f"queries={num_queries}: they stand for a square grid; give 256, 64, 16 ...")
        self.heads = max(1, out_dim // HEAD_DIM)
        if out_dim % self.heads:
            raise ValueError(f"the resampler's width {out_dim} is no multiple of its {self.heads} heads; change it")
        # Not trained unless a stage names it; the published recipe does (section 3.3).
        self.pos_embed = nn.Parameter(sincos_table(out_dim, side), requires_grad=False)
        self.query = nn.Parameter(torch.empty(num_queries, out_dim))
        nn.init.trunc_normal_(self.query, std=_STD)
        self.kv_proj = nn.Linear(in_dim, out_dim, bias=False)
        self.attn = StackedAttention(out_dim)
        self.ln_q = nn.LayerNorm(out_dim, eps=NORM_EPS)
        self.ln_kv = nn.LayerNorm(out_dim, eps=NORM_EPS)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """[B, Q, D], before the last norm and projection."""
        values = self.ln_kv(self.kv_proj(tokens_BTC))
        keys = values + resize_table(self.pos_embed, tokens_BTC.shape[1]).to(values.dtype)
        queries = self.ln_q(self.query) + self.pos_embed
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        # All views ask the same, so the queries are projected once.
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:-1], self.heads, -1).transpose(-3, -2)
            for x, w, b in zip((queries[None], keys, values), weights, biases, strict=True)
        )
        seen = F.scaled_dot_product_attention(q.to(v.dtype).expand(len(v), -1, -1, -1), k, v)
        return cast(Tensor, self.attn.out_proj(seen.transpose(1, 2).flatten(2)))
