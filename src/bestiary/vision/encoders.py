"""The image encoders of the SPHINX family as thin adapters over transformers modules.

Each adapter takes normalised square views and gives tokens; it owns what the published checkpoints need and the
transformers class does not do by itself (which norm is applied where, which epsilon, how the position table is
resized). Everything that is a number is an argument. No adapter freezes itself: the model that owns it decides.

Facts come from the published code of LLaMA2-Accessory (commit 3777c43) and its libraries: open_clip 2.23 ViT-L-14,
timm ConvNeXt-XXL, facebookresearch DINOv2 ViT-g/14, transformers' BLIP-2.

Shape letters: N views, C channels, H W pixels, T tokens, G side of a token grid, P side of a position table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.convnext.configuration_convnext import ConvNextConfig
from transformers.models.convnext.modeling_convnext import ConvNextModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # DINOv2 preprocessing
IMAGENET_STD = (0.229, 0.224, 0.225)


def channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Three per-channel numbers, shaped to broadcast over NCHW pixels."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


def normalise(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Pixels as the CLIP family wants them: float32[N, 3, H, W].

    pixels_NCHW: uint8 RGB; a float tensor is taken as normalised already and returned as it is.
    """
    if pixels_NCHW.is_floating_point():
        return pixels_NCHW
    pixels = pixels_NCHW.to(torch.float32).div_(255)
    return pixels.sub_(channels(CLIP_MEAN, pixels)).div_(channels(CLIP_STD, pixels))


def clip_to_imagenet(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """CLIP-normalised pixels with ImageNet's statistics instead (DINOv2's input)."""
    rgb = pixels_NCHW * channels(CLIP_STD, pixels_NCHW) + channels(CLIP_MEAN, pixels_NCHW)
    return (rgb - channels(IMAGENET_MEAN, rgb)) / channels(IMAGENET_STD, rgb)


def grid_side(view_px: int, patch_px: int) -> int:
    """Patches along one side of a view; raises when they do not fit."""
    if patch_px <= 0 or view_px % patch_px:
        raise ValueError(f"view_px={view_px} is not a multiple of patch_px={patch_px}; choose sizes that divide")
    return view_px // patch_px


def vision_sizes(image_px: int, patch_px: int, width: int, layers: int, heads: int, mlp_dim: int) -> dict[str, Any]:
    """A vision transformer's sizes in the words of its transformers configuration, with the attention we compute."""
    return {
        "image_size": image_px,
        "patch_size": patch_px,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp_dim,
        "attn_implementation": "sdpa",
    }


class ClipTower(nn.Module):
    """The vision transformer of CLIP; gives all tokens after the last norm, without the final projection.

    activation: "gelu" is what the published SPHINX checkpoints were loaded with; "quick_gelu" is OpenAI's own.
    text: sizes (embed_dim, context, vocab, width) of the parts of the text side that published checkpoints carry
        along unused; they are kept frozen so that a checkpoint survives a round trip. None keeps nothing.
    """

    def __init__(
        self,
        *,
        view_px: int,
        patch_px: int,
        width: int,
        layers: int,
        heads: int,
        mlp_dim: int,
        activation: Literal["gelu", "quick_gelu"] = "gelu",
        text: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"clip activation {activation!r}: choose gelu or quick_gelu")
        self.num_tokens = grid_side(view_px, patch_px) ** 2 + 1
        self.out_dim = width
        config = CLIPVisionConfig(
            **vision_sizes(view_px, patch_px, width, layers, heads, mlp_dim), hidden_act=activation, layer_norm_eps=1e-5
        )
        self.tower = CLIPVisionModel(config)
        del self.tower.embeddings.position_ids  # unused here, and a buffer no checkpoint could fill after meta
        self.unused = _text_leftovers(width, **text) if text is not None else None

    def forward(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, T, C] with the class token first; views: CLIP-normalised."""
        embeddings = self.tower.embeddings
        weight = embeddings.patch_embedding.weight
        patches = embeddings.patch_embedding(views_NCHW.to(weight.dtype)).flatten(2).transpose(1, 2)
        first = embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        hidden = torch.cat([first, patches], dim=1) + embeddings.position_embedding.weight
        hidden = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(hidden)).last_hidden_state
        return self.tower.post_layernorm(hidden)  # type: ignore[no-any-return]


def _text_leftovers(vision_width: int, *, embed_dim: int, context: int, vocab: int, width: int) -> nn.ParameterDict:
    """Frozen stand-ins, under open_clip's names with dots as underscores."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_proj": (vision_width, embed_dim),
        "positional_embedding": (context, width),
        "text_projection": (width, embed_dim),
        "logit_scale": (),
        "token_embedding_weight": (vocab, width),
        "ln_final_weight": (width,),
        "ln_final_bias": (width,),
    }
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(s), requires_grad=False) for name, s in shapes.items()})


