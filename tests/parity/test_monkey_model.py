"""Monkey against the published code: stage tensors, logits, losses, gradients, long sequences, generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from bestiary.config import Optimizer, Stage
from bestiary.language.generation import Sampling
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch, Example
from bestiary.training.stages import apply_stage
from bestiary.variants.monkey import weights
from bestiary.variants.monkey.decoder import ntk_alpha
from bestiary.variants.monkey.windows import views
from bestiary.vision.encoders import normalise
from data_modules.collate import collate_rows
from tests.parity.cases import cases, read_tensors
from tests.parity.monkey_cases import PICTURES, Case, is_lora_case, is_model_case, load_case, names_of
from tests.parity.sphinx_examples import assert_close

FINETUNE = list(OmegaConf.load(Path(__file__).parents[2] / "conf/stage/monkey_finetune.yaml").train)
"""What our recipe of the published fine-tuning trains."""


@pytest.fixture(params=cases("monkey", is_model_case))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every folder that holds a Monkey model; it is left as it was."""
    case = load_case(request.param)
    yield case
    case.model.zero_grad()
    case.model.eval()


def test_every_published_name_has_a_place_and_comes_back_bit_for_bit(case: Case) -> None:
    back = weights.to_reference(case.model.state_dict())
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], case.state[name]) for name in back)


@torch.no_grad()
def test_every_stage_of_the_eye_equals_the_goldens(case: Case) -> None:
    io, vision = case.io, case.vision
    for number in range(3):
        pixels = torch.from_numpy(case.pixels(number).copy())[None]
        views_VN = views(normalise(pixels), vision.window_px)
        tokens = vision.vit(views_VN)
        pooled = vision.resampler(tokens.flatten(0, 1))
        if number == 0:
            assert_close(normalise(pixels)[0], io["image0.preprocessed"], 1e-5, "pixels")
            assert_close(views_VN[-1, 0], io["image0.global_pixels"], 1e-5, "global view")
            assert_close(vision.vit.first_tokens(views_VN)[:, 0], io["image0.ln_pre_tokens"], 2e-5, "first tokens")
        assert_close(tokens[:, 0], io[f"image{number}.vit_tokens"], 5e-5, f"tokens {number}")
        assert_close(pooled, io[f"image{number}.resampler_tokens"], 5e-5, f"pooled {number}")
        assert_close(vision.rows(pooled)[0], io[f"image{number}.features"], 5e-5, f"rows {number}")
        assert_close(vision(pixels)[0], io[f"image{number}.features"], 5e-5, f"forward {number}")


@torch.no_grad()
def test_pictures_in_one_call_have_the_rows_they_have_alone(case: Case) -> None:
    pixels = torch.stack([torch.from_numpy(case.pixels(number).copy()) for number in (2, 0, 1)])
    for rows, number in zip(case.vision(pixels), (2, 0, 1), strict=True):
        assert_close(rows, case.io[f"image{number}.features"], 5e-5, f"rows of picture {number}")


@torch.no_grad()
def test_a_window_has_its_own_adapters_and_the_global_view_none(case: Case) -> None:
    vision = case.vision
    pixels = normalise(torch.from_numpy(case.pixels(0).copy())[None])
    window = views(pixels, vision.window_px)[:1].expand(vision.num_views, -1, -1, -1, -1)
    rows = vision.rows(vision.resampler(vision.vit(window).flatten(0, 1)))[0].chunk(vision.num_views)
    assert_close(rows[1], case.io["image0.window0_with_adapter1.features"], 5e-5, "with the second window's")
    assert_close(rows[-1], case.io["image0.window0_no_adapter.features"], 5e-5, "without")


@torch.no_grad()
def test_rows_of_the_decoder_equal_the_goldens(case: Case) -> None:
    model, seen = case.model, {}
    first: nn.Module = model.decoder.model.layers[0]  # type: ignore[index,assignment]
    handle = first.register_forward_hook(lambda _module, _inputs, output: seen.update(block=output))
    for name in names_of(list(case.io), "logits"):
        batch = case.alone(name)
        assert_close(model.splice(batch)[0], case.io[f"{name}.merged_embeddings"], 5e-5, f"{name}: embeddings")
        assert_tail(model.logits(batch)[0], case.io[f"{name}.logits"], f"{name}: logits")
        if f"{name}.block0_out" in case.io:
            assert_close(seen["block"][0], case.io[f"{name}.block0_out"], 5e-5, f"{name}: first block")
            assert_close(model.hidden(batch)[0], case.io[f"{name}.final_norm_out"], 1e-4, f"{name}: last norm")
    handle.remove()


def assert_tail(ours: Tensor, golden: Tensor, what: str) -> None:
    """The last positions equal the golden's."""
    assert_close(ours[-len(golden) :], golden, 1e-4, what)


@pytest.mark.slow
@torch.no_grad()
def test_long_sequences_are_stretched_as_published(case: Case) -> None:
    length = case.config["seq_length_long"]
    model = case.fresh_model(seq_length=length)
    for name in names_of(list(case.io), "long.logits"):
        assert ntk_alpha(len(case.io[f"{name}.input_ids"]), length) == case.io[f"{name}.long.ntk_alpha"].item()
        assert_tail(model.logits(case.alone(name))[0], case.io[f"{name}.long.logits"], f"{name}: long")


