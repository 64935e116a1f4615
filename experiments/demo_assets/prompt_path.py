"""The demo model taken apart as far as the prompt fit needs it, and pictures from which marks are drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestiary.language.attention import PackedLayout
from bestiary.mllm import MultimodalLM
from bestiary.schema import RegionKind, RegionRows
from bestiary.variants.sphinx.model import Features
from data_modules.embedded.scene import STRING_LETTERS

from .pictures import LENGTH, Pictures

NUM_SLOTS = 10


class Asked(nn.Module):
    """What a slot is asked; only the name and letter heads live on, as rows of the decoder's head."""

    def __init__(self, dim: int, num_names: int) -> None:
        super().__init__()
        self.names = nn.Linear(dim, num_names)
        self.letters = nn.Linear(dim, LENGTH * len(STRING_LETTERS))
        self.number = nn.Linear(dim, NUM_SLOTS)


@dataclass(frozen=True, slots=True)
class Marks:
    """Slots of N pictures: coords float32[N, NUM_SLOTS, 4] as in RegionRows; is_point, used: bool[N, NUM_SLOTS]."""

    coords: np.ndarray
    is_point: np.ndarray
    used: np.ndarray


class Marked:
    """Pictures with cached features, from which marks are drawn."""

    def __init__(self, pictures: Pictures, features: Features, seed: int) -> None:
        self.pictures, self.features = pictures, features
        self.counts, self.rng = pictures.counts, np.random.default_rng(seed)

    def coords(self, boxes: np.ndarray, is_point: np.ndarray) -> np.ndarray:
        """Region rows of things' boxes: a point in the middle half, or the box shaken a little."""
        size = boxes[..., 2:] - boxes[..., :2]
        point = boxes[..., :2] + size * self.rng.uniform(0.25, 0.75, size.shape)
        shaken = boxes + np.concatenate([size, size], -1) * self.rng.uniform(-0.12, 0.12, boxes.shape)
        point = np.concatenate([point, np.zeros_like(point)], -1)
        return np.where(is_point[..., None], point, shaken).astype(np.float32)

    def dense(self, rows: np.ndarray) -> tuple[np.ndarray, Marks]:
        """(thing of every slot [N, NUM_SLOTS], marks): one to ten marks, things may repeat."""
        shape = (len(rows), NUM_SLOTS)
        things = (self.rng.random(shape) * self.counts[rows][:, None]).astype(int)
        used = np.arange(NUM_SLOTS) < self.rng.integers(1, NUM_SLOTS + 1, (len(rows), 1))
        is_point = np.broadcast_to(self.rng.random((len(rows), 1)) < 1 / 3, shape)
        coords = self.coords(self.pictures.boxes[rows[:, None], things], is_point) * used[..., None]
        return things, Marks(coords, is_point, used)