class ConvNextTower(nn.Module):
    """ConvNeXt's trunk with its head norm applied at every place of the map.

    depths, widths: blocks and channels of each stage; every stage after the first halves the map.
    """

    def __init__(self, *, input_px: int, depths: Sequence[int], widths: Sequence[int], stem_px: int = 4) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths:
            raise ValueError(f"convnext depths {list(depths)} and widths {list(widths)} must be of one length")
        stride = stem_px * 2 ** (len(depths) - 1)
        if input_px % stride:
            raise ValueError(f"convnext input_px={input_px} is not a multiple of its total stride {stride}")
        self.input_px = input_px
        self.map_side = input_px // stride
        self.out_dim = widths[-1]
        config = ConvNextConfig(
            patch_size=stem_px,
            num_stages=len(depths),
            hidden_sizes=list(widths),
            depths=list(depths),
            hidden_act="gelu",
            image_size=input_px,
        )
        self.tower = ConvNextModel(config)
        for module in self.tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5  # open_clip's convnext_xxlarge; transformers fixes the inner norms at 1e-6

    def forward(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, side, side, C]; views: CLIP-normalised, `input_px` square."""
        pixels = views_NCHW.to(self.tower.layernorm.weight.dtype)
        hidden = self.tower.embeddings(pixels)
        for stage in self.tower.encoder.stages:
            hidden = stage(hidden)
        return self.tower.layernorm(hidden.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class Dinov2Tower(nn.Module):
    """DINOv2's vision transformer; its position table is kept at its own size and resized to the views' grid.

    position_grid: side of the stored table (37 in the published weights: 518 px in patches of 14).
    position_offset: the published resize is by the factor (grid + 0.1) / 37 rather than to a size, which shifts the
        samples slightly; kept because the weights were used that way.
    """

    def __init__(
        self,
        *,
        view_px: int,
        patch_px: int,
        width: int,
        layers: int,
        heads: int,
        position_grid: int = 37,
        position_offset: float = 0.1,
        mlp_ratio: int = 4,
        swiglu: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid_side(view_px, patch_px)
        self.position_grid = position_grid
        self.position_offset = position_offset
        self.num_tokens = self.grid**2 + 1
        self.out_dim = width
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=position_grid * patch_px,
            patch_size=patch_px,
            mlp_ratio=mlp_ratio,
            use_swiglu_ffn=swiglu,
            attn_implementation="sdpa",
        )
        self.tower = Dinov2Model(config)
        self._table: tuple[tuple[object, ...], torch.Tensor] | None = None

    def position_table(self) -> torch.Tensor:
        """float[1, T, C]: the class position, then the table resized to the views' grid.

        The result is reused for as long as the stored table is neither changed nor learned.
        """
        stored = self.tower.embeddings.position_embeddings
        if torch.is_grad_enabled() and stored.requires_grad:
            return self._resize(stored)
        key = (stored.data_ptr(), stored._version, stored.device, stored.dtype)
        if self._table is None or self._table[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._table = (key, self._resize(stored))
        return self._table[1]

    def _resize(self, stored: torch.Tensor) -> torch.Tensor:
        if self.grid == self.position_grid:
            return stored
        side, width = self.position_grid, self.out_dim
        table = stored[:, 1:].float().reshape(1, side, side, width).permute(0, 3, 1, 2)
        factor = (self.grid + self.position_offset) / side
        table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic", antialias=False)
        assert table.shape[-1] == self.grid, f"a factor of {factor} gave {table.shape[-1]} cells, not {self.grid}"
        table = table.permute(0, 2, 3, 1).reshape(1, -1, width)
        return torch.cat([stored[:, :1], table.to(stored.dtype)], dim=1)

    def forward(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, T, C] with the class token first; views: ImageNet-normalised."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embeddings(views_NCHW)
        first = embeddings.cls_token.expand(patches.shape[0], -1, -1)
        hidden = torch.cat([first, patches], dim=1) + self.position_table()
        for layer in self.tower.encoder.layer:
            hidden = layer(hidden)
        return self.tower.layernorm(hidden)  # type: ignore[no-any-return]


class QFormerTower(nn.Module):
    """BLIP-2's vision transformer and the Q-Former that reads it with learned queries.

    vit: sizes (width, layers, heads, mlp_dim) of the vision transformer.
    cross_every: every how many Q-Former layers look at the image, starting with the first.
    """

    def __init__(
        self,
        *,
        view_px: int,
        patch_px: int,
        vit: Mapping[str, int],
        num_queries: int,
        width: int,
        layers: int,
        heads: int,
        mlp_dim: int,
        cross_every: int = 2,
    ) -> None:
        super().__init__()
        grid_side(view_px, patch_px)
        self.num_tokens = num_queries
        self.out_dim = width
        self.vision_model = Blip2VisionModel(_blip_vision_config(view_px, patch_px, **vit))
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp_dim,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=vit["width"],
            layer_norm_eps=1e-12,
            attn_implementation="sdpa",
        )
        self.qformer = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, width))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    def patches(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, T, C] of the vision transformer after its last norm, class token first."""
        hidden = self.vision_model.embeddings(views_NCHW)
        hidden = self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
        return self.vision_model.post_layernorm(hidden)  # type: ignore[no-any-return]

    def forward(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """float[N, num_queries, C]; views: CLIP-normalised (BLIP-2's statistics are the same numbers)."""
        image = self.patches(views_NCHW)
        model = self.qformer
        queries = model.dropout(model.layernorm(self.query_tokens)).expand(image.shape[0], -1, -1)
        out: Any = model.encoder(queries, encoder_hidden_states=image, query_length=self.num_tokens)
        return out.last_hidden_state  # type: ignore[no-any-return]


def _blip_vision_config(
    view_px: int, patch_px: int, *, width: int, layers: int, heads: int, mlp_dim: int
) -> Blip2VisionConfig:
    sizes = vision_sizes(view_px, patch_px, width, layers, heads, mlp_dim)
    return Blip2VisionConfig(**sizes, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
