"""Efficient tuning: adapters, norms alone, frozen parts in half precision; what trains, what is saved and merged."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from bestiary.cli import main as bestiary
from bestiary.config import Cluster, Optimizer, Run, Stage, Tuning, check_run
from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.tuning import check_quantization, is_adapter, merged_weight, plain_name
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import load_saved_run
from bestiary.saved_tuning import base_sha256, check_whole, frozen_dtype
from bestiary.saved_weights import SavedWeights, open_weights
from bestiary.schema import Batch, Example
from bestiary.training.flops import estimate
from bestiary.training.stages import apply_stage, build_optimizer, cast_frozen, parameter_rows
from bestiary.training.tuning import apply_plan, plan_tuning
from bestiary.weights.merging import adapter_tensors, merge, write_adapter
from data_modules.collate import collate_rows
from tests.training.tiny import tiny_stage

ROOT = Path(__file__).parents[2]
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "max_seq_len": 64, "multiple_of": 16}
LORA = Tuning(method="lora", rank=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"])
STAGE = tiny_stage(train=["decoder.*", "extra.*"], freeze=[], optimizer=Optimizer(lr=1e-2, weight_decay=0.1))
NO_BNB = importlib.util.find_spec("bitsandbytes") is None


class Text(MultimodalLM):
    """A decoder and one part beside it that the stage trains."""

    def __init__(self) -> None:
        super().__init__(Decoder(llama_config(**SIZES)))
        self.extra = nn.Linear(3, 2)


def model(tuning: Tuning = Tuning(), stage: Stage = STAGE) -> Text:  # noqa: B008 - never changed
    torch.manual_seed(0)
    made = Text()
    apply_plan(made, tuning, plan_tuning(made, stage, tuning), seed=1)
    apply_stage(made, stage)
    return made


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return collate_rows([[example(rng.integers(3, 40, size=n)) for n in (9, 5)], [example(rng.integers(3, 40, 12))]])


def example(ids: np.ndarray) -> Example:
    ids = ids.astype(np.int64)
    nothing = np.zeros((0, 3, 4, 4), np.uint8)
    return Example(ids, ids.copy(), np.zeros(len(ids), np.uint8), nothing, None, 0, str(ids), "a", "text")


def learn(made: Text, steps: int = 3) -> list[float]:
    optimizer, losses = build_optimizer(made, STAGE.optimizer), []
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(steps):
        loss = made(batch(step)).values.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trains(made: nn.Module) -> set[str]:
    return {name for name, p in made.named_parameters() if p.requires_grad}


def test_full_tuning_changes_nothing_bit_for_bit() -> None:
    torch.manual_seed(0)
    untouched = Text()
    apply_stage(untouched, STAGE)
    assert learn(untouched) == learn(model())


def test_adapters_change_nothing_at_first_and_alone_train_of_the_decoder() -> None:
    tuned = model(LORA)
    assert torch.equal(tuned.eval().logits(batch()), model().eval().logits(batch()))
    inside = {name for name in trains(tuned) if name.startswith("decoder.")}
    assert len(inside) == 2 * 3 * 2 and all(is_adapter(name) for name in inside)
    assert trains(tuned) - inside == {"extra.weight", "extra.bias"}
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    losses = learn(tuned.train(), 8)
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert inside <= changed and changed <= trains(tuned) and losses[-1] < losses[0]


def test_a_stage_of_some_layers_gives_only_them_adapters() -> None:
    tuned = model(LORA, replace(STAGE, train=["decoder.model.layers.1.*"]))
    assert all(".layers.1." in name for name in trains(tuned)) and len(trains(tuned)) == 6


def test_norms_train_alone_and_what_is_named_beside_adapters_trains_whole() -> None:
    norms = {n for n in trains(model(Tuning(method="bias_norm"))) if n.startswith("decoder.")}
    assert norms == {n for n, _ in model().named_parameters() if n.endswith("norm.weight")} and len(norms) == 5
    tuned = model(replace(LORA, beside=["*norm.weight", "lm_head.weight"]))
    assert {n for n in trains(tuned) if n.startswith("decoder.") and not is_adapter(n)} == norms | {
        "decoder.lm_head.weight"
    }


def test_recomputed_blocks_give_adapters_the_same_gradients() -> None:
    gradients = []
    for recomputes in (False, True):
        tuned = model(replace(LORA, dropout=0.2)).train()
        tuned.decoder.set_activation_checkpointing(recomputes)
        torch.manual_seed(3)
        tuned(batch()).values.sum().backward()
        gradients.append([p.grad for p in tuned.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) == 12


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tuned_model_answers_a_batch_as_one_by_one(dtype: torch.dtype | None) -> None:
    tuned = model(LORA)
    learn(tuned)
    if dtype is not None:
        cast_frozen(tuned, dtype)
    prompts = [example(np.arange(3, 3 + n)) for n in (4, 9, 6)]
    together = tuned.generate(prompts, max_new_tokens=5)
    assert together == [tuned.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]


@pytest.mark.parametrize("tuning", [LORA, Tuning(method="bias_norm"), Tuning()])
def test_frozen_parts_in_bfloat16_halve_their_memory_and_stay_close(tuning: Tuning) -> None:
    stage = replace(STAGE, freeze=["decoder.model.layers.0.*"])
    exact, rounded = model(tuning, stage), model(tuning, stage)
    cast_frozen(rounded, torch.bfloat16)
    dtypes = {p.dtype for p in rounded.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in rounded.parameters() if not p.requires_grad} == {torch.bfloat16}
    losses = [m(batch()).values for m in (exact, rounded)]
    assert losses[1].dtype == torch.float32 and torch.allclose(*losses, atol=0.05) and not torch.equal(*losses)
    losses[1].sum().backward()
    gradients = [p.grad for p in rounded.decoder.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_frozen_parts_are_in_bfloat16_unasked_only_where_autocast_rounds_them_anyway() -> None:
    gpu = Cluster(accelerator="gpu", precision="bf16-mixed")
    assert frozen_dtype(Tuning(), gpu) == frozen_dtype(Tuning(frozen_dtype="bfloat16"), Cluster()) == torch.bfloat16
    assert frozen_dtype(Tuning(), Cluster()) is None and frozen_dtype(Tuning(frozen_dtype="float32"), gpu) is None


def test_the_table_and_the_flops_count_adapters() -> None:
    tuned, plain = model(LORA), model()
    adapters = sum(p.numel() for n, p in tuned.named_parameters() if is_adapter(n))
    rows = parameter_rows(tuned, depth=1)
    assert sum(r[1] for r in rows) == sum(p.numel() for p in plain.parameters()) + adapters
    assert dict((part, t) for part, _, t in rows)["decoder"] == adapters
    blocks = sum(p.numel() for n, p in plain.named_parameters() if ".layers." in n and p.ndim > 1)
    assert estimate(tuned).per_token == 4 * blocks + 6 * adapters


def test_merged_weights_compute_what_adapters_do() -> None:
    tuned, merged = model(LORA), model()
    learn(tuned)
    state = tuned.state_dict()
    plain = {plain_name(name): value.clone() for name, value in state.items() if not is_adapter(name)}
    for name in plain:
        a = name.replace(".weight", ".lora_A.default.weight")
        if a in state:
            plain[name] = merged_weight(plain[name], state[a], state[a.replace("lora_A", "lora_B")], 2.0)
    merged.load_state_dict(plain)
    assert (tuned.eval().logits(batch()) - merged.eval().logits(batch())).abs().max() < 1e-5
    assert not torch.allclose(merged.logits(batch()), model().eval().logits(batch()), atol=1e-3)


def test_the_base_hash_sees_values_and_names_not_their_dtype() -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor(2)}
    first = base_sha256(tensors.__getitem__, tensors)
    assert first == base_sha256({**tensors, "a": torch.ones(3).bfloat16()}.__getitem__, tensors)
    assert first != base_sha256({**tensors, "a": torch.tensor([1.0, 1.0, 1.5])}.__getitem__, tensors)
    assert first != base_sha256(tensors.__getitem__, ["a"])


def test_deltas_are_refused_as_a_parent_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="bestiary weights merge"):
        check_whole(SavedWeights(Path("x"), {}, "s", 1, {"base": "1"}, frozenset()))


WRONG: Sequence[tuple[Tuning, list[str], str]] = [
    (replace(LORA, targets=["q_porj"]), ["decoder.*"], "'q_porj' matches no linear layer.*nearest: .*q_proj"),
    (LORA, ["extra.*"], "stage tiny trains nothing of it"),
    (LORA, ["decoder.lm_head.*"], "trains no adapted layer of the decoder"),
    (Tuning(method="bias_norm"), ["decoder.lm_head.*"], "trains no norm or bias"),
    (replace(LORA, beside=["*nrom.weight"]), ["decoder.*"], "tuning.beside.*nearest"),
    (replace(LORA, beside=["*.q_proj.weight"]), ["decoder.*"], "would train twice"),
    (Tuning(quantize="nf4"), ["decoder.*"], "those cannot train; take tuning=lora"),
]


@pytest.mark.parametrize(("tuning", "train", "message"), WRONG)
def test_combinations_without_sense_raise(tuning: Tuning, train: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        plan_tuning(Text(), replace(STAGE, train=train), tuning)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lroa"}, "full, lora, bias_norm"),
        ({"method": "lora", "targets": ["q_proj"], "alpha": 1.0}, "tuning.rank=0 must be positive"),
        ({"method": "lora", "rank": 2, "targets": ["q_proj"], "alpha": -1.0}, "tuning.alpha"),
        ({"method": "lora", "rank": 2, "alpha": 1.0}, "tuning.targets is empty"),
        ({"method": "lora", "rank": 2, "alpha": 1.0, "targets": ["q"], "dropout": 1.0}, "tuning.dropout"),
        ({"rank": 8}, "tuning.rank=8 has no effect with tuning.method=full"),
        ({"quantize": "int4"}, "none, nf4, int8"),
        ({"frozen_dtype": "float16"}, "float32, bfloat16"),
    ],
)
def test_values_out_of_range_raise(changes: dict[str, object], message: str) -> None:
    run = Run(tuning=Tuning(**changes), stage=tiny_stage())  # type: ignore[arg-type]
    run.data.max_tokens = 8
    with pytest.raises(ValueError, match=message):
        check_run(run)


def test_quantised_weights_are_not_sharded() -> None:
    run = Run(tuning=replace(LORA, quantize="nf4"), stage=tiny_stage(), cluster=Cluster(strategy="fsdp2"))
    run.data.max_tokens = 8
    with pytest.raises(ValueError, match="cannot be sharded"):
        check_run(run)


def test_an_exported_adapter_gives_transformers_the_same_logits(tmp_path: Path) -> None:
    tuned = model(LORA)
    learn(tuned)
    write_adapter(adapter_tensors(tuned.state_dict()), LORA, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == LORA.rank
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(llama_config(**SIZES))
    theirs.load_state_dict(model().decoder.state_dict())
    adapted = PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = torch.from_numpy(np.arange(3, 15))[None]
    positions = torch.arange(12)[None]
    decoder = tuned.eval().decoder
    ours = decoder.head(decoder(decoder.embed(ids), positions))
    assert (adapted(input_ids=ids).logits - ours).abs().max() < 1e-5
    with adapted.disable_adapter():
        assert (adapted(input_ids=ids).logits - ours).abs().max() > 1e-3


@pytest.mark.skipif(NO_BNB, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("kind", "apart"), [("nf4", 0.6), ("int8", 0.05)])
def test_quantised_layers_stay_close_and_let_adapters_learn(kind: str, apart: float) -> None:
    tuned = model(replace(LORA, quantize=kind))
    exact = model().eval().logits(batch())
    assert (tuned.eval().logits(batch()) - exact).abs().max() < apart
    held = {name: tuned.decoder.get_submodule(name).weight.dtype for name in ("lm_head", "model.embed_tokens")}
    assert held["lm_head"] in (torch.uint8, torch.int8) and held["model.embed_tokens"] == torch.float32
    losses = learn(tuned.train(), 8)
    assert losses[-1] < losses[0]
    adapters = sum(p.numel() for n, p in tuned.named_parameters() if is_adapter(n))
    assert sum(row[1] for row in parameter_rows(tuned)) == adapters + sum(p.numel() for p in model().parameters())


@pytest.mark.skipif(not NO_BNB, reason="bitsandbytes is installed")
def test_quantising_without_bitsandbytes_names_the_extra() -> None:
    check_quantization("none")
    with pytest.raises(ValueError, match=r"pip install 'bestiary\[cuda\]'"):
        check_quantization("nf4")


@pytest.mark.slow
def test_a_lora_run_saves_deltas_resumes_exactly_and_merges(tmp_path: Path) -> None:
    sizes = "{stage1: 24, stage2: 24, heldout: 4, heldout_tasks: 2}"
    asked = ["experiment=sphinxv_stage2", "tuning=lora", "logger=csv", f"cluster.data_root={tmp_path}/data"]
    asked += [f"++data.prepare.sizes={sizes}", "stage.batch_size=2", "stage.max_steps=6", "stage.checkpoint_every=3"]
    asked += ["stage.eval_at_start=false", "suite.regions.max_samples=1", "tuning.frozen_dtype=bfloat16"]
    whole, again, merged = tmp_path / "whole", tmp_path / "again", tmp_path / "merged"
    train(*asked, f"run_dir={whole}")
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step-000006")
    train(*asked, f"resume={again}")
    first, second = (load_file(run / "checkpoints/step-000006/model.safetensors") for run in (whole, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    inside = {name for name in first if name.startswith("decoder.")}
    assert len(inside) == 4 * 7 * 2 and all(is_adapter(name) for name in inside)

    assert bestiary(["weights", "merge", str(whole), str(merged)]) == 0
    tuned, plain = load_saved_run(whole).model.decoder, load_saved_run(merged).model.decoder
    assert not [name for name in plain.state_dict() if is_adapter(name) or "base_layer" in name]
    for decoder in (tuned, plain):  # in float32, so that nothing but the sums' order differs
        decoder.float().choose_precision()
    ids, positions = torch.arange(3, 40)[None], torch.arange(37)[None]
    logits = [decoder.head(decoder(decoder.embed(ids), positions)) for decoder in (tuned, plain)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()
    with pytest.raises(ValueError, match="holds whole weights already"):
        merge(merged, tmp_path / "twice")
    with pytest.raises(ValueError, match="put the parent or the pretrained files back"):
        merge(whole, tmp_path / "odd", base=merged)
    assert open_weights(merged).stage == "sphinxv_stage2" and not (tmp_path / "odd").exists()
    check_whole(open_weights(merged))


def train(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
