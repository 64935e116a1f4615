"""Drawing tokens, and sequences that do not notice one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bestiary.language.attention import PackedLayout
from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.generation import Decoding, RaggedCache, Sampling, draw, sequence_generator

VOCAB = 50


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(llama_config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=512))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return decoder.eval()


def top_p_by_definition(probs: Tensor, top_p: float) -> Tensor:
    """The published rule, one token at a time."""
    kept, before = torch.zeros_like(probs), 0.0
    for token in probs.argsort(descending=True, stable=True).tolist():
        if before <= top_p:
            kept[token] = probs[token]
        before += probs[token].item()
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.6), (0.5, 0.95), (2.0, 0.05), (1.0, 1.0)])
def test_draws_follow_the_published_top_p_rule(temperature: float, top_p: float) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    expected = top_p_by_definition((logits[0].double() / temperature).softmax(-1), top_p)
    num = 4000
    generators = [sequence_generator(0, str(n)) for n in range(num)]
    tokens = draw(logits.expand(num, -1), Sampling(temperature, top_p), generators)
    shares = torch.bincount(tokens, minlength=12) / num
    assert not shares[expected == 0].any()
    assert (shares - expected).abs().max() < 0.03


def test_temperature_zero_takes_the_most_probable_and_draws_nothing() -> None:
    logits = torch.randn(3, 9)
    assert torch.equal(draw(logits, Sampling(), []), logits.argmax(-1))


def test_generators_differ_by_seed_key_and_occurrence() -> None:
    numbers = {
        torch.rand(1, generator=sequence_generator(seed, key, n)).item()
        for seed in (0, 1)
        for key in ("a", "b")
        for n in (0, 1)
    }
    assert len(numbers) == 8
    again = [torch.rand(1, generator=sequence_generator(3, "a")).item() for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(**bad)


@torch.no_grad()
def full_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits after the last of these tokens, without a cache."""
    x = decoder.embed(torch.tensor([ids]))
    return decoder.head(decoder(x, torch.arange(len(ids))[None])[0, -1])


@pytest.mark.slow
@torch.no_grad()
def test_a_long_ragged_batch_equals_recomputing_every_sequence_from_scratch(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths, budgets = [1, 4, 4, 9, 40], [90, 3, 150, 1, 20]
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    decoding = Decoding(
        decoder,
        decoder.embed(torch.tensor([[i for prompt in prompts for i in prompt]])),
        lengths,
        budgets=budgets,
        stop=[],
        sampling=Sampling(),
        generators=[torch.Generator()] * len(lengths),
    )
    outputs = decoding.run()
    assert [len(output) for output in outputs] == budgets
    for prompt, output in zip(prompts, outputs, strict=True):
        for n in {0, len(output) // 2, len(output) - 1}:
            logits = full_logits(decoder, prompt + output[:n])
            assert logits.max() - logits[output[n]] < 1e-4


@torch.no_grad()
def test_the_cache_gives_the_logits_of_a_full_pass_while_it_grows_and_shrinks(decoder: Decoder) -> None:
    lengths = [2, 5, 5, 11]
    total = sum(lengths)
    ids = torch.randint(0, VOCAB, (1, total), generator=torch.Generator().manual_seed(3))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    sequences = [ids[0, s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
    layout = PackedLayout.from_spans([(0, s, n) for s, n in zip(starts, lengths, strict=True)], (1, total))
    cache = RaggedCache(layout, num_new=3)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    decoder.run_packed(decoder.embed(ids), positions, layout, cache)
    rows = list(range(4))
    for step in range(70):
        if step == 30:
            rows = [1, 2]
            cache.keep(torch.tensor(rows))
            assert cache.length == 5 + 30
            assert cache.starts.tolist() == [0, 0]
        cache.advance()
        new = [(step * 7 + row) % VOCAB for row in rows]
        place = torch.tensor([[len(sequences[row])] for row in rows])
        hidden = decoder.run_step(decoder.embed(torch.tensor(new)[:, None]), place, cache)
        for row, token in zip(rows, new, strict=True):
            sequences[row].append(token)
        if step in (0, 29, 30, 69):
            for n, row in enumerate(rows):
                expected = full_logits(decoder, sequences[row])
                assert (decoder.head(hidden[n, 0]) - expected).abs().max() < 1e-4


def greedy_by_definition(
    decoder: Decoder, prompt: list[int], budget: int, stops: list[list[int]], min_new: int
) -> list[int]:
    """The most probable token of those that end no answer too early, one after the other."""
    output: list[int] = []
    while len(output) < budget:
        for token in full_logits(decoder, prompt + output).argsort(descending=True).tolist():
            longer = [*output, token]
            ended = [longer[: -len(stop)] for stop in stops if longer[-len(stop) :] == stop]
            if all(len(kept) >= min_new for kept in ended):
                break
        output = longer
        if ended:
            return min(ended, key=len)
    return output


@pytest.mark.parametrize("min_new", [1, 3])
@torch.no_grad()
def test_no_stop_ends_an_answer_before_its_shortest_length(decoder: Decoder, min_new: int) -> None:
    prompts = [[3, 4], [5, 6, 7, 8]]
    free = [greedy_by_definition(decoder, prompt, 6, [], 0) for prompt in prompts]
    for stop in ([[free[0][0]], [free[1][2]]], [free[0][:2], free[1][1:4]], [[free[0][3]], free[1][:1]]):
        decoding = Decoding(
            decoder, decoder.embed(torch.tensor([prompts[0] + prompts[1]])), [2, 4], budgets=[6, 6], stop=stop,
            sampling=Sampling(min_new=min_new), generators=[torch.Generator()] * 2,
        )  # fmt: skip
        told = decoding.run()
        assert told == [greedy_by_definition(decoder, prompt, 6, stop, min_new) for prompt in prompts]
        assert (told != free or min_new == 3) and all(len(output) >= min_new for output in told)
    with pytest.raises(ValueError, match="min_new_tokens=-1: give 0"):
        Sampling(min_new=-1)


def test_an_empty_stop_sequence_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="empty stop"):
        Decoding(
            decoder,
            torch.zeros(1, 1, 32),
            [1],
            budgets=[1],
            stop=[[]],
            sampling=Sampling(),
            generators=[],
        )
