"""Ovis' eyes: a vision transformer whose patches are words of a visual vocabulary, and the table of those words.

One module for all versions: the backbone, the views of a canvas and the hidden stride are data. Per canvas the decoder
sees `image_rows` embeddings; the marks around and between pictures are the last rows of the same table.

Source: AIDC-AI/Ovis, commits 8c76854 (1.0), 50bb634 (1.5), f3f7f2e (1.6); facts in reference/ovis.md.

Shape letters: N canvases, W views of a canvas, S side in pixels, G side of the patch grid, C width of the backbone,
T tokens, F width of the features, V visual words with the marks, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from bestiary.variants.ovis.canvas import PLANES
from bestiary.variants.ovis.table import Choice, Tokenize, check_tokenize, embed_words, word_logits
from bestiary.variants.ovis.usage import WordUsage
from bestiary.vision.encoders import CLIP_MEAN, CLIP_STD, channels, grid_side, vision_sizes

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of SigLIP's pixels (section 1.5)."""
S2_VIEWS = 5
"""The whole picture and its quarters."""


def clip_backbone(
    *, image_px: int, patch_px: int, width: int, layers: int, heads: int, mlp_dim: int, activation: str = "quick_gelu"
) -> CLIPVisionModel:
    """CLIP's vision transformer, its last norm included though unused (section 1.1)."""
    grid_side(image_px, patch_px)
    return CLIPVisionModel(
        CLIPVisionConfig(
            **vision_sizes(image_px, patch_px, width, layers, heads, mlp_dim),
            hidden_act=activation,
            layer_norm_eps=1e-5,
        )
    )


