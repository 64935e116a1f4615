"""Softmax times table: what a visual token means, without its probabilities ever standing in memory all at once.

A visual token is a distribution over the visual vocabulary, and its embedding the mean of the table's rows under it
(reference/ovis.md, sections 1.2 and 1.3). For a page of tokens that distribution is the largest tensor of the whole
model, several times over: the product here goes in chunks of tokens, from the features to the embeddings, keeps the
features alone and computes each chunk again in the backward pass.

Shape letters: K tokens, F width of the features, V visual words without the marks, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bestiary.variants.ovis.usage import WordUsage

Tokenize = Literal["softmax", "gumbel_argmax", "st_argmax"]
CHUNK_ELEMENTS = 1 << 25
"""Elements of one chunk of logits, tokens x words (128 MB in float32)."""
NORM_EPS = 1e-5
"""torch's default for LayerNorm, which the published head keeps (section 1.1)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How logits become a choice of words.

    kind: "softmax" takes the mean of the rows; "st_argmax" the most probable row, its gradient going to the LOGITS as
        they are (no softmax in between, as published); "gumbel_argmax" the best row after noise, its gradient that of
        the softmax of noisy logits over `tau`.
    tau: temperature of gumbel_argmax alone; softmax never has one.
    seed: of the noise; None for no noise. noise: float[K, V] instead of noise drawn here. usage: counts the words that
    the forward pass chooses.
    """

    kind: Tokenize = "softmax"
    tau: float = 1.0
    seed: int | None = None
    noise: Tensor | None = None
    chunk_elements: int = CHUNK_ELEMENTS
    usage: WordUsage | None = None

    def __post_init__(self) -> None:
        check_tokenize(self.kind)
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau}: the temperature of gumbel_argmax is a positive number")

    def relaxed(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The scores that gradients go through, of the shape of the logits."""
        if self.kind == "softmax":
            return logits.softmax(-1)
        if self.kind == "st_argmax":
            return logits
        return ((logits if noise is None else logits + noise) / self.tau).softmax(-1)

    def pieces(self, features_KF: Tensor, num_words: int) -> Iterator[tuple[slice, Tensor | None]]:
        """The chunks of the tokens, each with its noise; the same whenever asked."""
        size = max(1, self.chunk_elements // num_words)
        device = features_KF.device
        draw = self.kind == "gumbel_argmax" and self.noise is None and self.seed is not None
        generator = torch.Generator(device).manual_seed(self.seed or 0) if draw else None
        for start in range(0, len(features_KF), size):
            part = slice(start, min(start + size, len(features_KF)))
            noise = None if self.noise is None else self.noise[part]
            if generator is not None:
                shape = (part.stop - part.start, num_words)
                noise = -torch.empty(shape, device=device).exponential_(generator=generator).log()
            yield part, noise


def check_tokenize(kind: str) -> None:
    """Raise for a way to choose words that there is not."""
    if kind not in get_args(Tokenize):
        raise ValueError(f"tokenize={kind!r} is unknown; choose one of {', '.join(get_args(Tokenize))}")


def word_logits(features: Tensor, head_VF: Tensor, scale_V: Tensor, shift_V: Tensor) -> Tensor:
    """Logits [..., V]: a linear layer without bias, then a norm over the vocabulary."""
    return _normed(features @ head_VF.T, scale_V, shift_V)


def embed_words(
    features_KF: Tensor, head_VF: Tensor, scale_V: Tensor, shift_V: Tensor, table_VD: Tensor, choice: Choice
) -> Tensor:
    """Embeddings [K, D] of visual tokens, in the dtype of the features or of autocast.

    Values and gradients are those of `relaxed(word_logits(...)) @ table` (for the argmaxes: of its straight-through
    form), up to rounding.
    """
    device = features_KF.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features_KF.dtype
    with torch.autocast(device, enabled=False):
        parts = (features_KF.to(dtype), head_VF.to(dtype), scale_V, shift_V, table_VD.to(dtype))
        embeds: Tensor = _Product.apply(*parts, choice)  # type: ignore[no-untyped-call]
    return embeds


def embed_words_plainly(
    features_KF: Tensor, head_VF: Tensor, scale_V: Tensor, shift_V: Tensor, table_VD: Tensor, choice: Choice
) -> Tensor:
    """The same with everything in memory at once: what `embed_words` is measured against."""
    logits = word_logits(features_KF, head_VF, scale_V, shift_V)
    noise = [noise for _, noise in choice.pieces(features_KF, logits.shape[-1])]
    scores = choice.relaxed(
        logits, None if not noise or noise[0] is None else torch.cat([n for n in noise if n is not None])
    )
    if choice.kind != "softmax":
        one_hot = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        scores = one_hot - scores.detach() + scores
    return scores @ table_VD


class _Product(torch.autograd.Function):
    """`embed_words` on tensors of one dtype; the norm and the softmax run in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, head: Tensor, scale: Tensor, shift: Tensor, table: Tensor, choice: Choice
    ) -> Tensor:
        """Chunk after chunk; only the inputs are kept."""
        out = features.new_empty(len(features), table.shape[1])
        for part, noise in choice.pieces(features, len(head)):
            logits = _normed(features[part] @ head.T, scale, shift)
            scores = choice.relaxed(logits, noise)
            if choice.usage is not None:
                choice.usage.add(scores if choice.kind == "softmax" else logits.softmax(-1))
            out[part] = scores.to(table.dtype) @ table if choice.kind == "softmax" else table[scores.argmax(-1)]
        ctx.save_for_backward(features, head, scale, shift, table)
        ctx.choice = choice
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Every chunk again, its part of each gradient added in place."""
        features, head, scale, shift, table = ctx.saved_tensors
        choice, grad_out, wanted = ctx.choice, grads[0], ctx.needs_input_grad
        sums = [torch.zeros_like(x) if need else None for x, need in zip(ctx.saved_tensors, wanted, strict=False)]
        for part, noise in choice.pieces(features, len(head)):
            leaves = [features[part] @ head.T, scale.detach(), shift.detach()]
            with torch.enable_grad():
                leaves = [leaf.requires_grad_() for leaf in leaves]
                scores = choice.relaxed(_normed(*leaves), noise)
            _add_table_grad(sums[4], scores.detach(), grad_out[part], choice)
            if not any(wanted[:4]):
                continue
            grad_scores = (grad_out[part] @ table.T).to(scores.dtype)
            words, *norm = torch.autograd.grad(scores, leaves, grad_scores)
            for total, grad in zip(sums[2:4], norm, strict=True):
                if total is not None:
                    total += grad
            if sums[1] is not None:
                sums[1].addmm_(words.T, features[part])
            if sums[0] is not None:
                sums[0][part] = words @ head
        return (*sums, None)


def _add_table_grad(total: Tensor | None, scores: Tensor, grad_out: Tensor, choice: Choice) -> None:
    """Adds a chunk's gradient of the table: of all rows by their share, or of the chosen ones."""
    if total is None:
        return
    if choice.kind == "softmax":
        total.addmm_(scores.to(total.dtype).T, grad_out)
    else:
        total.index_add_(0, scores.argmax(-1), grad_out)


def _normed(words: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm over the vocabulary, in float32 at least."""
    dtype = torch.promote_types(words.dtype, torch.float32)
    return F.layer_norm(words.to(dtype), words.shape[-1:], scale.to(dtype), shift.to(dtype), NORM_EPS)