class Fitter:
    """The model taken apart as far as the fit needs it."""

    def __init__(self, model: MultimodalLM) -> None:
        self.model = model
        self.vision: Any = model.vision
        self.inner: Any = model.decoder.model
        self.heads = int(self.inner.config.num_attention_heads)
        self.rows = int(self.vision.image_rows)
        self.first = 1 + self.rows + 1
        self.text = self.first + NUM_SLOTS + 1

    def embeds(self, data: Marked, rows: np.ndarray, marks: Marks) -> Tensor:
        """float[N, text, D]: BOS, image rows, prompt rows."""
        chosen = torch.from_numpy(rows)
        features = Features(data.features.queries[chosen].float(), data.features.tokens[chosen].float())
        kinds = np.where(marks.is_point, int(RegionKind.POINT), int(RegionKind.BOX)).reshape(-1)
        counts = torch.full((len(rows),), NUM_SLOTS)
        parts = (torch.from_numpy(x) for x in (marks.coords.reshape(-1, 4), kinds, marks.used.reshape(-1)))
        prompts = self.model.regions(RegionRows(*parts, counts))  # type: ignore[misc]
        begin = self.model.decoder.embed(torch.ones(len(rows), 1, dtype=torch.long))
        return torch.cat([begin, self.vision.project(features), prompts.reshape(len(rows), NUM_SLOTS + 2, -1)], dim=1)

    def attention(self, block: Any, hidden: Tensor, queries: slice) -> tuple[Tensor, Tensor]:
        """(causal attention logits [N, H, Q, T], values [N, H, T, d]) of a block for some positions."""
        length = hidden.shape[1]
        normed = block.input_layernorm(hidden)
        cos, sin = (t[:, None] for t in self.inner.rotary_emb(hidden, torch.arange(length)[None]))

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-b, a], dim=-1) * sin

        attn = block.self_attn
        keys = turned(heads(attn.k_proj(normed)), cos, sin)
        asked = turned(heads(attn.q_proj(normed[:, queries])), cos[:, :, queries], sin[:, :, queries])
        logits = asked @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        later = torch.arange(length) > torch.arange(length)[queries, None]
        return logits.masked_fill(later, -1e4), heads(attn.v_proj(normed))

    def slots_after_first_block(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(attention logits of the slots, slots after block 0)."""
        block, queries = self.inner.layers[0], slice(self.first, self.first + NUM_SLOTS)
        logits, values = self.attention(block, embeds, queries)
        mixed = (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)
        slots = embeds[:, queries] + block.self_attn.o_proj(mixed)
        return logits, slots + block.mlp(block.post_attention_layernorm(slots))

    def places(self, points: np.ndarray) -> list[Tensor]:
        """Where heads 0, 1, 2 should look, each float[N, 10, text]: cell, cells around, cell of the whole view."""
        grid = math.isqrt(self.vision.clip.num_tokens - 1)
        per_view, skip = self.vision.rows_per_view, 1 + 1 + self.vision.qformer.num_tokens + 1

        def put(out: np.ndarray, view: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
            at = (skip + per_view * view + y * grid + x)[..., None]
            np.put_along_axis(out, at, np.take_along_axis(out, at, -1) + weight[..., None], -1)

        def quarter(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return 1 + 2 * (y // grid) + x // grid, x % grid, y % grid

        cell, around, whole = (np.zeros((*points.shape[:2], self.text), np.float32) for _ in range(3))
        one = np.ones(points.shape[:2], np.float32)
        x, y = np.moveaxis((points * 2 * grid).clip(0, 2 * grid - 1).astype(int), -1, 0)
        put(cell, *quarter(x, y), one)
        x, y = np.moveaxis((points * grid).clip(0, grid - 1).astype(int), -1, 0)
        put(whole, np.zeros_like(x), x, y, one)
        low = np.floor(points * 2 * grid - 0.5)
        share = points * 2 * grid - 0.5 - low
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x, y = np.moveaxis((low + np.array([dx, dy])).clip(0, 2 * grid - 1).astype(int), -1, 0)
            weight = np.abs(1 - dx - share[..., 0]) * np.abs(1 - dy - share[..., 1])
            put(around, *quarter(x, y), weight)
        return [torch.from_numpy(place) for place in (cell, around, whole)]

    def hidden(self, embeds: Tensor) -> tuple[Tensor, ...]:
        """(decoder output, input of block 1, what its feed-forward part reads, its output), all [N, T, D]."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).reshape(embeds.shape))

        places = (self.inner.layers[1], self.inner.layers[1].mlp, self.inner.layers[2])
        hooks = [place.register_forward_pre_hook(keep, with_kwargs=True) for place in places]
        number, length = embeds.shape[:2]
        layout = PackedLayout.from_spans([(i, 0, length) for i in range(number)], (number, length), embeds.device)
        out = self.model.decoder(embeds, torch.arange(length).expand(number, length), layout=layout)
        for hook in hooks:
            hook.remove()
        return out, *kept


@torch.no_grad()
def features_of(model: MultimodalLM, pictures: Pictures) -> Features:
    """Frozen encoders' output for all pictures, in half precision."""
    vision: Any = model.vision
    parts = [
        vision.encode(torch.from_numpy(part).permute(0, 3, 1, 2))
        for part in np.array_split(pictures.pixels, max(1, len(pictures.pixels) // 50))
    ]
    return Features(torch.cat([p.queries.half() for p in parts]), torch.cat([p.tokens.half() for p in parts]))


def schedule(learned: list[nn.Parameter], lr: float, steps: int) -> Iterator[tuple[int, float]]:
    """Steps with AdamW, warm-up and cosine; the body leaves gradients behind."""
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        yield step, began
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
