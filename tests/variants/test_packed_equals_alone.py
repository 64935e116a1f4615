"""Every variant: samples packed into rows give the logits, losses and gradients that each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Batch, Example, RegionKind, RegionRows, Slot
from bestiary.variants.monkey.model import build_monkey
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.sphinx_v.model import build_sphinx_v
from data_modules.collate import collate_rows
from tests.variants.sphinx_tiny import DECODER, VISION

Contents = Sequence[tuple[int, tuple[int, ...]]]
"""Of each sample: how many images, and the kinds of its prompts."""

PICTURES: Contents = [(1, ()), (0, ()), (2, ()), (1, ()), (0, ())]
PROMPTS: Contents = [
    (1, (RegionKind.POINT, RegionKind.BOX)),
    (0, ()),
    (1, (RegionKind.BOX,) * 4),
    (1, ()),
    (1, (RegionKind.POINT,)),
]


def sphinx() -> MultimodalLM:
    return build_sphinx(vision=VISION, decoder=DECODER)


def sphinx_v() -> MultimodalLM:
    return build_sphinx_v(vision=VISION, decoder=DECODER, prompt_dim=8, num_slots=3)


MONKEY_VISION: dict[str, Any] = {
    "image_px": 32, "window_px": 16, "patch_px": 8, "width": 16, "layers": 2, "heads": 2, "mlp_dim": 24,
    "num_queries": 4, "adapters": {"attention_rank": 2, "mlp_rank": 3, "dropout": 0.0},
}  # fmt: skip
MONKEY_DECODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 256,
}  # fmt: skip


def monkey() -> MultimodalLM:
    return build_monkey(vision=MONKEY_VISION, decoder=MONKEY_DECODER, decoder_lora={"rank": 2, "dropout": 0.0})


@dataclass(frozen=True)
class Variant:
    """A model with the samples it is given; rows, views and side: of one picture.

    dtype: float64 where a gradient is one number, in which the terms of a whole layer cancel.
    """

    build: Callable[[], MultimodalLM]
    contents: Contents
    rows: int = 126
    views: int = 3
    side: int = 48
    dtype: torch.dtype = torch.float32


VARIANTS = {
    "sphinx": Variant(sphinx, PICTURES),
    "sphinx_v": Variant(sphinx_v, PROMPTS),
    "monkey": Variant(monkey, PICTURES, rows=20, views=5, side=32, dtype=torch.float64),
}


def contents_of(name: str) -> Contents:
    return VARIANTS[name].contents


def example(name: str, number: int, images: int, kinds: tuple[int, ...]) -> Example:
    """BOS, pictures, prompts, a question, an answer of another length in every sample; every other has two answers."""
    variant, rng = VARIANTS[name], np.random.default_rng(number)
    text, answer = 3 + number, 2 + 2 * number
    slots = [Slot.TEXT] + [Slot.IMAGE] * (variant.rows * images)
    slots += [Slot.REGION] * (len(kinds) + 2 if kinds else 0) + [Slot.TEXT] * (text + answer)
    ids = rng.integers(3, DECODER["vocab_size"], len(slots))
    corners = np.sort(rng.random((len(kinds), 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    regions = RegionRows(corners, np.array(kinds, np.int64), np.ones(len(kinds), bool), np.array([len(kinds)]))
    before = len(ids) - np.arange(len(ids))
    is_taught = (before <= answer) | ((before > answer + text - 2) & (before <= answer + text) & (number % 2 == 1))
    return Example(
        ids=ids,
        labels=np.where(is_taught, ids, IGNORE),
        slots=np.array(slots, np.uint8),
        pixels=rng.integers(0, 256, (images, 3, variant.side, variant.side), dtype=np.uint8),
        regions=regions if kinds else None,
        num_views=variant.views * images,
        key=f"k{number}",
        source="s",
        domain="d",
    )


def packed(rows: list[list[Example]]) -> Batch:
    return collate_rows(rows)


def run(model: MultimodalLM, rows: list[list[Example]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and losses of every sample by its key; parameters keep the gradients of the summed losses."""
    batch = packed(rows)
    with torch.no_grad():
        logits = model.logits(batch)
    out = model(batch)
    out.values.sum().backward()
    spans = {s.key: logits[s.row, s.start : s.start + s.length] for s in batch.segments}
    return spans, {s.key: out.values[out.segment == n].detach() for n, s in enumerate(batch.segments)}


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_alone(name: str) -> None:
    torch.manual_seed(0)
    model = VARIANTS[name].build().to(VARIANTS[name].dtype).train()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)  # so that a wrong neighbour would be heard
    examples = [example(name, number, *content) for number, content in enumerate(contents_of(name))]

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    logits: dict[str, Tensor] = {}
    losses: dict[str, Tensor] = {}
    for each in examples:  # alone, gradients summed
        alone = run(model, [[each]])
        logits, losses = logits | alone[0], losses | alone[1]
    expected = gradients()
    assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    largest = max(value.abs().max().item() for value in logits.values())
    packings: list[list[list[Example]]] = [
        [examples],
        [examples[3:], examples[:3]],
        [[each] for each in examples[::-1]],
    ]
    for rows in packings:
        packed_logits, packed_losses = run(model, rows)
        for key in logits:
            assert (packed_logits[key] - logits[key]).abs().max().item() <= 1e-5 * largest, key
            assert torch.allclose(packed_losses[key], losses[key], rtol=1e-5, atol=1e-5), key
        found = gradients()
        assert found.keys() == expected.keys()
        for parameter_name, gradient in expected.items():
            difference = (found[parameter_name] - gradient).norm()
            assert difference <= 1e-5 * max(gradient.norm().item(), 1e-3), parameter_name
