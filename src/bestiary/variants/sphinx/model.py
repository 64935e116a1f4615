"""SPHINX's eyes: several views of one square picture, four frozen encoders, two projections, one pair of tags a view.

One module covers SPHINX (one 224 px view) and SPHINX-1K / v2-1k (448 px: the whole picture and its four quarters):
the views are data. Per view the decoder sees `start, queries of the Q-Former, tokens of the ensemble, end`, where a
token of the ensemble is CLIP, ConvNeXt and DINOv2 side by side, the class (or mean) token first.

Sources: LLaMA2-Accessory commit 3777c43, accessory/model/LLM/llama_ens.py and llama_ens5.py.

Shape letters: N images, V views of one image, Q queries, P ensemble tokens, C channels, D decoder width,
G side of the token grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.language.attention import Attention
from bestiary.language.decoder import Decoder, llama_config
from bestiary.mllm import MultimodalLM
from bestiary.saved_weights import VIEWS
from bestiary.vision.encoders import (
    ClipTower,
    ConvNextTower,
    Dinov2Tower,
    QFormerTower,
    clip_to_imagenet,
    grid_side,
    normalise,
)

View = Literal["whole"] | Sequence[int]
"""The whole canvas scaled to the view's size, or the (row, column) of a cut of that size."""


@dataclass(frozen=True, slots=True)
class Features:
    """What the frozen encoders say about some images; may be stored and projected later.

    queries: float[N, V, Q, Cq] of the Q-Former; tokens: float[N, V, P, C] of the other three, side by side.
    """

    queries: torch.Tensor
    tokens: torch.Tensor


class Projection(nn.Sequential):
    """A linear layer and a norm: how everything that is not text enters the decoder.

    A Sequential, so that the norm is called `1` and not `norm`: the published recipes decay its weight.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        linear = nn.Linear(in_dim, out_dim)
        super().__init__(linear, nn.LayerNorm(out_dim))
        self.in_dim = in_dim

    @property
    def weight(self) -> torch.Tensor:
        """The linear layer's weight; tells dtype and device."""
        return cast(nn.Linear, self[0]).weight


class SphinxVision(nn.Module):
    """Views, encoders, projections and tags: `image_rows` rows of the decoder's width for every image.

    canvas_px: side of the square picture; view_px: side of a view; views: see `View`, in the order of their rows.
    clip, convnext, dinov2, qformer: sizes of the encoders (see their classes), without view_px and patch_px.
    half_resize: round pixels to float16 before each resize, as the published code does (2e-4 in the features).
    frozen: the encoders stay in eval mode, outside the graph; False is for those who train encoders.
    """

    def __init__(
        self,
        *,
        canvas_px: int,
        view_px: int,
        patch_px: int,
        views: Sequence[View],
        clip: Mapping[str, Any],
        convnext: Mapping[str, Any],
        dinov2: Mapping[str, Any],
        qformer: Mapping[str, Any],
        out_dim: int,
        half_resize: bool = False,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.canvas_px = canvas_px
        self.view_px = view_px
        self.views = tuple(_checked_view(view, canvas_px=canvas_px, view_px=view_px) for view in views)
        if not self.views:
            raise ValueError("views is empty; name at least one, for instance [whole]")
        self.half_resize = half_resize
        self.frozen = frozen
        self.clip = ClipTower(view_px=view_px, patch_px=patch_px, **clip)
        self.convnext = ConvNextTower(**convnext)
        self.dinov2 = Dinov2Tower(view_px=view_px, patch_px=patch_px, **dinov2)
        self.qformer = QFormerTower(view_px=view_px, patch_px=patch_px, **qformer)
        self.repeat = _repeat_factor(grid_side(view_px, patch_px), self.convnext.map_side)
        token_dim = self.clip.out_dim + self.convnext.out_dim + self.dinov2.out_dim
        self.qformer_proj = Projection(self.qformer.out_dim, out_dim)
        self.visual_proj = Projection(token_dim, out_dim)
        self.start = nn.Parameter(torch.rand(1, 1, out_dim))
        self.end = nn.Parameter(torch.rand(1, 1, out_dim))
        self.num_views = len(self.views)
        self.rows_per_view = self.qformer.num_tokens + self.clip.num_tokens + 2
        self.image_rows = self.num_views * self.rows_per_view
        if frozen:
            for tower in self.towers:
                tower.requires_grad_(False)
        self.train(self.training)

    @property
    def layout(self) -> dict[str, int]:
        """What the processor must know: side of the canvas, positions and views of one image."""
        return {"canvas_px": self.canvas_px, "image_rows": self.image_rows, "num_views": self.num_views}

    @property
    def identity(self) -> dict[str, str]:
        """What the weights depend on and no shape shows: the cuts a picture is seen in."""
        return views_identity(self.views)

    @property
    def towers(self) -> tuple[nn.Module, ...]:
        """The four encoders."""
        return (self.clip, self.convnext, self.dinov2, self.qformer)

    def train(self, mode: bool = True) -> SphinxVision:
        """Training mode for the projections; frozen encoders stay in eval mode (no dropout)."""
        super().train(mode)
        if self.frozen:
            for tower in self.towers:
                tower.eval()
        return self

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, image_rows, D]; pixels: uint8[N, 3, canvas, canvas] RGB, or float if normalised already."""
        return self.project(self.encode(pixels_NCHW))

    def encode(self, pixels_NCHW: torch.Tensor) -> Features:
        """Everything up to the projections; without gradient when frozen. Zero images give empty features."""
        if pixels_NCHW.shape[0] == 0:
            return self._no_features()
        if tuple(pixels_NCHW.shape[1:]) != (3, self.canvas_px, self.canvas_px):
            raise ValueError(
                f"pixels are {tuple(pixels_NCHW.shape)} but the model takes a canvas of 3 x {self.canvas_px} x "
                f"{self.canvas_px}; give the processor the model's canvas_px"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            views = self.cut(pixels_NCHW).flatten(0, 1)
            tokens = torch.cat([self.clip(views), self.map_tokens(views), self.dinov2(clip_to_imagenet(views))], dim=-1)
            return Features(self._by_image(self.qformer(views)), self._by_image(tokens))

    def cut(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, V, 3, view, view], CLIP-normalised: the whole by bicubic without antialias, cuts by slicing."""
        canvas = normalise(pixels_NCHW)
        px = self.view_px
        cuts = [
            self._whole(canvas) if view == "whole" else canvas[:, :, view[0] * px :, view[1] * px :][:, :, :px, :px]
            for view in self.views
        ]
        return torch.stack(cuts, dim=1)

    def _whole(self, canvas: torch.Tensor) -> torch.Tensor:
        if self.canvas_px == self.view_px:
            return canvas
        source = canvas.half() if self.half_resize else canvas
        side = (self.view_px, self.view_px)
        return F.interpolate(source, size=side, mode="bicubic", align_corners=False).to(canvas.dtype)

    def feature_map(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, side, side, C] of ConvNeXt, its input resized by nearest neighbour; views: CLIP-normalised."""
        pixels = views_NCHW.half().to(views_NCHW.dtype) if self.half_resize else views_NCHW
        if self.convnext.input_px != self.view_px:
            pixels = F.interpolate(pixels, size=(self.convnext.input_px,) * 2, mode="nearest")
        return self.convnext(pixels)  # type: ignore[no-any-return]

    def map_tokens(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, 1 + G*G, C]: the mean of the map, then its places repeated up to the grid, row by row."""
        places = self.feature_map(views_NCHW)
        mean = places.mean(dim=(1, 2)).unsqueeze(1)
        grid = places.repeat_interleave(self.repeat, dim=1).repeat_interleave(self.repeat, dim=2)
        return torch.cat([mean, grid.flatten(1, 2)], dim=1)

    def project(self, features: Features) -> torch.Tensor:
        """float[N, image_rows, D]: both projections, and the two tags around every view."""
        queries = self.qformer_proj(features.queries.to(self.qformer_proj.weight.dtype))
        tokens = self.visual_proj(features.tokens.to(self.visual_proj.weight.dtype))
        tag = (*queries.shape[:2], -1, -1)
        start, end = self.start.expand(tag), self.end.expand(tag)
        rows = torch.cat([start.to(queries.dtype), queries, tokens, end.to(queries.dtype)], dim=2)
        return rows.flatten(1, 2)

    def _by_image(self, views: torch.Tensor) -> torch.Tensor:
        return views.reshape(-1, self.num_views, *views.shape[1:])

    def _no_features(self) -> Features:
        weight = self.visual_proj.weight
        queries = weight.new_empty((0, self.num_views, self.qformer.num_tokens, self.qformer.out_dim))
        return Features(queries, weight.new_empty((0, self.num_views, self.clip.num_tokens, self.visual_proj.in_dim)))


