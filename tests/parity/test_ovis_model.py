"""Ovis 1.0, 1.5 and 1.6 against the published code: rows, losses, gradients, updates of each stage, generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from bestiary.config import Optimizer, Stage
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Batch, Example, Slot
from bestiary.training.schedule import lr_at_step
from bestiary.training.stages import apply_stage, build_optimizer, set_lr
from bestiary.training.strategies import clip_gradients
from bestiary.variants.ovis import weights
from data_modules.collate import collate_rows
from tests.parity.cases import cases, read_json
from tests.parity.ovis_cases import Case, functions, is_model_case, load_case, normalised, tensor_names
from tests.parity.sphinx_examples import assert_close

LEAST_GRADIENT = 1e-6
"""Below it a gradient's norm is rounding."""


@pytest.fixture(params=cases("ovis", is_model_case), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Every folder that holds an Ovis model of a version we build."""
    return load_case(request.param)


@dataclass(frozen=True)
class Run:
    """A case with one of its tokenize functions."""

    case: Case
    function: str
    golden: dict[str, Tensor]

    @property
    def results(self) -> dict[str, Any]:
        """What the golden tells of this function."""
        found: dict[str, Any] = self.case.results["results"][self.function]
        return found

    def use(self, model: MultimodalLM, monkeypatch: pytest.MonkeyPatch, examples: list[Example]) -> None:
        """Make the model choose words this way, with the golden's noise for the examples' own canvases."""
        vision = model.vision
        assert vision is not None
        monkeypatch.setattr(vision, "tokenize", self.function)
        monkeypatch.setattr(vision, "tau", self.results.get("tau") or 1.0)
        if "gumbel_noise" in self.golden:
            noise = self.golden["gumbel_noise"][self.canvases(examples)]
            monkeypatch.setattr(vision, "embed", partial(vision.embed, noise=noise))

    def canvases(self, examples: list[Example]) -> list[int]:
        """Where the examples' canvases are among the published ones."""
        places = self.case.places()
        return [place for example in examples for place in places[int(example.key)][: len(example.pixels)]]


def runs(*needed: str) -> list[Any]:
    """(case folder, tokenize function) of all goldens that hold the needed tensors."""
    found = [(p.values[0], p.id, name) for p in cases("ovis", is_model_case) for name in functions(p.values[0])]
    return [
        pytest.param((folder, name), id=f"{label}-{name}")
        for folder, label, name in found
        if tensor_names(folder, name) >= set(needed)
    ]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """A case with one of its tokenize functions; the model is left as it was."""
    folder, name = request.param
    case = load_case(folder)
    yield Run(case, name, case.outputs(name))
    case.model.eval()
    case.model.zero_grad()


def examples_of(case: Case, **changes: Any) -> list[Example]:
    """The golden's samples, each with the tiles it was given."""
    made = []
    for sample, told in zip(case.samples(), case.results["samples"], strict=True):
        limit = told.get("max_partition") or 9
        settings = {"max_partition": limit, "max_partition_many": limit} | changes
        made.append(case.processor(**settings)(sample))
    return made


def batch_of(examples: list[Example]) -> Batch:
    """One row for each."""
    return collate_rows([[example] for example in examples])


def assert_rows(examples: list[Example], ours: Tensor, golden: Tensor, tolerance: float, what: str) -> None:
    """Equal at the positions of every example."""
    for row, example in enumerate(examples):
        assert_close(ours[row, : len(example)], golden[row, : len(example)], tolerance, f"{what} of sample {row}")


def test_every_published_name_has_a_place_and_comes_back_bit_for_bit(case: Case) -> None:
    back = weights.to_reference(case.model.state_dict())
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], case.state[name]) for name in back)


