"""SPHINX-V against the published code: prompts, features, sequence, logits, losses, gradients, answers."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bestiary.inference.pictures import box, point
from bestiary.inference.session import PUBLISHED, Request, Session
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch, Example, RegionKind, RegionRows, Slot
from bestiary.variants.sphinx.model import SphinxVision
from bestiary.variants.sphinx_v import weights
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.processor import SphinxVProcessor
from bestiary.variants.sphinx_v.prompt_encoder import PromptEncoder, PromptRows, reference_rows
from bestiary.variants.sphinx_v.sam import SAM_PARTS
from data_modules.collate import collate_rows
from tests.parity.cases import cases, read_json
from tests.parity.sphinx_examples import (
    assert_close,
    data_folder,
    image_example,
    reference_grads,
    rows_of,
    stop_ids,
    tokenizer_of,
)
from tests.parity.sphinx_sizes import sphinx_v_arguments

PROMPT_CASES = ("points", "boxes", "mixed_batch", "edge")
KINDS = {"points": RegionKind.POINT, "boxes": RegionKind.BOX}
CONF = Path(__file__).parents[2] / "conf/stage"
STAGES = {f"stage{i}": yaml.safe_load((CONF / f"sphinxv_stage{i}.yaml").read_text()) for i in (1, 2)}
"""What trains, as the recipes say (reference/sphinx_v.md 1.6)."""


def _is_case(folder: Path) -> bool:
    files = ("inputs.safetensors", "outputs.safetensors", "weights.safetensors", "config.json")
    if not all((folder / name).is_file() for name in files):
        return False
    return "encoders" in read_json(folder / "config.json")


@dataclass(frozen=True)
class Case:
    """A golden, loaded once, with the model that carries its weights."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    state: dict[str, Tensor]
    model: MultimodalLM

    @property
    def vision(self) -> SphinxVision:
        """The visual part."""
        assert isinstance(self.model.vision, SphinxVision)
        return self.model.vision

    @property
    def prompts(self) -> PromptRows:
        """The prompt part."""
        assert isinstance(self.model.regions, PromptRows)
        return self.model.regions

    @property
    def canvases(self) -> Tensor:
        """float[N, 3, S, S], normalised: the golden stores it small, every pixel stands for a block."""
        small = self.inputs["image_lowres"]
        block = self.config["fixed"]["image_size"] // small.shape[-1]
        return small.repeat_interleave(block, 2).repeat_interleave(block, 3)

    @property
    def num_visual(self) -> int:
        """Positions of image and prompts."""
        return int(self.config["fixed"]["image_vp_words"])

    def regions(self, name: str) -> RegionRows:
        """The prompts of a case as region rows, the reference's reading of them."""
        return reference_rows(self.inputs[f"sparse_vp.{name}"], quirks=True)

    def example(self, ids: list[int], sample: int, name: str | None, labels: list[int] | None = None) -> Example:
        """One row: ids behind the image and prompts of a sample (None: text only)."""
        if name is None:
            return image_example(ids, labels=labels, key=str(sample))
        return image_example(
            ids,
            labels=labels,
            pixels=self.canvases[sample].numpy(),
            image_rows=self.vision.image_rows,
            regions=rows_of(self.regions(name), sample),
            key=str(sample),
        )

    def batch(self, name: str | None) -> Batch:
        """The golden's batch with the prompts of a case, right padding included."""
        ids, labels = self.inputs["examples"].tolist(), self.inputs["labels"].tolist()
        return collate_rows([[self.example(ids[i], i, name, labels[i])] for i in range(len(ids))])


@lru_cache(maxsize=1)
def _load(folder: Path) -> Case:
    config = read_json(folder / "config.json")
    state = load_file(folder / "weights.safetensors")
    model = build_sphinx_v(**sphinx_v_arguments(config), reference_quirks=True)
    weights.load_reference(model, state)
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    return Case(folder, config, inputs, outputs, state, model.eval())