def views_identity(views: Sequence[View]) -> dict[str, str]:
    """The views of weights in words, as checkpoints record them: `whole 0,0 0,1 1,0 1,1`."""
    words = [view if isinstance(view, str) else ",".join(map(str, view)) for view in views]
    return {VIEWS: " ".join(words)}


def _checked_view(view: View, *, canvas_px: int, view_px: int) -> Literal["whole"] | tuple[int, int]:
    if isinstance(view, str):
        if view != "whole":
            raise ValueError(f"view {view!r}: write whole, or the [row, column] of a cut")
        return "whole"
    row, column = view
    if min(row, column) < 0 or (max(row, column) + 1) * view_px > canvas_px:
        raise ValueError(f"view [{row}, {column}] of {view_px} px lies outside the canvas of {canvas_px} px")
    return (row, column)


def _repeat_factor(grid: int, map_side: int) -> int:
    if grid % map_side:
        raise ValueError(
            f"the patch grid has {grid} places a side and ConvNeXt's map {map_side}: the first must be a multiple of "
            "the second; change view_px, patch_px, convnext.input_px or its number of stages"
        )
    return grid // map_side


def build_sphinx(
    *,
    vision: Mapping[str, Any],
    decoder: Mapping[str, Any],
    attention: Attention = "auto",
    reference_quirks: bool = False,
) -> MultimodalLM:
    """SPHINX from plain sizes; reads no files.

    vision: arguments of `SphinxVision` but out_dim. decoder: arguments of `llama_config`.
    reference_quirks: the published code's float16 rounding before each resize.
    """
    return MultimodalLM(
        decoder=build_decoder(decoder, attention),
        vision=build_vision(vision, out_dim=decoder["dim"], reference_quirks=reference_quirks),
        regions=None,
    )


def build_vision(sizes: Mapping[str, Any], *, out_dim: int, reference_quirks: bool) -> SphinxVision:
    """The visual part, `half_resize` following the quirks unless the sizes say otherwise."""
    return SphinxVision(**{"half_resize": reference_quirks, **sizes}, out_dim=out_dim)


def build_decoder(sizes: Mapping[str, Any], attention: Attention) -> Decoder:
    """The LLaMA decoder of these sizes (arguments of `llama_config`)."""
    return Decoder(llama_config(**sizes), attention=attention)
