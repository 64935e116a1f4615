"""The LLaMA decoder of the SPHINX family against the published code, text only: every golden a folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bestiary.language.attention import PackedLayout
from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.generation import RaggedCache
from bestiary.language.llama_names import to_decoder, to_reference
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch, Example
from data_modules.collate import collate_rows
from tests.parity.cases import cases, read_json
from tests.parity.sphinx_examples import assert_close, image_example, stop_ids, tokenizer_of
from tests.parity.sphinx_sizes import decoder_sizes
from tests.parity.sphinx_update import assert_update

PREFIX = "llma."


def _is_case(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in ("io.safetensors", "weights.safetensors", "config.json")):
        return False
    config = read_json(folder / "config.json")
    return "llama_type" in config and not config.get("with_visual")


@dataclass(frozen=True)
class Case:
    """A golden, loaded once, with the model that carries its weights."""

    folder: Path
    config: dict[str, Any]
    io: dict[str, Tensor]
    state: dict[str, Tensor]
    model: MultimodalLM

    @property
    def heads(self) -> dict[str, Any]:
        """Query and key heads, as the weight map wants them."""
        args = self.config["model_args"]
        return {"n_heads": args["n_heads"], "n_kv_heads": args.get("n_kv_heads")}

    def example(self, ids: list[int], labels: list[int] | None = None, key: str = "0") -> Example:
        """Token ids; labels of 0 are ignored."""
        return image_example(ids, labels=labels, key=key)

    def batch(self) -> Batch:
        """The golden's batch, right padding included (the reference attends to it like to any token)."""
        pairs = zip(self.io["input.examples"].tolist(), self.io["input.labels"].tolist(), strict=True)
        return collate_rows([[self.example(ids, labels)] for ids, labels in pairs])

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the decoder by parameter name, by published name and in published layout."""
        return {PREFIX + name: x for name, x in to_reference(tensors, **self.heads).items()}


@lru_cache(maxsize=2)
def _load(folder: Path) -> Case:
    config = read_json(folder / "config.json")
    args = config["model_args"]
    sizes = decoder_sizes(args, vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"])
    state = load_file(folder / "weights.safetensors")
    model = MultimodalLM(Decoder(llama_config(**sizes)))
    case = Case(folder, config, load_file(folder / "io.safetensors"), state, model.eval())
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    model.decoder.load_state_dict(to_decoder(bare, **case.heads))
    return case


@pytest.fixture(params=cases("sphinx", _is_case), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Every folder that holds a LLaMA model without images."""
    return _load(request.param)


def test_checkpoint_round_trips_bit_for_bit(case: Case) -> None:
    back = case.published(case.model.decoder.state_dict())
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], case.state[name]) for name in back)


@torch.no_grad()
def test_embeddings_layers_and_logits_equal_the_goldens(case: Case) -> None:
    batch, io, decoder = case.batch(), case.io, case.model.decoder
    assert_close(case.model.splice(batch), io["stage.h0_input_embeddings"], 2e-4, "h0")
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *seen: layers.append(seen[2])) for layer in decoder.model.layers]  # type: ignore[union-attr]
    logits = case.model.logits(batch)
    for hook in hooks:
        hook.remove()
    names = [name for name in io if name.startswith("stage.h_after_layer")]
    assert len(layers) == len(names)
    for number, hidden in enumerate(layers):
        expected = io[f"stage.h_after_layer{number}_text"]
        assert_close(hidden.view(expected.shape), expected, 5e-4, f"layer {number}")
    assert_close(logits, io["output.logits"], 5e-4, "logits")


@torch.no_grad()
def test_rotary_table_equals_the_golden(case: Case) -> None:
    cosine, sine = case.io["stage.freqs_cis_real"], case.io["stage.freqs_cis_imag"]
    positions = torch.arange(len(cosine))[None]
    cos, sin = case.model.decoder.model.rotary_emb(torch.zeros(1), positions)  # type: ignore[operator]
    assert_close(cos[0, :, : cosine.shape[1]], cosine, 1e-6, "cos")
    assert_close(sin[0, :, : sine.shape[1]], sine, 1e-6, "sin")