@pytest.mark.slow
@torch.no_grad()
def test_a_long_sequence_is_stretched_alike_in_any_company(case: Case) -> None:
    model = case.fresh_model(seq_length=case.config["seq_length_long"])
    together = model.logits(case.train_batch())
    for row, example in enumerate(case.examples("train")):
        alone = model.logits(batch_of_one(example))
        assert_close(together[row, : len(example)], alone[0], 1e-4, f"row {row}")


def batch_of_one(example: Example) -> Batch:
    """A batch of one row."""
    return collate_rows([[example]])


@pytest.mark.parametrize("mode", ["eval", pytest.param("train_no_dropout", marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_the_goldens(case: Case, mode: str) -> None:
    model, told, batch = case.model, case.scalars[mode], case.train_batch()
    model.train(mode != "eval")
    logits = model.logits(batch)
    for row, example in enumerate(case.examples("train")):
        last = logits[row, len(example) - 8 : len(example)]
        assert_close(last, case.io[f"{mode}.logits_last8"][row], 1e-4, f"logits of row {row}")
    loss = model(batch).values.mean()
    assert_close(loss, case.io[f"{mode}.loss"], 1e-4, "loss")
    model.zero_grad()
    loss.backward()
    grads = gradients(model)
    assert sorted(set(case.state) - set(grads)) == sorted(told["params_without_grad"])
    for name, norm in told["grad_norm"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    total = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert total == pytest.approx(told["total_grad_norm"], rel=1e-3)
    block = "transformer.visual.transformer.resblocks.0.attn.in_proj_lora.0.lora_a.weight"
    for name, theirs in (
        ("attn_pool_query", "transformer.visual.attn_pool.query"),
        ("ln_f", "transformer.ln_f.weight"),
        ("lora_a_layer0_window0", block),
    ):
        golden = case.io[f"{mode}.grad.{name}"]
        assert torch.allclose(grads[theirs], golden, rtol=1e-3, atol=1e-6), name


def gradients(model: MultimodalLM) -> dict[str, Tensor]:
    """Gradients under the published names."""
    return weights.to_reference({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.slow
def test_recomputed_blocks_give_the_golden_gradients(case: Case) -> None:
    model, batch = case.fresh_model(), case.train_batch()
    model.train()
    model.decoder.set_activation_checkpointing(True)
    model.vision.vit.checkpoints = True  # type: ignore[union-attr]
    model(batch).values.mean().backward()
    told = case.scalars["train_no_dropout"]["grad_norm"]
    grads = gradients(model)
    assert {n: grads[n].norm().item() for n in told} == pytest.approx(told, rel=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_long_losses_are_stretched_in_evaluation_alone(case: Case) -> None:
    model, batch = case.fresh_model(seq_length=case.config["seq_length_long"], padding="right"), case.train_batch()
    for _ in range(2):  # nothing of one mode is left for the other
        assert_close(model.eval()(batch).values.mean(), case.io["long.eval.loss"], 1e-4, "evaluation")
        loss = model.train()(batch).values.mean()
        assert_close(loss, case.io["long.train_no_dropout.loss"], 1e-4, "training")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("form", ["gen", "gen.long"])
def test_greedy_tokens_and_their_scores_are_the_goldens(case: Case, form: str) -> None:
    changes: dict[str, Any] = {}
    if form == "gen.long":
        changes = {"seq_length": case.config["seq_length_long"], "padding": "left"}
    model, examples = case.fresh_model(**changes), case.examples("gen")
    golden, scores = case.io[f"{form}.new_tokens"], case.io[f"{form}.scores"]
    expected = []
    for row in golden.tolist():
        expected.append(row[: row.index(case.config["eod_id"])] if case.config["eod_id"] in row else row)
    settings: dict[str, Any] = {"max_new_tokens": golden.shape[1], "stop": [[case.config["eod_id"]]]}
    assert model.generate(examples, **settings, min_new_tokens=1) == expected
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    decoding = model._decoding(
        [examples[i] for i in order],
        budgets=[golden.shape[1]] * len(order),
        stop=[],
        sampling=Sampling(),
        generators=[torch.Generator()] * len(order),
    )
    for step in range(golden.shape[1]):
        for place, row in enumerate(order):
            if step <= len(expected[row]):
                told = scores[row, step].isfinite()  # an answer may not end with its first token: infinite there
                assert told.sum() >= scores.shape[-1] - (step == 0)
                ours, theirs = decoding._logits[place][told], scores[row, step][told]
                assert_close(ours, theirs, 1e-4, f"row {row}, step {step}")
        decoding.step()


@pytest.mark.slow
def test_the_published_recipe_trains_what_the_golden_lists(case: Case) -> None:
    model = case.fresh_model()
    optimizer = Optimizer(lr=1e-5)
    apply_stage(model, Stage(name="monkey", train=FINETUNE, max_steps=1, batch_size=1, optimizer=optimizer))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(weights.to_reference(named)) == sorted(case.scalars["trainable_after_reference_freeze"])


@pytest.mark.parametrize("folder", cases("monkey", is_lora_case))
@torch.no_grad()
def test_the_decoder_adapters_of_the_3090_variant_give_the_golden_logits(folder: Any) -> None:
    case, golden = load_case(folder), read_tensors(folder / "io.safetensors")
    for name in names_of(list(golden), "logits"):
        assert_tail(case.model.logits(case.alone(name))[0], golden[f"{name}.logits"], f"{name}: logits")
    assert_close(case.model(case.train_batch()).values.mean(), golden["eval.loss"], 1e-4, "loss")
    assert set(PICTURES) >= set(names_of(list(golden), "logits"))
