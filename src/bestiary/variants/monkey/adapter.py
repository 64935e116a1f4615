"""Monkey's low-rank adapters: beside a linear layer of the decoder, or one for every window of a picture.

An adapter adds `scale * B(A(dropout(x)))` to what stands beside it. The scale is learned, from 1; there is no factor
alpha / rank. Source: reference/monkey.md, sections 1.3 and 3.4.

Shape letters: W windows, M rows of a window (all tokens of all pictures), C and D widths, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Start = Literal["noop", "reference"]
DROPOUT = 0.05
"""Of an adapter's input, in training (sections 1.3 and 3.4)."""
ATTENTION_RANK, MLP_RANK = 16, 32
"""Of the windows' adapters beside the attention's two layers, and beside norm and MLP (section 1.3)."""
DECODER_RANK = 32
"""Of the decoder's adapters (section 3.4)."""
_REFERENCE_STD = 0.02
"""What both matrices were drawn with by accident: the published code meant B to be zero (section 1.3, "Init trap")."""


class Adapter(nn.Module):
    """One adapter of a linear layer from `in_dim` to `out_dim`.

    start: "noop" changes nothing until B, zero at first, has learned; "reference" draws both matrices as the published
        training did.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, rank: int, dropout: float = DROPOUT, start: Start = "noop"
    ) -> None:
        super().__init__()
        if start not in ("noop", "reference"):
            raise ValueError(f"adapters start as {start!r}; choose noop or reference")
        if rank < 1:
            raise ValueError(f"an adapter of rank {rank}; give at least 1, or leave adapters out")
        self.dropout = dropout
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.lora_scale = nn.Parameter(torch.ones(1))
        if start == "reference":
            nn.init.normal_(self.lora_a.weight, std=_REFERENCE_STD)
            nn.init.normal_(self.lora_b.weight, std=_REFERENCE_STD)
        else:
            nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor, *, part: int = 0, parts: int = 1) -> Tensor:
        """What is added to the layer's output; with `parts` > 1 only that part of the output's columns."""
        low = self.lora_a(F.dropout(x, self.dropout, self.training))
        rows = self.lora_b.weight.chunk(parts)[part]
        return self.lora_scale * F.linear(low, rows)


class WindowAdapters(nn.ModuleList):
    """An adapter for every window, all of them run in two batched products.

    They are modules of their own, named by their window, as published; only their arithmetic is done together.
    """

    def __init__(self, num_windows: int, make: Callable[[], Adapter]) -> None:
        super().__init__([make() for _ in range(num_windows)])

    def forward(self, x_WMC: Tensor) -> Tensor:
        """What is added to the output of window w, [W, M, D], from x[w]."""
        adapters = [cast(Adapter, adapter) for adapter in self]
        a_WCr = torch.stack([adapter.lora_a.weight for adapter in adapters]).transpose(1, 2)
        b_WrD = torch.stack([adapter.lora_b.weight for adapter in adapters]).transpose(1, 2)
        scale_W11 = torch.stack([adapter.lora_scale for adapter in adapters])[:, :, None]
        x_WMC = F.dropout(x_WMC, adapters[0].dropout, self.training)
        low_WMr = torch.bmm(x_WMC, a_WCr.to(x_WMC.dtype))
        return torch.bmm(low_WMr * scale_W11.to(low_WMr.dtype), b_WrD.to(low_WMr.dtype))


def add_to_windows(x_VMD: Tensor, adapters: WindowAdapters | None, inputs_VMC: Tensor) -> Tensor:
    """x with the adapters' part added to the windows, which come first; the global view behind them has none.

    inputs: what the adapters read, for all views; these may be the windows alone.
    """
    if adapters is None:
        return x_VMD
    num = len(adapters)
    if len(x_VMD) == num:
        return x_VMD + cast(Tensor, adapters(inputs_VMC))
    return torch.cat([x_VMD[:num] + adapters(inputs_VMC[:num]), x_VMD[num:]])


@dataclass(frozen=True, slots=True)
class AdapterSizes:
    """How the windows' adapters are made: how many of them at every place, their ranks, dropout and start."""

    num_windows: int
    attention_rank: int = ATTENTION_RANK
    mlp_rank: int = MLP_RANK
    dropout: float = DROPOUT
    start: Start = "noop"

    def make(self, in_dim: int, out_dim: int, rank: int) -> WindowAdapters | None:
        """The windows' adapters at one place; None without any."""
        if not self.num_windows:
            return None

        def one() -> Adapter:
            return Adapter(in_dim, out_dim, rank=rank, dropout=self.dropout, start=self.start)

        return WindowAdapters(self.num_windows, one)
