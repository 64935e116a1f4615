"""The decoder: packed rows equal samples alone, whatever the packing, the language model or the checkpointing."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from bestiary.language.attention import PackedLayout, check_attention, resolve_attention
from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.generation import RaggedCache

SHARED: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHARED),
    "qwen2": Qwen2Config(**SHARED),
    "qwen3": Qwen3Config(**SHARED, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SHARED, sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
}
ROWS = [[7, 5, 5, 9], [30], [9, 7, 7], [1, 29]]
"""Lengths of the segments of four rows; the first and the third are padded to 30."""


def build(config: PretrainedConfig, **kwargs: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config, **kwargs).eval()
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def packed_rows(width: int = 30) -> tuple[Tensor, Tensor]:
    """positions and segment ids, int64[B, T]."""
    positions, segments = torch.zeros(len(ROWS), width, dtype=torch.int64), torch.zeros(len(ROWS), width).long()
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, start : start + length] = torch.arange(length)
            segments[row, start : start + length] = number
            start += length
    return positions, segments


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_segments_equal_each_alone(name: str) -> None:
    decoder = build(CONFIGS[name])
    positions, segments = packed_rows()
    ids = torch.randint(0, 70, positions.shape, generator=torch.Generator().manual_seed(3))
    weights = torch.randn(*ids.shape, 70, generator=torch.Generator().manual_seed(4))
    logits = decoder.head(decoder(decoder.embed(ids), positions, segments))
    (logits * weights * (segments > 0)[..., None]).sum().backward()
    packed_grads = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    worst = 0.0
    for row, lengths in enumerate(ROWS):
        for number in range(1, len(lengths) + 1):
            here = segments[row] == number
            own = ids[row][here][None]
            alone = decoder.head(decoder(decoder.embed(own), torch.arange(own.shape[1])[None]))
            worst = max(worst, (alone[0] - logits[row][here]).abs().max().item())
            (alone[0] * weights[row][here]).sum().backward()
    assert worst <= 1e-5 * logits.abs().max().item(), worst
    assert packed_grads
    for n, p in decoder.named_parameters():
        assert p.grad is not None
        assert (p.grad - packed_grads[n]).norm() <= 1e-5 * p.grad.norm(), n


def test_packed_llama_logits_differ_by_less_than_a_hundred_thousandth_and_padding_is_zero() -> None:
    decoder = build(llama_config(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=70, max_seq_len=64))
    positions, segments = packed_rows()
    embeds = torch.randn(*positions.shape, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        hidden = decoder(embeds, positions, segments)
        embeds[0, :7] += 1.0  # another sample of the row changes
        changed = decoder(embeds, positions, segments)
    assert not hidden[segments == 0].any()
    assert torch.equal(hidden[0, 7:], changed[0, 7:])
    assert torch.equal(hidden[1:], changed[1:])
    assert not torch.equal(hidden[0, :7], changed[0, :7])


def test_layout_groups_equal_lengths_and_leaves_full_rows_where_they_are() -> None:
    _, segments = packed_rows()
    layout = PackedLayout.from_segment_ids(segments)
    assert layout.groups == ((1, 1), (2, 5), (3, 7), (2, 9), (1, 29), (1, 30))
    assert layout.cu_seqlens.tolist() == [0, 1, 6, 11, 18, 25, 32, 41, 50, 79, 109]
    x = torch.randn(4, 30, 3)
    assert torch.equal(layout.unpack(layout.pack(x)), x * (segments > 0)[..., None])
    whole = PackedLayout.from_segment_ids(torch.ones(4, 30, dtype=torch.int32))
    assert whole.groups == ((4, 30),)
    assert whole.order is None
    assert whole.pack(x).data_ptr() == x.data_ptr()
    spans = [(r, s, n) for r, lengths in enumerate(ROWS) for s, n in zip(_starts(lengths), lengths, strict=True)]
    again = PackedLayout.from_spans(spans, (4, 30))
    assert again.order is not None
    assert layout.order is not None
    assert torch.equal(again.order, layout.order)


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths))]


def test_rows_of_padding_only_pass() -> None:
    decoder = build(CONFIGS["llama"])
    embeds = torch.randn(2, 3, 32, requires_grad=True)
    hidden = decoder(embeds, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    assert hidden.shape == embeds.shape
    assert not hidden.any()
    hidden.sum().backward()


def test_activation_checkpointing_changes_no_gradient() -> None:
    positions, segments = packed_rows()
    embeds = torch.randn(*positions.shape, 32, generator=torch.Generator().manual_seed(5))
    grads = []
    for is_on in (False, True):
        decoder = build(CONFIGS["llama"], activation_checkpointing=is_on).train()
        calls: list[int] = []
        decoder.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[index,union-attr]
        decoder(embeds, positions, segments).square().sum().backward()
        assert len(calls) == 1 + is_on
        grads.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_a_13b_decoder_builds_on_the_meta_device_in_seconds_and_can_be_filled() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        decoder = Decoder(
            llama_config(dim=5120, n_layers=40, n_heads=40, vocab_size=32000, max_seq_len=4096), attention="varlen"
        )
    assert time.perf_counter() - start < 5
    assert sum(p.numel() for p in decoder.parameters()) == 13_015_864_320
    config = llama_config(dim=32, n_layers=2, n_heads=4, vocab_size=70, max_seq_len=64, rope_scaling=0.5)
    real = build(config)
    with torch.device("meta"):
        filled = Decoder(config)
    filled.load_state_dict(real.state_dict(), assign=True)
    filled.restore_buffers()
    x, positions = torch.randn(2, 9, 32), torch.arange(9).expand(2, -1)
    assert torch.equal(filled.eval()(x, positions), real(x, positions))


def test_a_configuration_shared_with_another_model_stays_its_own() -> None:
    config = llama_config(dim=32, n_layers=1, n_heads=4, vocab_size=70, max_seq_len=64)
    decoder = build(config)
    config._attn_implementation = "eager"
    assert decoder.config._attn_implementation == "bestiary_packed"


@pytest.mark.parametrize(
    ("attention", "missing"), [("flash_attn", "flash-attn|NVIDIA"), ("varlen", "NVIDIA"), ("fast", "auto, sdpa")]
)
def test_an_attention_this_machine_lacks_is_refused_with_a_remedy(attention: str, missing: str) -> None:
    if torch.cuda.is_available() and attention != "fast":
        pytest.xfail("this machine has a GPU")
    with pytest.raises(ValueError, match=missing):
        check_attention(attention)
    with pytest.raises(ValueError, match=f"attention='?{attention}"):
        build(CONFIGS["llama"], attention=attention)


def test_auto_attention_follows_device_and_dtype() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_attention("auto", cpu, torch.bfloat16) == "sdpa"
    assert resolve_attention("auto", gpu, torch.float32) == "sdpa"
    assert resolve_attention("auto", gpu, torch.bfloat16) == "varlen"
    with pytest.raises(ValueError, match="bf16"):
        resolve_attention("flash_attn", gpu, torch.float32)
    with pytest.raises(ValueError, match="attention=sdpa"):
        resolve_attention("varlen", cpu, torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_soft_caps_and_sliding_windows_equal_transformers(name: str) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.5}
    capped = Gemma2Config(**SHARED, **layers, sliding_window=6, attn_logit_softcapping=2.0)
    config = capped if name == "gemma2" else Gemma3TextConfig(**SHARED, **layers, sliding_window=6)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    decoder = build(config).eval()
    decoder.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=ids, use_cache=False).logits
    prompts = PackedLayout.from_spans([(0, 0, 11), (0, 11, 9)], (1, 20))
    positions = torch.tensor([[*range(11), *range(9)]])
    both = torch.cat([ids[:, :11], ids[:, :9]], dim=1)
    cache = RaggedCache(prompts, 11)
    hidden = decoder.run_packed(prompts.pack(decoder.embed(both)), prompts.pack(positions), prompts, cache)
    halves = prompts.unpack(hidden)
    assert (decoder.head(halves[:, :11]) - expected[:, :11]).abs().max() < 1e-4
    assert (decoder.head(halves[:, 11:]) - expected[:, :9]).abs().max() < 1e-4
    for step in range(9):  # the shorter prompt is the cache's first row
        places = [9 + step, 11 + step]
        cache.advance()
        hidden = decoder.run_step(decoder.embed(ids[0, places][:, None]), torch.tensor(places)[:, None], cache)
        assert (decoder.head(hidden)[:, 0] - expected[0, places]).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["varlen", "flash_attn"])
def test_gpu_kernels_agree_with_sdpa(attention: Any) -> None:
    if attention == "flash_attn":
        pytest.importorskip("flash_attn")
    positions, segments = packed_rows()
    embeds = torch.randn(*positions.shape, 64, generator=torch.Generator().manual_seed(5))
    config = llama_config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=70, max_seq_len=64)
    outs = []
    for choice in ("sdpa", attention):
        decoder = build(config, attention=choice).to("cuda", torch.bfloat16)
        inputs = (embeds.to("cuda", torch.bfloat16), positions.cuda(), segments.cuda())
        outs.append(decoder(*inputs).float())
    assert (outs[0] - outs[1]).abs().max() < 0.1


def test_rope_scaling_is_a_factor_on_the_position() -> None:
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 8, "max_seq_len": 32}
    plain, halved = (
        Decoder(llama_config(**sizes, rope_scaling=scaling)).model.rotary_emb  # type: ignore[arg-type]
        for scaling in (None, 0.5)
    )
    positions = torch.arange(8)[None]
    for one, other in zip(plain(torch.zeros(1), positions), halved(torch.zeros(1), 2 * positions), strict=True):  # type: ignore[operator]
        assert torch.allclose(one, other, atol=1e-6)
