"""Monkey from plain sizes: windows and a global view through one ViT, a resampler, Qwen-7B.

Windows of any size in any grid: a picture takes (windows + 1) * queries positions, five times 256 at 896 x 896 and
seven times at 1344 x 896. Source: reference/monkey.md, sections 1 and 2.

Shape letters: N pictures, V views of one (windows row by row, then the whole), Q queries, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bestiary.language.attention import Attention
from bestiary.mllm import MultimodalLM
from bestiary.saved_weights import WINDOWS
from bestiary.variants.monkey.adapter import AdapterSizes
from bestiary.variants.monkey.decoder import SEQ_LENGTH, Padding, QwenDecoder, qwen_config
from bestiary.variants.monkey.resampler import Resampler
from bestiary.variants.monkey.vit import NORM_EPS, VisionTransformer
from bestiary.variants.monkey.windows import grid_of, views
from bestiary.vision.encoders import normalise


class MonkeyVision(nn.Module):
    """Pictures to rows: `image_rows` of the decoder's width for each, windows row by row and the whole last.

    image_px: height and width of the canvas, or one number for a square. window_px must divide both.
    adapters: `attention_rank`, `mlp_rank`, `dropout` and `start` of the windows' adapters; None without adapters.
    activation_checkpointing: recompute the ViT's blocks in the backward pass.
    """

    def __init__(
        self,
        *,
        image_px: int | Sequence[int],
        window_px: int,
        patch_px: int,
        width: int,
        layers: int,
        heads: int,
        num_queries: int,
        out_dim: int,
        mlp_dim: int | None = None,
        adapters: Mapping[str, Any] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.height_px, self.width_px = (image_px, image_px) if isinstance(image_px, int) else image_px
        self.window_px = window_px
        rows, columns = grid_of(self.height_px, self.width_px, window_px)
        self.num_windows = rows * columns
        self.num_views = self.num_windows + 1
        self.image_rows = self.num_views * num_queries
        sizes = AdapterSizes(0) if adapters is None else AdapterSizes(self.num_windows, **adapters)
        self.num_adapters = sizes.num_windows
        """Windows with adapters: all or none."""
        self.vit = VisionTransformer(
            view_px=window_px,
            patch_px=patch_px,
            width=width,
            layers=layers,
            heads=heads,
            mlp_dim=mlp_dim,
            adapters=sizes,
            checkpoints=activation_checkpointing,
        )
        self.resampler = Resampler(num_queries=num_queries, in_dim=width, out_dim=out_dim)
        self.ln_post = nn.LayerNorm(out_dim, eps=NORM_EPS)
        self.proj = nn.Parameter(out_dim**-0.5 * torch.randn(out_dim, out_dim))

    @property
    def layout(self) -> dict[str, int]:
        """What the processor must know: the canvas, and the positions and views of a picture."""
        return {
            "height_px": self.height_px,
            "width_px": self.width_px,
            "image_rows": self.image_rows,
            "num_views": self.num_views,
        }

    @property
    def identity(self) -> dict[str, str]:
        """The grid its adapters belong to, which no shape shows; nothing without adapters."""
        return grid_identity(self.height_px, self.width_px, self.window_px) if self.num_adapters else {}

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """float[N, image_rows, D]; pixels: uint8[N, 3, height, width] RGB, or float if normalised already."""
        if len(pixels_N3HW) == 0:
            return self.proj.new_zeros(0, self.image_rows, self.proj.shape[1])
        if tuple(pixels_N3HW.shape[1:]) != (3, self.height_px, self.width_px):
            raise ValueError(
                f"pixels are {tuple(pixels_N3HW.shape)} but the model takes 3 x {self.height_px} x {self.width_px} "
                "(height x width); give the processor the model's height_px and width_px"
            )
        tokens_VNTC = self.vit(views(normalise(pixels_N3HW), self.window_px))
        return self.rows(self.resampler(tokens_VNTC.flatten(0, 1)))

    def rows(self, pooled_VQD: Tensor) -> Tensor:
        """The resampler's output of V * N views, views first, to float[N, V * Q, D] by the last norm and projection."""
        rows = cast(Tensor, self.ln_post(pooled_VQD)) @ self.proj
        return rows.view(self.num_views, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)

    def step_values(self) -> tuple[int, int]:
        """Numbers that one picture's backward pass needs, see `training.memory`: an upper bound.

        Every token (of the windows alone, where only their adapters learn) keeps, beside a block's input of C numbers,
        14 C + 2 H of a block: both norms' outputs, queries, keys and values with their adapters (3 C), context,
        residual, three inputs of adapters as their dropout leaves them with its masks, and both sides of the GELU (H
        each). The resampler keeps six times the decoder's width: keys and values before and behind norm, positions and
        projection.
        """
        width, layers = self.vit.width, len(self.vit.blocks)
        tokens = self.vit.num_tokens * (self.num_windows if self.vit.only_windows_learn() else self.num_views)
        block = tokens * (14 * width + 2 * self.vit.hidden)
        inputs = layers * tokens * width
        kept = inputs if self.vit.checkpoints else inputs + layers * block
        return kept + 6 * self.num_views * self.vit.num_tokens * self.proj.shape[1], block


def grid_identity(height_px: int, width_px: int, window_px: int) -> dict[str, str]:
    """What weights with adapters say of the windows they have them for, see `saved_weights.check_identity`."""
    rows, columns = grid_of(height_px, width_px, window_px)
    return {WINDOWS: f"{rows} x {columns}"}


def build_monkey(
    *,
    vision: Mapping[str, Any],
    decoder: Mapping[str, Any],
    attention: Attention = "auto",
    seq_length: int = SEQ_LENGTH,
    dynamic_ntk: bool = True,
    logn_attention: bool = True,
    decoder_lora: Mapping[str, Any] | None = None,
    padding: Padding = "none",
) -> MultimodalLM:
    """Monkey from plain sizes; reads no files.

    vision: arguments of `MonkeyVision` but out_dim. decoder: arguments of `qwen_config`. The others: of `QwenDecoder`.
    """
    config = qwen_config(**decoder)
    return MultimodalLM(
        decoder=QwenDecoder(
            config,
            attention=attention,
            seq_length=seq_length,
            dynamic_ntk=dynamic_ntk,
            logn_attention=logn_attention,
            lora=decoder_lora,
            padding=padding,
        ),
        vision=MonkeyVision(**vision, out_dim=config.hidden_size),
    )
