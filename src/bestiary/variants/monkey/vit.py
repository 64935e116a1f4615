"""Monkey's eye: Qwen-VL's ViT ("bigG") over all windows and the global view of all pictures in one call.

Views come first in every tensor, so that the windows of one place in all pictures lie side by side and each place's
adapters are one entry of a batched product. There is no class token and no norm behind the last block.
Source: reference/monkey.md, sections 1.2 and 1.3.

Shape letters: V views (the windows, then the global view), N pictures, T tokens of a view, C width, H heads, d width of
a head, M = N * T.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bestiary.variants.monkey.adapter import AdapterSizes, add_to_windows

NORM_EPS = 1e-6  # section 1.2
MLP_RATIO = 4.9231  # section 1.2: 1664 * 4.9231 -> 8192
TABLE_SIDE = 16
"""Side of the stored tables of positions, whatever the size of a view (sections 1.2 and 1.4)."""


def resize_table(table: Tensor, num_tokens: int) -> Tensor:
    """A table of positions of a square grid, [P, C], for a square grid of so many tokens: bicubic, in float32.

    A table of that many places is left as it is.
    """
    if len(table) == num_tokens:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(num_tokens)
    if old**2 != len(table) or new**2 != num_tokens:
        raise ValueError(f"a table of {len(table)} positions for {num_tokens} tokens: both grids must be square")
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class VitAttention(nn.Module):
    """Attention whose 3 * C projected numbers are query, key and value of the first head, then of the second ..."""

    def __init__(self, width: int, heads: int, adapters: AdapterSizes) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.in_proj_lora = adapters.make(width, 3 * width, adapters.attention_rank)
        self.out_proj_lora = adapters.make(width, width, adapters.attention_rank)

    def forward(self, x_VMC: Tensor, num_tokens: int, *, has_windows: bool = True) -> Tensor:
        """[V, M, C]; every `num_tokens` neighbours of M see one another. has_windows: not the global view alone."""
        views, length, width = x_VMC.shape
        projected = add_to_windows(self.in_proj(x_VMC), self.in_proj_lora if has_windows else None, x_VMC)
        heads = projected.view(-1, num_tokens, self.heads, 3 * width // self.heads).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(query, key, value)
        context = seen.transpose(1, 2).reshape(views, length, width)
        return add_to_windows(self.out_proj(context), self.out_proj_lora if has_windows else None, context)


class VitMlp(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C]."""
        return cast(Tensor, self.c_proj(F.gelu(self.c_fc(x))))


class VitBlock(nn.Module):
    """A block; the third adapter goes around norm and MLP, not beside one of its layers (section 1.3)."""

    def __init__(self, width: int, heads: int, hidden: int, adapters: AdapterSizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = VitAttention(width, heads, adapters)
        self.ln_2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = VitMlp(width, hidden)
        self.mlp_lora = adapters.make(width, width, adapters.mlp_rank)

    def forward(self, x_VMC: Tensor, num_tokens: int, has_windows: bool = True) -> Tensor:
        """[V, M, C]; has_windows: as of `VitAttention`."""
        x_VMC = x_VMC + self.attn(self.ln_1(x_VMC), num_tokens, has_windows=has_windows)
        return add_to_windows(x_VMC + self.mlp(self.ln_2(x_VMC)), self.mlp_lora if has_windows else None, x_VMC)


class VisionTransformer(nn.Module):
    """Views to tokens, [V, N, T, C].

    mlp_dim: None takes the published ratio. checkpoints: recompute each block in the backward pass, in training.
    """

    def __init__(
        self,
        *,
        view_px: int,
        patch_px: int,
        width: int,
        layers: int,
        heads: int,
        mlp_dim: int | None = None,
        adapters: AdapterSizes,
        checkpoints: bool = False,
    ) -> None:
        super().__init__()
        if view_px % patch_px:
            raise ValueError(f"views of {view_px} px are no whole number of patches of {patch_px} px; change one")
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads; change one")
        self.num_tokens = (view_px // patch_px) ** 2
        self.width, self.checkpoints = width, checkpoints
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_px, stride=patch_px, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(TABLE_SIDE**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=NORM_EPS)
        self.hidden = int(width * MLP_RATIO) if mlp_dim is None else mlp_dim
        self.blocks = nn.ModuleList(VitBlock(width, heads, self.hidden, adapters) for _ in range(layers))

    def forward(self, views_VN3SS: Tensor) -> Tensor:
        """Tokens after the last block; the first views are the windows, in the order of their adapters."""
        views, count = views_VN3SS.shape[:2]
        # What stays frozen records nothing for the backward pass up to the first adapters.
        tokens = self.first_tokens(views_VN3SS).flatten(1, 2)
        parts = [(tokens[:-1], True), (tokens[-1:], False)] if self.only_windows_learn() else [(tokens, True)]
        tokens = torch.cat([self._run_blocks(part, has_windows) for part, has_windows in parts])
        return tokens.view(views, count, self.num_tokens, self.width)

    def only_windows_learn(self) -> bool:
        """Whether the backward pass has nothing to do with the global view: it then keeps nothing of it either."""
        learned = {name for name, p in self.named_parameters() if p.requires_grad} if torch.is_grad_enabled() else set()
        return bool(learned) and all("_lora." in name for name in learned)

    def _run_blocks(self, tokens: Tensor, has_windows: bool) -> Tensor:
        """All blocks over views that begin with the windows, or over the global view."""
        recomputes = self.checkpoints and self.training and torch.is_grad_enabled() and has_windows
        for block in self.blocks:
            if recomputes:
                tokens = cast(Tensor, checkpoint(block, tokens, self.num_tokens, has_windows, use_reentrant=False))
            else:
                tokens = block(tokens, self.num_tokens, has_windows)
        return tokens

    def first_tokens(self, views_VN3SS: Tensor) -> Tensor:
        """What the first block reads: patches with their positions, after the first norm."""
        patches = self.conv1(views_VN3SS.flatten(0, 1).to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = patches + resize_table(self.positional_embedding, self.num_tokens)
        return cast(Tensor, self.ln_pre(tokens)).view(*views_VN3SS.shape[:2], self.num_tokens, self.width)
