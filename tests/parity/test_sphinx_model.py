"""SPHINX and SPHINX-1K against the published code: every stage, the loss, gradients, one update, and generation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bestiary.language.attention import PackedLayout
from bestiary.language.generation import RaggedCache
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch, Example
from bestiary.variants.sphinx import weights
from bestiary.variants.sphinx.model import SphinxVision, build_sphinx
from bestiary.vision.encoders import clip_to_imagenet, normalise
from data_modules.collate import collate_rows
from tests.parity.cases import cases, read_json
from tests.parity.sphinx_examples import (
    assert_close,
    image_example,
    reference_grads,
    stop_ids,
    tokenizer_of,
)
from tests.parity.sphinx_sizes import sphinx_arguments
from tests.parity.sphinx_update import assert_update


def _is_case(folder: Path) -> bool:
    files = ("io.safetensors", "weights.safetensors", "config.json")
    if not all((folder / name).is_file() for name in files):
        return False
    config = read_json(folder / "config.json")
    return bool("llama_type" in config and config.get("with_visual"))


@dataclass(frozen=True)
class Case:
    """A golden, loaded once, with the model that carries its weights."""

    folder: Path
    config: dict[str, Any]
    io: dict[str, Tensor]
    state: dict[str, Tensor]
    model: MultimodalLM

    @property
    def vision(self) -> SphinxVision:
        """The visual part."""
        assert isinstance(self.model.vision, SphinxVision)
        return self.model.vision

    @property
    def image_rows(self) -> int:
        """Positions of an image."""
        return int(self.config["image_words"])

    @property
    def canvases(self) -> Tensor:
        """uint8[N, 3, S, S], the golden's own resize."""
        names = sorted(n for n in self.io if n.startswith("input.padded_resized_u8."))
        return torch.stack([self.io[name] for name in names]).permute(0, 3, 1, 2).contiguous()

    def example(self, ids: list[int], *, labels: list[int] | None = None, image: int = 0, key: str = "0") -> Example:
        """One row of ids behind an image of the case."""
        pixels = self.canvases[image].numpy()
        return image_example(ids, labels=labels, pixels=pixels, image_rows=self.image_rows, key=key)

    def batch(self) -> Batch:
        """The golden's batch, right padding included (the reference attends to it like to any token)."""
        ids, labels = self.io["input.examples"].tolist(), self.io["input.labels"].tolist()
        return collate_rows([[self.example(ids[i], labels=labels[i], image=i)] for i in range(len(ids))])


@lru_cache(maxsize=1)
def _load(folder: Path) -> Case:
    config = read_json(folder / "config.json")
    state = load_file(folder / "weights.safetensors")
    model = build_sphinx(**sphinx_arguments(config), reference_quirks=True)
    weights.load_reference(model, state)
    return Case(folder, config, load_file(folder / "io.safetensors"), state, model.eval())