def test_samples_become_the_published_ids_labels_and_pixels(case: Case) -> None:
    first = next(iter(case.results["results"]))
    golden, places = case.outputs(first), case.places()
    for row, example in enumerate(examples_of(case)):
        length = len(example)
        assert int(golden["train_attention_mask"][row].sum()) == length
        labels = np.where(np.arange(length) == 0, IGNORE, example.labels)
        expected = golden["train_labels"][row, :length].tolist()
        assert labels.tolist()[1:] == expected[1:]
        ids = case.inputs["input_ids"][row][case.inputs["attention_mask"][row].bool()]
        assert example.ids[example.slots == Slot.TEXT].tolist() == ids[ids >= 0].tolist()
        assert len(example.pixels) == len(places[row])
        if places[row]:
            pixels = normalised(torch.from_numpy(example.pixels), case.vision)
            expected_pixels = case.inputs["pixel_values_train"][places[row]]
            assert torch.equal(pixels.isinf(), expected_pixels.isinf()), "views are left out where published"
            pixels, expected_pixels = (x.nan_to_num(posinf=0.0) for x in (pixels, expected_pixels))
            assert_close(pixels, expected_pixels, 1e-5, f"pixels of sample {row}")


@torch.no_grad()
def test_features_and_logits_of_published_pixels_are_the_goldens(case: Case) -> None:
    golden = case.outputs(next(iter(case.results["results"])))
    features = case.vision.features(case.inputs["pixel_values_train"])
    assert_close(features, golden["visual_features"], 2e-5, "features")
    assert_close(case.vision.logits(features), golden["visual_logits"], 2e-5, "logits")
    words = golden["visual_logits"].shape[-1]
    tokens = golden["visual_tokens"][:, -features.shape[1] - (golden["visual_tokens"].shape[1] > features.shape[1]) :]
    tokens = tokens[:, : features.shape[1], :words]
    assert_close(case.vision.probabilities(features), tokens, 2e-5, "probabilities")


