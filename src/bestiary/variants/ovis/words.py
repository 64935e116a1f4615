"""What Ovis sees, in words: per patch the most probable visual words, their entropy, and the text nearest to them.

A visual word is a row of the table; the text token whose embedding points the same way says what it means to the
decoder, as far as one token can. Shape letters: T tokens of a canvas, V visual words without the marks, K words a
patch, D width of the decoder, U different words.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bestiary.mllm import MultimodalLM
from bestiary.schema import Processor, Sample, Turn
from bestiary.variants.ovis.canvas import PLANES
from bestiary.variants.ovis.visual_tokenizer import OvisVision

_INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that make no character."""
CHUNK = 1 << 25
"""Similarities held at a time, words x text tokens."""


@dataclass(frozen=True, slots=True)
class CanvasWords:
    """One canvas. rgb: uint8[S, S, 3], grey beside the picture. words, shares: [T, K], most probable first.

    entropy: float[T] in nats; side: patches each way. A class token, where the model keeps it, is left out.
    """

    rgb: np.ndarray
    words: np.ndarray
    shares: np.ndarray
    entropy: np.ndarray
    side: int

    def frequent(self) -> list[tuple[int, int, float]]:
        """(word, patches whose most probable word it is, its mean share there), most patches first."""
        counts = Counter(self.words[:, 0].tolist())
        means = {word: float(self.shares[self.words[:, 0] == word, 0].mean()) for word in counts}
        return sorted(((word, n, means[word]) for word, n in counts.items()), key=lambda item: (-item[1], -item[2]))


@dataclass(frozen=True, slots=True)
class PictureWords:
    """A picture's canvases, and of each word in them the nearest text tokens as (text, cosine)."""

    canvases: tuple[CanvasWords, ...]
    nearest: dict[int, tuple[tuple[str, float], ...]]
    num_words: int


@torch.no_grad()
def look(model: MultimodalLM, processor: Processor, image: bytes, *, top: int = 3, near: int = 3) -> PictureWords:
    """The visual words of one picture. top: words a patch; near: text tokens a word."""
    vision = model.vision
    if not isinstance(vision, OvisVision) or vision.connector != "table":
        raise ValueError("the model has no visual words; give a run of an Ovis with its table (connector=table)")
    num_words = vision.table.num_embeddings - vision.num_marks
    if not 1 <= top <= num_words:
        raise ValueError(f"top={top}: give 1 to {num_words}, the number of visual words")
    pixels = processor.prompt(Sample("words", "words", "", (Turn("human", "<image>"),), (image,))).pixels
    canvases = tuple(_canvas(vision, torch.from_numpy(one[None]).to(model.device), top) for one in pixels)
    seen = sorted({int(word) for canvas in canvases for word in np.unique(canvas.words)})
    return PictureWords(canvases, _named(model, processor, vision, seen, near), num_words)


def nearest_tokens(rows_UD: Tensor, embeddings_VD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Token ids int64[U, count] and cosines of the embeddings that point most nearly as each row, the nearest first."""
    rows = F.normalize(rows_UD.float(), dim=-1)
    best = rows.new_empty(len(rows), 0)
    ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    size = max(1, CHUNK // max(1, len(rows)))
    for start in range(0, len(embeddings_VD), size):
        part = F.normalize(embeddings_VD[start : start + size].float(), dim=-1)
        numbers = torch.arange(start, start + len(part), device=rows.device).expand(len(rows), -1)
        scores, ids = torch.cat([best, rows @ part.T], dim=1), torch.cat([ids, numbers], dim=1)
        best, where = scores.topk(min(count, scores.shape[1]))
        ids = ids.gather(1, where)
    return ids, best


def lines(found: PictureWords, *, limit: int = 20) -> list[str]:
    """The words of every canvas for a terminal, most frequent first."""
    told = []
    for number, canvas in enumerate(found.canvases, 1):
        mean, most = float(canvas.entropy.mean()), math.log(found.num_words)
        frequent = canvas.frequent()
        told.append(
            f"canvas {number}: {canvas.side} x {canvas.side} patches, {len(frequent)} different words, "
            f"mean entropy {mean:.2f} of at most {most:.2f} nats"
        )
        told += [f"  {word_line(found, *item)}" for item in frequent[:limit]]
        if len(frequent) > limit:
            told.append(f"  and {len(frequent) - limit} more")
    return told


def word_line(found: PictureWords, word: int, patches: int, share: float) -> str:
    """One word: how often it is the most probable one, how probable then, and the text near it."""
    near = ", ".join(f"{shown(text)} {cosine:.2f}" for text, cosine in found.nearest[word])
    return f"word {word}: {patches} patch{'es' if patches > 1 else ''}, {share:.0%}; near {near}"


def shown(text: str) -> str:
    """A token's text in quotes, in characters that every font has; a number stands for itself (`_text`)."""
    return text if text.startswith("<#") else json.dumps(text)


def _canvas(vision: OvisVision, pixels: Tensor, top: int) -> CanvasWords:
    probabilities = vision.probabilities(vision.features(pixels))[0, -_patches(vision) :]
    shares, words = probabilities.topk(top)
    planes = pixels[0, :PLANES].cpu().numpy()
    rgb = np.where(planes[3:] > 0, planes[:3], 128).astype(np.uint8).transpose(1, 2, 0)
    entropy = torch.special.entr(probabilities.double()).sum(-1)
    numbers = (words.cpu().numpy(), shares.float().cpu().numpy(), entropy.cpu().numpy())
    return CanvasWords(rgb, *numbers, math.isqrt(_patches(vision)))


def _patches(vision: OvisVision) -> int:
    return int(vision.image_rows) - vision.keep_class


def _named(
    model: MultimodalLM, processor: Processor, vision: OvisVision, words: Sequence[int], count: int
) -> dict[int, tuple[tuple[str, float], ...]]:
    rows = vision.table.weight[torch.tensor(words, device=vision.table.weight.device)]
    # Spare rows of the decoder have no text.
    embeddings = model.decoder.model.get_input_embeddings().weight[: processor.tokenizer.vocab_size]  # type: ignore
    ids, cosines = nearest_tokens(rows, embeddings, count)
    texts = [[_text(processor, token) for token in row] for row in ids.tolist()]
    pairs = (tuple(zip(text, cosine, strict=True)) for text, cosine in zip(texts, cosines.tolist(), strict=True))
    return dict(zip(words, pairs, strict=True))


def _text(processor: Processor, token: int) -> str:
    """A token's own text, outer spaces kept; its number where it is a control token or no whole character."""
    text = str(processor.tokenizer.decode([token]))  # type: ignore[attr-defined]
    return text if text.replace(_INCOMPLETE, "") else f"<#{token}>"
