"""The chunked product of words and table: equal to the plain one, and a fraction of its memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bestiary.variants.ovis.table import Choice, embed_words, embed_words_plainly

KINDS = ["softmax", "st_argmax", "gumbel_argmax"]


def inputs(dtype: torch.dtype = torch.float32, *, tokens: int = 37, words: int = 50) -> list[Tensor]:
    """Features, head, scale, shift and table of a small vocabulary."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, 12), (words, 12), (words,), (words,), (words, 8)]
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def results(function: Any, choice: Choice, leaves: list[Tensor]) -> list[Tensor]:
    """Values, then every gradient."""
    out = function(*leaves, choice)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_in_chunks_are_those_of_the_plain_product(kind: Any) -> None:
    noise = torch.randn(37, 50, generator=torch.Generator().manual_seed(2)) if kind == "gumbel_argmax" else None
    for chunk in (1, 7 * 50, 10**6):  # a token at a time, an uneven end, all at once
        choice = Choice(kind, tau=0.7, noise=noise, chunk_elements=chunk)
        ours, plain = (results(f, choice, inputs()) for f in (embed_words, embed_words_plainly))
        for name, x, y in zip(["value", "features", "head", "scale", "shift", "table"], ours, plain, strict=True):
            assert (x - y).abs().max() <= 1e-5 * max(1.0, y.abs().max().item()), f"{name} at chunk {chunk}"


def test_gradients_are_right_to_double_precision() -> None:
    leaves = inputs(torch.float64, tokens=5, words=9)
    choice = Choice("softmax", chunk_elements=18)
    assert torch.autograd.gradcheck(lambda *x: embed_words(*x, choice), leaves)


def test_the_noise_of_the_backward_pass_is_that_of_the_forward_pass() -> None:
    choice = Choice("gumbel_argmax", tau=0.5, seed=7, chunk_elements=6 * 50)
    ours, plain = (results(f, choice, inputs()) for f in (embed_words, embed_words_plainly))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(ours, plain, strict=True))
    other = embed_words(*inputs(), Choice("gumbel_argmax", tau=0.5, seed=8))
    assert not torch.equal(ours[0], other)


def test_only_asked_gradients_are_computed_and_frozen_weights_get_none() -> None:
    leaves = inputs()
    for frozen in leaves[1:]:
        frozen.requires_grad_(False)
    embed_words(*leaves, Choice()).sum().backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_autocast_gives_its_dtype_and_gradients_in_the_weights_own() -> None:
    leaves = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = embed_words(*leaves, Choice())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
    exact = embed_words(*inputs(), Choice())
    assert (out.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize("bad", [{"kind": "softmix"}, {"kind": "gumbel_argmax", "tau": 0.0}])
def test_unknown_ways_and_temperatures_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose one of softmax, gumbel_argmax, st_argmax|positive"):
        Choice(**bad)


MEMORY = """
import resource, sys, torch
from bestiary.variants.ovis import table
torch.set_num_threads(1)
shapes = [(2048, 16), (8192, 16), (8192,), (8192,), (8192, 16)]
leaves = [torch.randn(*s).requires_grad_() for s in shapes]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
# The share of a chunk in all tokens is that of 4,096 tokens, 131,072 words and the default chunk.
choice = table.Choice(chunk_elements=table.CHUNK_ELEMENTS // 32)
getattr(table, sys.argv[1])(*leaves, choice).sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_at_most_a_quarter_of_the_plain_products() -> None:
    peaks = {}
    for name in ("embed_words", "embed_words_plainly"):
        done = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout)
    assert 4 * peaks["embed_words"] <= peaks["embed_words_plainly"], peaks