@pytest.mark.parametrize("run", runs("train_loss"), indirect=True)
def test_rows_losses_and_gradients_equal_the_goldens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, model = examples_of(run.case), run.case.model
    run.use(model, monkeypatch, examples)
    model.train()
    batch = batch_of(examples)
    assert_rows(examples, model.splice(batch), run.golden["train_inputs_embeds"], 2e-5, "embeddings")
    if "train_logits" in run.golden:
        assert_rows(examples, model.logits(batch), run.golden["train_logits"], 1e-4, "logits")
    loss = model(batch).values.mean()
    assert_close(loss[None], run.golden["train_loss"], 2e-5, "loss")
    assert loss.item() == pytest.approx(run.results["train_loss"], abs=2e-5)
    model.zero_grad()
    loss.backward()
    grads = weights.to_reference({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, norm in run.results["grad_norm"].items():
        assert grads[name].norm().item() == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-6), name
    for name, golden in run.golden.items():
        if name.startswith("grad."):
            grad = grads[name.removeprefix("grad.")]
            off = ((grad - golden).abs() - 1e-3 * golden.abs()).max().item()
            assert off <= 1e-4, f"{name}: {off:.3g}"


@torch.no_grad()
@pytest.mark.parametrize("run", runs("eval_inputs_embeds"), indirect=True)
def test_evaluation_gives_the_golden_rows_and_last_logits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, model = examples_of(run.case), run.case.model
    run.use(model, monkeypatch, examples)
    batch = batch_of(examples)
    assert_rows(examples, model.splice(batch), run.golden["eval_inputs_embeds"], 2e-5, "embeddings")
    for row, example in enumerate(examples):
        assert int(run.golden["eval_attention_mask"][row].sum()) == len(example)
    if "eval_last_logits" in run.golden:
        logits = model.logits(batch)
        last = torch.stack([logits[row, len(example) - 1] for row, example in enumerate(examples)])
        assert_close(last, run.golden["eval_last_logits"], 1e-4, "last logits")
    assert torch.isfinite(model(batch).values).all(), "labels are not erased"


@torch.no_grad()
def test_labels_are_erased_in_evaluation_only_where_the_quirk_is_asked_for(case: Case) -> None:
    model, batch = case.fresh_model(erased_eval_labels=True), batch_of(examples_of(case))
    assert model.eval()(batch).values.mean().isnan()
    assert torch.equal(model.train()(batch).values, case.model(batch).values)


@pytest.mark.parametrize("run", runs("trunc_loss"), indirect=True)
def test_blind_truncation_gives_the_golden_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, model = run.case.results["truncated_multimodal_max_length"], run.case.model
    examples = examples_of(run.case, max_tokens=limit, quirks=["blind_truncation", "untaught_samples"])
    assert any(len(example) == limit for example in examples)
    run.use(model, monkeypatch, examples)
    model.train()
    batch = batch_of(examples)
    assert_rows(examples, model.splice(batch), run.golden["trunc_inputs_embeds"], 2e-5, "embeddings")
    for row, example in enumerate(examples):
        labels = run.golden["trunc_labels"][row]
        assert example.labels[1:].tolist() == labels[1 : len(example)].tolist()
        assert (labels[len(example) :] == IGNORE).all(), "what a cut picture takes along carries no label"
    assert_close(model(batch).values.mean()[None], run.golden["trunc_loss"], 2e-5, "loss")


@pytest.mark.slow
@torch.no_grad()
def test_greedy_answers_are_the_goldens(case: Case) -> None:
    processor = case.processor(max_tokens=4096)
    for told in case.results["generation"]:
        prompt = processor.prompt(case.question(told))
        text = [i for i in told["input_ids"] if i >= 0]
        assert prompt.ids[prompt.slots == Slot.TEXT].tolist() == text
        marks = [-301 - i for i in prompt.ids[prompt.slots == Slot.MARK].tolist()]
        assert case.version != "1.6" or marks == [i for i in told["input_ids"] if i < -300]
        expected = told.get("greedy_ids") or told["new_ids"]
        assert case.model.generate([prompt], max_new_tokens=len(expected)) == [expected]


def stage_of(case: Case, number: int) -> Stage:
    """The stage of 1.0 as ours."""
    told = case.results["train"][f"stage{number}"]
    layer = told["visual_re_init_layer_begin"]
    train = {
        1: [f"vision.backbone.encoder.layers.{layer}.*", "vision.head.*", "vision.table.*"],
        2: ["vision.*"],
        3: ["*"],
    }[number]
    optimizer = Optimizer(lr=told["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return Stage(name=f"ovis_s{number}", train=train, max_steps=told["total_steps"], batch_size=1, optimizer=optimizer)


def stages() -> list[Any]:
    """(case folder, stage) of all goldens with training traces."""
    return [
        pytest.param(p.values[0], int(name.removeprefix("stage")), id=f"{p.id}-{name}")
        for p in cases("ovis", is_model_case)
        for name in read_json(p.values[0] / "results.json").get("train", {})
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "number"), stages())
def test_four_updates_of_a_stage_equal_the_goldens(folder: Path, number: int) -> None:
    case = load_case(folder)
    told = case.results["train"][f"stage{number}"]
    model, stage = case.fresh_model(), stage_of(case, number)
    apply_stage(model, stage)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(weights.to_reference(named)) == sorted(told["trainable"])
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer, batch = build_optimizer(model, stage.optimizer), batch_of(examples_of(case))
    for step in range(told["steps_run"]):
        lr = lr_at_step(step, stage.max_steps, lr=told["lr"], warmup=told["warmup_steps"] / told["total_steps"])
        assert lr == pytest.approx(told["lrs"][step], rel=1e-9, abs=1e-15)
        loss = model(batch).values.mean()
        assert loss.item() == pytest.approx(told["losses"][step], abs=5e-4)
        optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(SingleDeviceStrategy("cpu"), list(named.values()), 1.0)
        assert norm is not None
        assert norm.item() == pytest.approx(told["grad_norm_before_clip"][step], rel=1e-3)
        set_lr(optimizer, lr)
        optimizer.step()
    assert model(batch).values.mean().item() == pytest.approx(told["final_loss"], abs=5e-4)
    moved = {name: (p.detach() - before[name]).norm().item() for name, p in named.items()}
    theirs = {next(iter(weights.to_reference({name: named[name]}))): length for name, length in moved.items()}
    gradients = case.results["results"]["softmax"]["grad_norm"]
    for name, length in theirs.items():
        if 0 < (gradients[name] or 0) < LEAST_GRADIENT:
            continue  # a key's bias shifts all scores of a query alike: its gradient is rounding, and so is its update
        assert length == pytest.approx(told["delta_norm"].get(name, 0.0), rel=0.02, abs=2e-4), name
