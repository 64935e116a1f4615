"""Beam search: transformers' own ids, and prompts that do not notice one another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bestiary.language.beams import BeamDecoding
from bestiary.language.decoder import Decoder, llama_config

VOCAB, LENGTHS = 40, (3, 5, 5, 9)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(llama_config(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=256))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return decoder.eval()


@pytest.fixture(scope="module")
def prompts(decoder: Decoder) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, decoder.dim) for length in LENGTHS]


@torch.no_grad()
def published(decoder: Decoder, prompt: Tensor, beams: int, budget: int, eos: list[int], min_new: int = 0) -> list[int]:
    """transformers' answer, without the end."""
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(decoder.state_dict())
    ids = model.generate(
        inputs_embeds=prompt[None], num_beams=beams, max_new_tokens=budget, do_sample=False, eos_token_id=eos,
        pad_token_id=0, attention_mask=torch.ones(1, len(prompt)), min_new_tokens=min_new,
    )[0].tolist()  # fmt: skip
    ends = [place for place, token in enumerate(ids) if token in eos]
    return ids[: ends[0]] if ends else ids


@torch.no_grad()
def ours(
    decoder: Decoder, prompts: list[Tensor], beams: int, budgets: list[int], stop: list[list[int]], **rest: Any
) -> list[list[int]]:
    lengths = [len(prompt) for prompt in prompts]
    asked = {"num_beams": beams, "budgets": budgets, "stop": stop, **rest}
    return BeamDecoding(decoder, torch.cat(prompts)[None], lengths, **asked).run()


@pytest.mark.parametrize("beams", [2, 3, 7])
@pytest.mark.parametrize("eos", [[5], [5, 11, 29]])
def test_ragged_prompts_get_the_ids_that_transformers_finds_for_each_alone(
    decoder: Decoder, prompts: list[Tensor], beams: int, eos: list[int]
) -> None:
    found = ours(decoder, prompts, beams, [12] * len(prompts), [[token] for token in eos])
    expected = [published(decoder, prompt, beams, 12, eos) for prompt in prompts]
    assert found == expected
    if len(eos) == 3:
        assert any(len(ids) < 12 for ids in found), "no answer ended: the case shows nothing"


def test_an_end_that_is_not_among_the_best_continuations_ends_nothing(decoder: Decoder, prompts: list[Tensor]) -> None:
    eos = [10, 20, 21, 25, 26, 32, 33, 37]
    found = ours(decoder, prompts[1:2], 2, [12], [[token] for token in eos])
    assert found == [published(decoder, prompts[1], 2, 12, eos)] and len(found[0]) == 12


def test_no_hypothesis_ends_before_the_shortest_length(decoder: Decoder, prompts: list[Tensor]) -> None:
    eos = sorted({token for ids in ours(decoder, prompts[:2], 3, [8] * 2, []) for token in ids})
    short, found = (ours(decoder, prompts[:2], 3, [8] * 2, [[token] for token in eos], min_new=n) for n in (0, 5))
    assert found == [published(decoder, prompt, 3, 8, eos, min_new=5) for prompt in prompts[:2]]
    assert min(map(len, short)) < 5 <= min(map(len, found)) < 8


@torch.no_grad()
def score(decoder: Decoder, prompt: Tensor, ids: list[int]) -> float:
    """Mean log-probability of an answer, by one forward over all of it."""
    embeds = torch.cat([prompt, decoder.embed(torch.tensor(ids))])[None]
    hidden = decoder(embeds, torch.arange(embeds.shape[1])[None])
    told = decoder.head(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(told.gather(1, torch.tensor(ids)[:, None]).mean())


def test_logits_that_are_no_numbers_are_one_line_of_error(decoder: Decoder, prompts: list[Tensor]) -> None:
    broken = [prompts[0], torch.full_like(prompts[1], torch.nan)]
    with pytest.raises(ValueError, match=r"logits are not numbers \(NaN\)"), torch.no_grad():
        ours(decoder, broken, 3, [4, 4], [[5]])


def test_more_beams_find_answers_that_are_more_probable_than_the_greedy_one(
    decoder: Decoder, prompts: list[Tensor]
) -> None:
    budget = 10
    one = ours(decoder, prompts, 1, [budget] * 4, [])
    many = ours(decoder, prompts, 8, [budget] * 4, [])
    better = [score(decoder, p, b) - score(decoder, p, a) for p, a, b in zip(prompts, one, many, strict=True)]
    assert min(better) >= -1e-6 and max(better) > 1e-3


def test_a_prompt_has_its_own_budget_and_answer_whatever_its_neighbours(
    decoder: Decoder, prompts: list[Tensor]
) -> None:
    budgets, stop = [2, 9, 4, 12], [[5], [11, 3]]
    together = ours(decoder, prompts, 3, budgets, stop)
    alone = [ours(decoder, [p], 3, [b], stop)[0] for p, b in zip(prompts, budgets, strict=True)]
    assert together == alone
    assert all(len(ids) <= budget for ids, budget in zip(together, budgets, strict=True))


def test_stops_of_several_tokens_are_cut_off_and_texts_that_end_answers_are_kept(
    decoder: Decoder, prompts: list[Tensor]
) -> None:
    free = ours(decoder, prompts, 2, [8] * 4, [])
    pair = free[0][2:4]
    cut = ours(decoder, prompts, 2, [8] * 4, [pair])
    assert all(ids[i : i + 2] != pair for ids in cut for i in range(len(ids)))
    ended = ours(decoder, prompts, 2, [8] * 4, [], ends=lambda ids: len(ids) == 3)
    assert [len(ids) for ids in ended] == [3] * 4


def test_a_vocabulary_smaller_than_the_beams_is_no_obstacle() -> None:
    torch.manual_seed(0)
    tiny = Decoder(llama_config(dim=8, n_layers=1, n_heads=2, vocab_size=3, max_seq_len=32)).eval()
    [ids] = ours(tiny, [torch.randn(2, 8)], 6, [4], [[2]])
    assert set(ids) <= {0, 1}
