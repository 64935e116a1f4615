"""A training step as Monkey's published loop takes it, in our words, on our layers and kernels.

Ported are the things that cost it time (Yuliang-Liu/Monkey @ c7341cd; reference/monkey.md, sections 1.1, 1.5, 3.1
and 3.2): rows are filled up to the maximum length, pictures are opened, resized and normalised inside the forward pass,
each window and the whole go through the encoder in a call of their own, and logits are made of every position. As
launched (3.1) a device takes one row at a time, sixteen for a step, and recomputes the decoder's blocks.
Layers, attention kernels and the optimiser are ours, which is better than the original has it.

Shape letters: N pictures, T positions of a row (or tokens of a view), C width of the encoder, D of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bestiary.language.attention import PackedLayout
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Slot
from bestiary.variants.monkey.model import MonkeyVision
from bestiary.variants.monkey.vit import VitBlock
from bestiary.vision.encoders import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class PaddedRow:
    """A sample as the published loader keeps it after its first use: ids filled up, and where its picture's file is."""

    ids: np.ndarray
    labels: np.ndarray
    slots: np.ndarray
    pictures: tuple[Path, ...]


def summed_loss(model: MultimodalLM, rows: Sequence[PaddedRow]) -> Tensor:
    """The summed loss of a batch's learned tokens, through logits of every position."""
    ids, labels, slots = (torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in _FIELDS)
    embeds = model.decoder.embed(ids)
    pictures = encode(cast(MonkeyVision, model.vision), [path for row in rows for path in row.pictures])
    embeds = embeds.masked_scatter((slots == Slot.IMAGE)[..., None], pictures)
    layout = PackedLayout.from_spans([(n, 0, ids.shape[1]) for n in range(len(rows))], tuple(ids.shape), ids.device)
    positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
    logits = model.decoder.head(model.decoder(embeds, positions, layout=layout)).float()
    ahead, told = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    return F.cross_entropy(ahead.flatten(0, 1), told.flatten(), ignore_index=IGNORE, reduction="sum")


_FIELDS = ("ids", "labels", "slots")


def encode(vision: MonkeyVision, files: Sequence[Path]) -> Tensor:
    """Rows of all pictures [N, R, D]: files to pixels, then window by window, the whole last."""
    pixels = torch.stack([_normalised(file, vision.height_px, vision.width_px) for file in files])
    side, rows = vision.window_px, []
    for top in range(0, vision.height_px - side + 1, side):
        for left in range(0, vision.width_px - side + 1, side):
            window = pixels[:, :, top : top + side, left : left + side]
            rows.append(_view(vision, window, adapter=len(rows)))
    whole = F.interpolate(pixels, size=(side, side), mode="bicubic")
    return torch.cat([*rows, _view(vision, whole, adapter=None)], dim=1)


def _normalised(file: Path, height: int, width: int) -> Tensor:
    """float[3, height, width]."""
    with Image.open(file) as opened:
        squashed = opened.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _view(vision: MonkeyVision, pixels_N3SS: Tensor, *, adapter: int | None) -> Tensor:
    """One view of all pictures, [N, Q, D]: encoder, resampler, last norm and projection."""
    tokens = vision.vit.first_tokens(pixels_N3SS[None])[0]
    for block in vision.vit.blocks:
        tokens = _block(cast(VitBlock, block), tokens, adapter)
    return cast(Tensor, vision.ln_post(vision.resampler(tokens))) @ vision.proj


def _block(block: VitBlock, x_NTC: Tensor, adapter: int | None) -> Tensor:
    def beside(adapters: Any, inputs: Tensor) -> Tensor | float:
        return 0.0 if adapter is None else cast(Tensor, adapters[adapter](inputs))

    attn, normed = block.attn, block.ln_1(x_NTC)
    projected = attn.in_proj(normed) + beside(attn.in_proj_lora, normed)
    count, length, width = x_NTC.shape
    heads = projected.view(count, length, attn.heads, 3 * width // attn.heads).transpose(1, 2)
    seen = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1)).transpose(1, 2).reshape(count, length, width)
    x_NTC = x_NTC + attn.out_proj(seen) + beside(attn.out_proj_lora, seen)
    return x_NTC + block.mlp(block.ln_2(x_NTC)) + beside(block.mlp_lora, x_NTC)