@pytest.fixture(params=cases("sphinx", _is_case), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Every folder that holds a SPHINX model with images."""
    return _load(request.param)


def view_major(x: Tensor) -> Tensor:
    """[N, V, ...] as the reference stacks crops."""
    return x.transpose(0, 1).flatten(0, 1)


def text_half(case: Case, x: Tensor) -> Tensor:
    """The last positions, as many as text tokens."""
    return x[:, -case.io["input.examples"].shape[1] :]


def test_checkpoint_round_trips_with_every_name_matched(case: Case) -> None:
    back = weights.to_reference(case.model.state_dict(), case.model)
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], case.state[name]) for name in back)


def test_pixels_are_normalised_as_published(case: Case) -> None:
    pixels = normalise(case.canvases)
    for name, stride in (("input.images_rows_stride8", 8), ("input.images_rows_stride64", 64)):
        if name in case.io:
            assert_close(pixels[:, :, ::stride], case.io[name], 1e-6, name)


def test_whole_view_is_the_bicubic_resize_of_the_canvas(case: Case) -> None:
    if case.vision.num_views == 1:
        assert torch.equal(case.vision.cut(case.canvases)[:, 0], normalise(case.canvases))
        return
    whole = case.vision.cut(case.canvases)[:, 0]
    assert_close(whole[:, :, ::4], case.io["stage.image_224_half_rows_stride4"].float(), 2e-3, "half view")
    floats = build_sphinx(**sphinx_arguments(case.config)).vision
    assert isinstance(floats, SphinxVision)
    whole = floats.cut(case.canvases)[:, 0]
    assert_close(whole[:, :, ::8], case.io["stage.image_224_float_path"], 1e-5, "float view")


@torch.no_grad()
def test_every_encoder_equals_its_golden_stage(case: Case) -> None:
    vision, io = case.vision, case.io
    views = view_major(vision.cut(case.canvases))
    num_vit = io["stage.blip2_vit_last_hidden"].shape[0]
    assert_close(vision.dinov2.position_table(), io["stage.dinov2_pos_embed_16x16"], 1e-5, "position table")
    assert_close(vision.qformer.patches(views[:num_vit]), io["stage.blip2_vit_last_hidden"], 1e-4, "blip2 vit")
    assert_close(vision.qformer(views), io["stage.qformer_last_hidden"], 1e-4, "qformer")
    assert_close(vision.clip(views), io["stage.clip_tokens"], 1e-4, "clip")
    assert_close(vision.feature_map(views).permute(0, 3, 1, 2), io["stage.convnext_map"], 2e-4, "convnext")
    assert_close(vision.dinov2(clip_to_imagenet(views)), io["stage.dinov2_tokens"], 1e-4, "dinov2")


@torch.no_grad()
def test_rows_of_an_image_equal_encode_image_between_tags(case: Case) -> None:
    vision = case.vision
    assert vision.image_rows == case.image_rows
    rows = vision(case.canvases).unflatten(1, (vision.num_views, -1))
    expected = case.io["stage.encode_image"]
    expected = expected if expected.dim() == 4 else expected[None]
    assert_close(rows[:, :, 1:-1].transpose(0, 1), expected, 2e-4, "encode_image")
    for place, tag in ((0, "llma.start_img"), (-1, "llma.end_img")):
        assert torch.equal(rows[:, :, place], case.state[tag].expand_as(rows[:, :, :1])[:, :, 0])


@torch.no_grad()
def test_input_embeddings_layers_and_logits_equal_the_goldens(case: Case) -> None:
    batch, io = case.batch(), case.io
    assert_close(case.model.splice(batch), io["stage.h0_input_embeddings"], 2e-4, "h0")
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out))
        for n, layer in enumerate(case.model.decoder.model.layers)  # type: ignore[arg-type]
    ]
    hidden = case.model.hidden(batch)
    for hook in hooks:
        hook.remove()
    for n, out in seen.items():
        rows = text_half(case, out.reshape(hidden.shape))
        assert_close(rows, io[f"stage.h_after_layer{n}_text"], 5e-4, f"layer {n}")
    logits = text_half(case, case.model.decoder.head(hidden))
    assert_close(logits, io["output.logits"], 5e-4, "logits")


@torch.no_grad()
def test_rotary_table_equals_the_golden(case: Case) -> None:
    expected = case.io["stage.freqs_cis_real"]
    positions = torch.arange(expected.shape[0])[None]
    cos, sin = case.model.decoder.model.rotary_emb(torch.zeros(1), positions)  # type: ignore[operator]
    half = expected.shape[1]
    assert_close(cos[0, :, :half], expected, 1e-6, "cos")
    assert_close(sin[0, :, :half], case.io["stage.freqs_cis_imag"], 1e-6, "sin")


def test_loss_gradients_and_one_update_equal_the_goldens(case: Case) -> None:
    train, io, model = read_json(case.folder / "train.json"), case.io, case.model
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    back = lambda state: weights.to_reference(state, model)  # noqa: E731
    assert sorted(back(saved)) == sorted(train["trainable"])
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert sorted(back(frozen)) == sorted(train["frozen"])
    losses = model(case.batch()).values
    loss = losses.mean()
    assert_close(loss.detach()[None], io["output.loss"], 1e-5, "loss")
    loss.backward()
    grads = reference_grads(model, back)
    for name, expected in io.items():
        if name.startswith("grad."):
            difference = (grads[name[5:]] - expected).norm() / expected.norm()
            assert difference <= 1e-4, f"{name}: relative difference {difference:.3g}"
    assert grads.keys() == train["grad_norms"].keys()
    for name, norm in train["grad_norms"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    assert_update(model, train, io, back)
    model.load_state_dict({**model.state_dict(), **saved})
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_cached_steps_after_a_prefill_equal_the_goldens(case: Case) -> None:
    tokens, expected = case.io["infer.tokens"], case.io["infer.logits_prefill8_then_3_steps"]
    num_steps = expected.shape[0] - 1
    num_prompt = tokens.shape[1] - num_steps
    decoder = case.model.decoder
    batch = collate_rows([[case.example(ids[:num_prompt], image=i) for i, ids in enumerate(tokens.tolist())]])
    lengths = [segment.length for segment in batch.segments]
    layout = PackedLayout.from_spans(
        [(0, s.start, s.length) for s in batch.segments], batch.ids.shape, torch.device("cpu")
    )
    cache = RaggedCache(layout, num_steps)
    hidden = decoder.run_packed(case.model.splice(batch), batch.positions, layout, cache)
    logits = [decoder.head(hidden[0, torch.tensor(lengths).cumsum(0) - 1])]
    for step in range(num_steps):
        cache.advance()
        positions = torch.tensor(lengths)[:, None] + step
        embeds = decoder.embed(tokens[:, num_prompt + step, None])
        logits.append(decoder.head(decoder.run_step(embeds, positions, cache)[:, 0]))
    assert_close(torch.stack(logits), expected, 5e-4, "cached logits")


def test_greedy_generation_equals_the_golden_ids(case: Case) -> None:
    golden = read_json(case.folder / "generation.json")
    tokenizer = tokenizer_of(case.folder)
    prompts = [case.example(ids, key=str(n)) for n, ids in enumerate(golden["prompt_ids"])]
    plain, stops = stop_ids(tokenizer), stop_ids(tokenizer, golden["stop_symbol"])
    batch = case.model.generate(prompts, max_new_tokens=12, stop=plain, reference_batching=True)
    assert batch == golden["generate_batch_greedy_max12_ids"]
    assert [tokenizer.decode(ids) for ids in batch] == golden["generate_batch_greedy_max12"]
    single = case.model.generate(prompts[:1], max_new_tokens=16, stop=plain)
    assert single == [golden["generate_single_greedy_max16_ids"]]
    stopped = case.model.generate(prompts[:1], max_new_tokens=16, stop=stops)
    assert stopped == [golden["generate_single_greedy_max16_with_stop_ids"]]
    stopped = case.model.generate(prompts, max_new_tokens=12, stop=stops, reference_batching=True)
    assert [tokenizer.decode(ids) for ids in stopped] == golden["generate_batch_greedy_max12_with_stop"]


def test_streamed_pieces_and_likelihoods_equal_the_goldens(case: Case) -> None:
    golden = read_json(case.folder / "generation.json")
    tokenizer = tokenizer_of(case.folder)
    prompt = case.example(golden["prompt_ids"][0])
    pieces = [piece for piece in golden["stream_generate_greedy_max6"] if not piece["end_of_content"]]
    ids = list(case.model.stream(prompt, max_new_tokens=6, stop=stop_ids(tokenizer)))
    assert [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))] == [piece["text"] for piece in pieces]
    asked = golden["evaluate_examples"]
    tokens = tokenizer.encode(asked["example"], bos=True)
    scored = case.model.log_likelihood([case.example(tokens, labels=[0, *tokens[1:]])])
    assert scored[0].log_likelihood == pytest.approx(asked["log_likelihood"][0], abs=1e-3 * len(tokens))
    assert scored[0].mean_nll == pytest.approx(asked["ppl"][0], abs=1e-3)
    assert [scored[0].is_greedy] == asked["max_equal"]


def test_rows_do_not_depend_on_other_images_of_the_batch(case: Case) -> None:
    with torch.no_grad():
        together = case.vision(case.canvases)
        alone = torch.cat([case.vision(canvas[None]) for canvas in case.canvases])
    assert np.abs((together - alone).numpy()).max() < 1e-5