def siglip_backbone(
    *,
    image_px: int,
    patch_px: int,
    width: int,
    layers: int,
    heads: int,
    mlp_dim: int,
    activation: str = "gelu_pytorch_tanh",
) -> SiglipVisionModel:
    """SigLIP's vision transformer, its last norm and pooling head included though unused (section 5 "1.5")."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            **vision_sizes(image_px, patch_px, width, layers, heads, mlp_dim),
            hidden_act=activation,
            layer_norm_eps=1e-6,
        )
    )


Connector = Literal["table", "linear", "mlp"]

BACKBONES = {"clip": clip_backbone, "siglip": siglip_backbone}


class OvisVision(nn.Module):
    """Backbone, head over the visual vocabulary, and table: `image_rows` rows of the decoder's width a canvas.

    backbone: `kind` (clip or siglip) and its sizes, see `clip_backbone`.
    vocab_size: visual words, marks included (131072). num_marks: 2 (begin, end), 5 (grid) or 0.
    num_views: 1, or 5 for the picture and its quarters side by side (S2).
    stride: so many patches each way make one token. keep_class: the class token is a visual token too.
    tokenize, tau: see `table.Choice`; only gumbel_argmax takes a tau, 1 by default.
    noisy_eval: noise is drawn in evaluation, too, as published, not in training alone.
    connector: "table" is Ovis; "linear" and "mlp" (two layers, GELU between them, `connector_width` wide, by default
        as the decoder) are the baselines of the paper's ablation: features go straight to the decoder's width, rows and
        marks stay as many, and the table holds the marks alone. Stages train `head` and `table` in all of them.
    """

    def __init__(
        self,
        *,
        backbone: Mapping[str, Any],
        vocab_size: int,
        num_marks: int,
        out_dim: int,
        num_views: int = 1,
        stride: int = 1,
        keep_class: bool = False,
        tokenize: Tokenize = "softmax",
        tau: float | None = None,
        noisy_eval: bool = False,
        connector: Connector = "table",
        connector_width: int | None = None,
    ) -> None:
        super().__init__()
        check_tokenize(tokenize)
        _check_connector(connector, connector_width, tokenize)
        sizes = dict(backbone)
        kind = sizes.pop("kind", None)
        if kind not in BACKBONES:
            raise ValueError(f"vision backbone {kind!r} is unknown; choose one of {', '.join(BACKBONES)}")
        if num_views not in (1, S2_VIEWS):
            raise ValueError(f"num_views={num_views}: a canvas has 1 view, or {S2_VIEWS} with its quarters")
        if keep_class and (kind != "clip" or stride != 1 or num_views != 1):
            raise ValueError("keep_class needs a clip backbone, stride 1 and one view; other grids have no such token")
        if not 0 <= num_marks < vocab_size:
            raise ValueError(f"num_marks={num_marks} of vocab_size={vocab_size} visual words; choose fewer marks")
        self.backbone = BACKBONES[kind](**sizes)
        del self.backbone.embeddings.position_ids  # unused here, and a buffer no checkpoint could fill after meta
        self.mean, self.std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else (HALF, HALF)
        self.canvas_px, self.num_views, self.num_marks = int(sizes["image_px"]), num_views, num_marks
        self.stride, self.keep_class = stride, keep_class
        if noisy_eval and tokenize != "gumbel_argmax":
            raise ValueError(f"noisy_eval: only tokenize=gumbel_argmax draws noise, not {tokenize}; leave it out")
        if tau is not None and tokenize != "gumbel_argmax":
            raise ValueError(f"tau={tau}: only tokenize=gumbel_argmax has a temperature, not {tokenize}; leave it out")
        self.tokenize, self.tau, self.noisy_eval = tokenize, 1.0 if tau is None else tau, noisy_eval
        self.usage: WordUsage | None = None
        """Counts the words that training chooses, where somebody asks (`module.OvisModule`)."""
        self.grid = sizes["image_px"] // sizes["patch_px"]
        self.image_rows = (-(-self.grid // stride)) ** 2 + keep_class
        scales = 1 if num_views == 1 else 2
        feature_dim = sizes["width"] * scales * stride**2
        self.connector = connector
        if connector == "table":
            num_words = vocab_size - num_marks
            self.head = nn.Sequential(nn.Linear(feature_dim, num_words, bias=False), nn.LayerNorm(num_words))
        else:
            self.head = _baseline(connector, feature_dim, connector_width or out_dim, out_dim)
        rows = vocab_size if connector == "table" else num_marks
        self.table = nn.Embedding(rows, out_dim)  # drawn from N(0, 1), as published (section 1.3)

    @property
    def layout(self) -> dict[str, int]:
        """What the processor must know: side of the canvas, rows, views and marks of a picture."""
        return {
            "canvas_px": self.canvas_px,
            "image_rows": self.image_rows,
            "num_views": self.num_views,
            "num_marks": self.num_marks,
        }

    def forward(self, pixels: Tensor, marks_M: Tensor | None = None) -> Any:
        """Rows [N, image_rows, D] of the canvases; with `marks` int64[M], also their rows [M, D] of the table.

        pixels: uint8[N, 4 * W, S, S], per view red, green, blue and 255 where the picture lies; or float[N, 3 * W, S,
        S] if normalised already (a missing view is infinite, as published).
        """
        features = self.features(pixels)
        rows = self.embed(features)
        if marks_M is None:
            return rows
        first = self.table.num_embeddings - self.num_marks
        return rows, self.table.weight[first:].index_select(0, marks_M).to(rows.dtype)

    def features(self, pixels: Tensor) -> Tensor:
        """What the head reads, [N, T, F]: tokens after the backbone's last layer, side by side in views and strides."""
        if len(pixels) == 0:
            return self._head_weight.new_zeros(0, self.image_rows, self._head_weight.shape[1])
        views_NW3SS, is_there_NW = self._views(pixels)
        hidden = self._last_layer(views_NW3SS.flatten(0, 1))
        if self.keep_class:
            return hidden
        patches = hidden[:, -(self.grid**2) :].reshape(-1, self.num_views, self.grid, self.grid, hidden.shape[-1])
        return _strided(self._joined(patches, is_there_NW), self.stride)

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the visual words without the marks, [N, T, V - marks]; for few canvases at a time."""
        if self.connector != "table":
            raise ValueError(f"connector={self.connector} has no visual words; ask a model with connector=table")
        return word_logits(features, *self._head_parameters)

    def probabilities(self, features: Tensor) -> Tensor:
        """The distribution over the visual words of every token, [N, T, V - marks]; for few canvases at a time."""
        return self.logits(features).softmax(-1)

    def embed(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Embeddings [N, T, D] of features; noise: float[N, T, V - marks] instead of noise drawn from torch's state."""
        if self.connector != "table":
            return cast(Tensor, self.head(features))
        seed = None
        if (self.training or self.noisy_eval) and self.tokenize == "gumbel_argmax" and noise is None:
            seed = int(torch.randint(1 << 62, ()))
        usage = self.usage if self.training else None
        choice = Choice(self.tokenize, self.tau, seed, None if noise is None else noise.flatten(0, 1), usage=usage)
        words = self.table.weight[: self.table.num_embeddings - self.num_marks]
        rows = embed_words(features.flatten(0, 1), *self._head_parameters, words, choice)
        return rows.view(*features.shape[:2], rows.shape[-1])

    @property
    def _head_weight(self) -> Tensor:
        return cast(nn.Linear, self.head[0]).weight

    @property
    def _head_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        norm = cast(nn.LayerNorm, self.head[1])
        return self._head_weight, norm.weight, norm.bias

    def _views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised views [N, W, 3, S, S], zeros beside the picture, and which of them are there, float[N, W]."""
        planes = 3 if pixels.is_floating_point() else PLANES
        if tuple(pixels.shape[1:]) != (planes * self.num_views, self.canvas_px, self.canvas_px):
            raise ValueError(
                f"pixels are {tuple(pixels.shape)} but the model takes {planes * self.num_views} x {self.canvas_px} x "
                f"{self.canvas_px}; give the processor the model's canvas_px and num_views"
            )
        views = pixels.view(len(pixels), self.num_views, planes, self.canvas_px, self.canvas_px)
        if pixels.is_floating_point():
            is_there = views.isfinite().flatten(2).all(-1)
            return torch.where(is_there[..., None, None, None], views, 0.0), is_there.to(views.dtype)
        is_picture = views[:, :, 3:] > 0
        rgb = views[:, :, :3].to(torch.float32).div_(255)
        rgb = rgb.sub_(channels(self.mean, rgb)).div_(channels(self.std, rgb)).mul_(is_picture)
        return rgb, is_picture.flatten(2).any(-1).to(rgb.dtype)

    def _last_layer(self, views: Tensor) -> Tensor:
        """All tokens after the last layer, before the backbone's last norm (section 9, fact 3)."""
        embeddings = self.backbone.embeddings
        weight = embeddings.patch_embedding.weight
        tokens = embeddings.patch_embedding(views.to(weight.dtype)).flatten(2).transpose(1, 2)
        if isinstance(self.backbone, CLIPVisionModel):
            tokens = torch.cat([embeddings.class_embedding.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = tokens + embeddings.position_embedding.weight
        if isinstance(self.backbone, CLIPVisionModel):
            tokens = self.backbone.pre_layrnorm(tokens)
        return cast(Tensor, self.backbone.encoder(inputs_embeds=tokens).last_hidden_state)

    def _joined(self, patches_NWGGC: Tensor, is_there_NW: Tensor) -> Tensor:
        """One grid [N, G, G, F] of all views: the whole picture's patches, beside them the quarters' at half size."""
        if self.num_views == 1:
            return patches_NWGGC[:, 0]
        count, _, side, _, width = patches_NWGGC.shape
        quarters = patches_NWGGC[:, 1:].reshape(count, 2, 2, side, side, width).permute(0, 5, 1, 3, 2, 4)
        quarters = quarters.reshape(count, width, 2 * side, 2 * side)  # as the picture has them
        pooled = F.adaptive_avg_pool2d(quarters.float(), self.grid).to(quarters.dtype).permute(0, 2, 3, 1)
        pooled = pooled * is_there_NW[:, 1, None, None, None].to(pooled.dtype)
        return torch.cat([patches_NWGGC[:, 0], pooled], dim=-1)


def _check_connector(connector: str, width: int | None, tokenize: str) -> None:
    if connector not in get_args(Connector):
        raise ValueError(f"connector={connector!r} is unknown; choose one of {', '.join(get_args(Connector))}")
    if width is not None and (connector != "mlp" or width < 1):
        raise ValueError(f"connector_width={width} is the inner width of connector=mlp, 1 or more; leave it out")
    if connector != "table" and tokenize != "softmax":
        raise ValueError(f"connector={connector} has no visual words to choose by tokenize={tokenize}; leave it out")


def _baseline(connector: str, feature_dim: int, width: int, out_dim: int) -> nn.Sequential:
    """One linear layer, or two with GELU between them, with biases."""
    if connector == "linear":
        return nn.Sequential(nn.Linear(feature_dim, out_dim))
    return nn.Sequential(nn.Linear(feature_dim, width), nn.GELU(), nn.Linear(width, out_dim))


def _strided(grid_NGGF: Tensor, stride: int) -> Tensor:
    """Tokens [N, T, stride^2 * F] of neighbours side by side, rows first; zeros fill the grid right and below."""
    count, side, _, width = grid_NGGF.shape
    pad = -side % stride
    grid = F.pad(grid_NGGF, (0, 0, 0, pad, 0, pad)) if pad else grid_NGGF
    small = (side + pad) // stride
    blocks = grid.view(count, small, stride, small, stride, width).transpose(2, 3)
    return blocks.reshape(count, small**2, stride**2 * width)
