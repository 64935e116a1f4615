"""Three ways to answer the same prompts greedily with the same weights: what each generates, and in how many passes.

All use the same layers, kernels and cache, so that they differ in the algorithm alone.

Shape letters: B prompts, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bestiary.language.attention import PackedLayout
from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.generation import RaggedCache
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Example

Prompts = Sequence[Sequence[int]]


def text_model(*, dim: int, layers: int, vocab: int, positions: int, seed: int = 0) -> MultimodalLM:
    """An untrained LLaMA without pictures, its output layer sharpened so that no two tokens are nearly even."""
    torch.manual_seed(seed)
    sizes = {"dim": dim, "n_layers": layers, "n_heads": dim // 64 or 1, "vocab_size": vocab, "max_seq_len": positions}
    model = MultimodalLM(Decoder(llama_config(**sizes))).eval()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(8)  # type: ignore[operator]
    return model


def random_prompts(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, each id equally likely."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, size=length).tolist() for length in lengths]


def ours(model: MultimodalLM, prompts: Prompts, num_new: int) -> list[list[int]]:
    """All prompts prefilled as one packed row, then one pass a new token for all of them."""
    return model.generate([_example(ids, str(n)) for n, ids in enumerate(prompts)], max_new_tokens=num_new)


def one_by_one(model: MultimodalLM, prompts: Prompts, num_new: int) -> list[list[int]]:
    """Every prompt alone: no pass is shared."""
    return [ours(model, [prompt], num_new)[0] for prompt in prompts]


@torch.no_grad()
def shortest_first(model: MultimodalLM, prompts: Prompts, num_new: int) -> list[list[int]]:
    """The references' batch algorithm (LLaMA2-Accessory accessory/model/meta.py @ 3777c43, `MetaModel.generate`).

    Rows are filled up on the right. The first pass reads as much as the shortest prompt has; from there on every pass
    reads one column, where a row that still has words of its prompt takes those and the others take what was generated.
    It ends `num_new` columns after the longest prompt. What rows got beyond `num_new` is cut off here.
    """
    decoder = model.decoder
    lengths = [len(prompt) for prompt in prompts]
    first, total = min(lengths), max(lengths) + num_new
    tokens = torch.zeros(len(prompts), total, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    is_given = torch.arange(total) < torch.tensor(lengths)[:, None]
    logits, cache = _read_start(decoder, tokens[:, :first], room=total)
    for column in range(first, total):
        tokens[:, column] = torch.where(is_given[:, column], tokens[:, column], logits.argmax(-1))
        if column + 1 < total:
            cache.advance()
            positions = torch.full((len(prompts), 1), column)
            hidden = decoder.run_step(decoder.embed(tokens[:, column, None]), positions, cache)
            logits = decoder.head(hidden[:, 0]).float()
    return [row[n : n + num_new] for row, n in zip(tokens.tolist(), lengths, strict=True)]


@contextmanager
def counted_passes(model: MultimodalLM) -> Iterator[list[int]]:
    """Counts how often the decoder's layers run: the list grows by one entry (rows of the pass) each time."""
    passes: list[int] = []
    hook = model.decoder.model.register_forward_pre_hook(
        lambda _module, _args, given: passes.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()


def _read_start(decoder: Decoder, tokens_BT: Tensor, *, room: int) -> tuple[Tensor, RaggedCache]:
    """Logits [B, V] after rows of one length, and their cache with room for all that will come."""
    rows, width = tokens_BT.shape
    spans = [(row, 0, width) for row in range(rows)]
    layout = PackedLayout.from_spans(spans, (rows, width), tokens_BT.device)
    cache = RaggedCache(layout, 0)
    cache.capacity = room
    positions = torch.arange(width).expand(rows, -1)
    hidden = decoder.run_packed(layout.pack(decoder.embed(tokens_BT)), layout.pack(positions), layout, cache)
    return decoder.head(layout.unpack(hidden)[:, -1]).float(), cache


def _example(ids: Sequence[int], key: str) -> Example:
    return Example(
        ids=np.array(ids, dtype=np.int64),
        labels=np.full(len(ids), IGNORE, dtype=np.int64),
        slots=np.zeros(len(ids), dtype=np.uint8),
        pixels=np.zeros((0, 3, 1, 1), dtype=np.uint8),
        regions=None,
        num_views=0,
        key=key,
        source="bench",
        domain="",
    )