def test_loss_gradients_and_one_update_equal_the_goldens(case: Case) -> None:
    train, io, decoder = read_json(case.folder / "train.json"), case.io, case.model.decoder
    saved = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    assert train["frozen"] == []
    loss = case.model(case.batch()).values.mean()
    assert_close(loss[None], io["output.loss"], 1e-5, "loss")
    assert loss.item() == pytest.approx(train["loss"], abs=1e-5)
    loss.backward()
    named = dict(decoder.named_parameters())
    grads = case.published({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
    assert sorted(grads) == sorted(train["trainable"]) == sorted(train["grad_norms"])
    for name, expected in io.items():
        if name.startswith("grad."):
            difference = (grads[name.removeprefix("grad.")] - expected).norm() / expected.norm()
            assert difference <= 1e-4, f"{name}: relative difference {difference:.3g}"
    for name, norm in train["grad_norms"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    assert_update(decoder, train, io, case.published)
    decoder.load_state_dict(saved)
    decoder.zero_grad(set_to_none=True)


@torch.no_grad()
def test_cached_steps_after_a_prefill_equal_the_goldens(case: Case) -> None:
    tokens, expected = case.io["infer.tokens"], case.io["infer.logits_prefill8_then_3_steps"]
    (rows, total), num_steps = tokens.shape, expected.shape[0] - 1
    length = total - num_steps
    decoder, last = case.model.decoder, length * torch.arange(1, rows + 1) - 1
    layout = PackedLayout.from_spans([(row, 0, length) for row in range(rows)], (rows, length))
    cache = RaggedCache(layout, num_steps)
    embeds = layout.pack(decoder.embed(tokens[:, :length]))
    hidden = decoder.run_packed(embeds, torch.arange(length).repeat(rows)[None], layout, cache)
    logits = [decoder.head(hidden[0, last])]
    for position in range(length, total):
        cache.advance()
        embeds = decoder.embed(tokens[:, position, None])
        logits.append(decoder.head(decoder.run_step(embeds, torch.full((rows, 1), position), cache)[:, 0]))
    assert_close(torch.stack(logits), expected, 5e-4, "cached logits")


def test_greedy_generation_equals_the_golden_ids(case: Case) -> None:
    golden, tokenizer = read_json(case.folder / "generation.json"), tokenizer_of(case.folder)
    prompts = [case.example(ids, key=str(n)) for n, ids in enumerate(golden["prompt_ids"])]
    plain, stops = stop_ids(tokenizer), stop_ids(tokenizer, golden["stop_symbol"])

    def batch(stop: list[list[int]]) -> list[list[int]]:
        return case.model.generate(prompts, max_new_tokens=12, stop=stop, reference_batching=True)

    def single(stop: list[list[int]]) -> list[int]:
        return case.model.generate(prompts[:1], max_new_tokens=16, stop=stop)[0]

    assert batch(plain) == golden["generate_batch_greedy_max12_ids"]
    assert single(plain) == golden["generate_single_greedy_max16_ids"]
    assert single(stops) == golden["generate_single_greedy_max16_with_stop_ids"]
    texts = [tokenizer.decode(ids) for ids in batch(stops)]
    assert texts == golden["generate_batch_greedy_max12_with_stop"]


def test_streamed_pieces_equal_the_goldens(case: Case) -> None:
    golden, tokenizer = read_json(case.folder / "generation.json"), tokenizer_of(case.folder)
    texts = [piece["text"] for piece in golden["stream_generate_greedy_max6"] if not piece["end_of_content"]]
    prompt = case.example(golden["prompt_ids"][0])
    ids = list(case.model.stream(prompt, max_new_tokens=6, stop=stop_ids(tokenizer)))
    assert [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))] == texts


def test_likelihoods_equal_the_goldens(case: Case) -> None:
    golden, tokenizer = read_json(case.folder / "generation.json")["evaluate_examples"], tokenizer_of(case.folder)
    ids = tokenizer.encode(golden["example"], bos=True)
    (scored,) = case.model.log_likelihood([case.example(ids, labels=ids)])
    assert scored.num_tokens == len(ids) - 1
    assert scored.log_likelihood == pytest.approx(golden["log_likelihood"][0], rel=1e-5)
    assert scored.mean_nll == pytest.approx(golden["ppl"][0], rel=1e-5)
    assert scored.is_greedy == golden["max_equal"][0]