@pytest.fixture(params=cases("sphinxv", _is_case), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Every folder that holds a SPHINX-V model."""
    return _load(request.param)


def test_checkpoint_round_trips_with_every_name_matched(case: Case) -> None:
    back = weights.to_reference(case.model.state_dict(), case.model)
    assert back.keys() == case.state.keys()
    assert all(torch.equal(back[name], case.state[name]) for name in back)


@pytest.mark.parametrize("name", PROMPT_CASES)
@torch.no_grad()
def test_prompt_encoder_and_projection_equal_the_goldens(case: Case, name: str) -> None:
    rows, prompts = case.regions(name), case.prompts
    batch, slots = case.inputs[f"sparse_vp.{name}"].shape[:2]
    raw = prompts.encoder(rows.coords, rows.kinds, rows.valid).unflatten(0, (batch, slots))
    valid = torch.as_tensor(rows.valid).unflatten(0, (batch, slots))
    kinds = torch.as_tensor(rows.kinds).unflatten(0, (batch, slots))[:, 0]
    seen = 0
    for kind, code in KINDS.items():
        if f"vpenc_raw.{kind}.{name}" in case.outputs:
            assert_close(raw[kinds == code], case.outputs[f"vpenc_raw.{kind}.{name}"], 1e-5, f"raw {kind}")
            assert torch.equal(valid[kinds == code].long(), case.outputs[f"vpenc_valid.{kind}.{name}"])
            seen += int((kinds == code).sum())
    assert seen == batch
    tokens = prompts.slots(rows).unflatten(0, (batch, slots))
    assert_close(tokens, case.outputs[f"vp_tokens.{name}"], 1e-5, "vp_tokens")


@torch.no_grad()
def test_encoder_features_equal_the_goldens(case: Case) -> None:
    features = case.vision.encode(case.canvases)
    queries, tokens = (x.transpose(0, 1).flatten(0, 1) for x in (features.queries, features.tokens))
    assert_close(queries, case.outputs["qformer_feats"], 1e-3, "qformer_feats")
    assert_close(tokens[:, ::16], case.outputs["ens_feats_sub16"], 1e-3, "ens_feats")


@torch.no_grad()
def test_input_embeddings_equal_the_goldens(case: Case) -> None:
    embeds = case.model.splice(case.batch("mixed_batch"))
    assert case.vision.image_rows + case.config["fixed"]["vp_slots"] + 2 == case.num_visual
    assert_close(embeds[1:2], case.outputs["inputs_embeds.mixed_batch.sample1"], 1e-3, "sample 1")
    tail = "inputs_embeds.mixed_batch.sample0_from"
    [name] = [name for name in case.outputs if name.startswith(tail)]
    assert_close(embeds[:1, int(name.removeprefix(tail)) :], case.outputs[name], 1e-3, "sample 0")


@pytest.mark.parametrize("name", PROMPT_CASES)
@torch.no_grad()
def test_logits_and_loss_equal_the_goldens(case: Case, name: str) -> None:
    batch = case.batch(name)
    logits = case.model.logits(batch)[:, case.num_visual :]
    assert_close(logits, case.outputs[f"logits.{name}"], 3e-3, "logits")
    assert_close(case.model(batch).values.mean()[None], case.outputs[f"loss.{name}"], 1e-3, "loss")


@torch.no_grad()
def test_text_without_image_equals_the_golden(case: Case) -> None:
    batch = case.batch(None)
    assert_close(case.model.logits(batch), case.outputs["logits.text_only"], 1e-4, "logits")
    assert_close(case.model(batch).values.mean()[None], case.outputs["loss.text_only"], 1e-3, "loss")


@torch.no_grad()
def test_without_half_rounding_the_logits_equal_that_variant(case: Case) -> None:
    model = build_sphinx_v(**sphinx_v_arguments(case.config)).eval()
    weights.load_reference(model, case.state)
    logits = model.logits(case.batch("mixed_batch"))[:, case.num_visual :]
    assert_close(logits, case.outputs["logits_nohalf.mixed_batch"], 1e-4, "logits")


@pytest.mark.parametrize("stage", STAGES)
def test_trainable_set_and_gradient_norms_of_a_stage_equal_the_goldens(case: Case, stage: str) -> None:
    golden, model = read_json(case.folder / "grad_norms.json"), case.model
    train, freeze = STAGES[stage]["train"], STAGES[stage].get("freeze", [])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        hit, out = (any(fnmatch.fnmatchcase(name, glob) for glob in globs) for globs in (train, freeze))
        parameter.requires_grad_(hit and not out)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(weights.to_reference(trainable, model)) == sorted(golden[stage])
    assert len(trainable) == golden[f"{stage}_n_trainable"]
    loss = model(case.batch("mixed_batch")).values.mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"{stage}_loss"], abs=1e-3)
    grads = reference_grads(model, lambda state: weights.to_reference(state, model))
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    assert grads.keys() == golden[stage].keys()
    for name, norm in golden[stage].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-2), name
    total = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert total == pytest.approx(golden[f"{stage}_total_norm"], rel=1e-2)
    if stage == "stage1":
        for name, expected in case.outputs.items():
            if name.startswith("grad."):
                difference = (grads[name.removeprefix("grad.")] - expected).norm() / expected.norm()
                assert difference <= 1e-2, f"{name}: relative difference {difference:.3g}"


def test_sam_initialisation_changes_what_the_golden_says(case: Case) -> None:
    golden = load_file(case.folder / "sam_init.safetensors")
    encoder = PromptEncoder(case.config["fixed"]["vp_embed_dim"])
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    sam = {name.removeprefix("sam."): tensor for name, tensor in golden.items() if name.startswith("sam.")}
    part = next(part for part in SAM_PARTS if part.recognises(sam, {}))
    changed = {}
    for name, tensor in sam.items():
        changed |= {ours.removeprefix(f"{part.target}."): value for ours, value in part.to_ours(name, tensor).items()}
    assert not encoder.load_state_dict(changed, strict=False).unexpected_keys
    theirs = weights.SPHINX_V.to_reference(
        {f"regions.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}, head_dim=2
    )
    after = {name.removeprefix("after."): tensor for name, tensor in golden.items() if name.startswith("after.")}
    assert len(changed) == len(after)
    for name, expected in after.items():
        assert torch.equal(theirs[f"llma.{name}"], expected), name
    for name, tensor in encoder.state_dict().items():
        assert name in changed or torch.equal(tensor, before[name]), name


def test_greedy_generation_equals_the_golden_ids(case: Case) -> None:
    golden, tokenizer = read_json(case.folder / "generation.json"), tokenizer_of(case.folder)
    stop = stop_ids(tokenizer)
    prompts_of = {"points": "points", "boxes": "boxes", "batch": "mixed_batch", "text_only": None}
    for name, prompts in prompts_of.items():
        asked = golden[name]
        first = asked["sample"] or 0
        examples = [
            case.example(tokenizer.encode(text, bos=True), first + n, prompts)
            for n, text in enumerate(asked["prompts"])
        ]
        # All run to one common length: the longest prompt's and max_gen_len, which the golden does not say.
        known = [int((example.slots == Slot.TEXT).sum()) for example in examples]
        whole = max(num + len(ids) for num, ids in zip(known, asked["token_ids"], strict=True))
        ids = case.model.generate(examples, max_new_tokens=whole - max(known), stop=stop, reference_batching=True)
        assert ids == asked["token_ids"], name
        assert [tokenizer.decode(one) for one in ids] == asked["text"], name


def test_streamed_pieces_and_likelihoods_equal_the_goldens(case: Case) -> None:
    golden, tokenizer = read_json(case.folder / "generation.json"), tokenizer_of(case.folder)
    asked = golden["stream_points0"]
    pieces = [piece["text"] for piece in asked["pieces"] if not piece["end_of_content"]]
    prompt = case.example(tokenizer.encode(asked["prompt"], bos=True), 0, "points")
    ids = list(case.model.stream(prompt, max_new_tokens=len(pieces), stop=stop_ids(tokenizer)))
    assert [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))] == pieces
    asked = golden["evaluate_examples"]
    examples = []
    for n, (text, context) in enumerate(zip(asked["examples"], asked["contexts"], strict=True)):
        tokens, known = tokenizer.encode(text, bos=True), tokenizer.encode(context, bos=True)
        labels = [0] * len(known) + tokens[len(known) :]
        examples.append(case.example(tokens, n, asked["sparse_vp"], labels))
    scored = case.model.log_likelihood(examples)
    for n, score in enumerate(scored):
        assert score.log_likelihood == pytest.approx(asked["log_likelihood"][n], abs=6e-3 * score.num_tokens)
        assert score.mean_nll == pytest.approx(asked["ppl"][n], abs=6e-3)
        assert score.is_greedy == asked["max_equal"][n]


def _asked(data: Path, asked: dict[str, Any]) -> Request:
    """A golden's picture, pixel prompts (x, y or x, y, width, height) and conversation as a caller has them."""
    marks = [
        point(x, y) if not size else box(x, y, x + size[0], y + size[1]) for x, y, *size in map(tuple, asked["vps"])
    ]
    *history, (question, _) = (tuple(pair) for pair in asked["qas"])
    return Request(question, Image.open(data / asked["image"]), marks, "pixels", history)


class IdsProcessor(SphinxVProcessor):
    """Answers are told as token ids: several ids may have one text."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_answers_from_picture_and_pixel_prompts_equal_the_goldens(case: Case) -> None:
    golden, fixed = read_json(case.folder / "generate_response.json"), case.config["fixed"]
    processor = IdsProcessor(
        tokenizer=str(next(case.folder.glob("*.model"))),
        canvas_px=fixed["image_size"],
        image_rows=case.vision.image_rows,
        num_views=fixed["views"],
        num_slots=fixed["vp_slots"],
        max_tokens=case.config["max_seq_len"],
        reference_quirks=True,
        exact_pil=True,
    )
    session, compared = Session(case.model, processor), 0
    for asked in golden["cases"]:
        # The README's rule: ids count up to the first step whose two best logits are closer than 0.02.
        ids = asked["token_ids"]
        sure = next((n for n, margin in enumerate(asked["step_margins"]) if margin < 0.02), len(ids))
        if sure == 0:
            continue
        settings = replace(PUBLISHED, temperature=asked["temperature"], max_new_tokens=min(sure, asked["max_gen_len"]))
        [answer] = session.respond_all([_asked(data_folder(case.folder, asked["image"]), asked)], settings=settings)
        assert answer == " ".join(map(str, ids[:sure]))
        assert sure < len(ids) or processor.tokenizer.decode(ids).strip() == asked["response"]
        compared += 1
    assert compared


def test_sane_reading_gives_every_row_its_own_kind_and_counts_the_corner(case: Case) -> None:
    sparse = case.inputs["sparse_vp.edge"]
    rows = reference_rows(sparse, quirks=False)
    kinds, valid = (np.asarray(x).reshape(sparse.shape[:2]) for x in (rows.kinds, rows.valid))
    is_point = (sparse[..., 2:] == -1).all(-1).numpy()
    assert ((kinds == RegionKind.POINT) == is_point).all()
    assert valid[1, 0], "a point at (0, 0) is a point"
    quirky = np.asarray(reference_rows(sparse, quirks=True).valid).reshape(valid.shape)
    assert not quirky[1, 0] and quirky[0].all()
