"""Monkey's recipes: what each trains, what may start it, the data sets and the estimate for small GPUs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bestiary.compose import build
from bestiary.config import Run, Tuning
from bestiary.mllm import MultimodalLM
from bestiary.training.assembly import show_plan
from bestiary.training.parents import export_weights, load_parent
from bestiary.training.stages import apply_stage
from bestiary.training.tuning import plan_tuning
from bestiary.variants.monkey import weights
from bestiary.variants.monkey.model import build_monkey
from tests.test_compose import ROOT, composed
from tests.training.tiny import tiny_stage
from tests.variants.test_packed_equals_alone import MONKEY_DECODER, MONKEY_VISION

SIZES = {  # all parameters, those that train, positions of a picture (reference/monkey.md 2.1, 3.3 and 3.4)
    "monkey_finetune": (9_708_053_824, 7_848_497_728, 1280),
    "monkey_lora_3090": (9_708_053_824 + 56_098_944, 51_118_656 + 76_054_528 + 56_098_944, 1280),
    "monkey_1344x896": (
        9_708_053_824 + 76_677_984 - 51_118_656, 7_848_497_728 + 76_677_984 - 51_118_656, 1792,
    ),
}  # fmt: skip


def is_published_to_train(name: str, recipe: str) -> bool:
    """The published rule on published names: resampler and adapters, and, but on small GPUs, all of the decoder."""
    if name.startswith("transformer.visual.attn_pool.") or "lora" in name:
        return True
    return recipe != "monkey_lora_3090" and not name.startswith("transformer.visual.")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_has_the_published_size_and_trains_the_published_parts(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = composed(f"experiment={recipe}", "scale=paper", "cluster=zero2", "cluster.memory_gb=24")
    with torch.device("meta"):
        model: MultimodalLM = build(run.model.build, attention="sdpa")
    apply_stage(model, run.stage)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every, trained = set(weights.manifest(model)), set(weights.to_reference(named))
    assert trained == {name for name in every if is_published_to_train(name, recipe)}
    total, learned, positions = SIZES[recipe]
    assert sum(p.numel() for p in model.parameters()) == total and sum(p.numel() for p in named.values()) == learned
    assert model.layout["image_rows"] == positions
    assert show_plan(run, {"somewhere": "source 'x': nowhere"}, _no_stream) == 0
    told = capsys.readouterr().out
    assert re.search(rf"^total +{total:,} +{learned:,}$", told, re.MULTILINE)
    assert all(f"  {name} " in told for name in run.data.sources)
    fits = re.search(r"total +([\d.]+) of 24: (fits|.* too much)", told)
    assert fits and (fits[2] == "fits") == (recipe == "monkey_lora_3090")
    assert run.model.processor["question"] == "{}"


def _no_stream(**_: Any) -> Any:
    return None  # data is missing: nobody may ask it for the mix


@pytest.mark.slow
def test_the_mix_holds_the_published_sets_each_seen_once_in_rows_of_the_published_length() -> None:
    run = composed("experiment=monkey_finetune", "scale=paper")
    stage, data = run.stage, run.data
    assert sorted(data.sources) == sorted(path.stem for path in (ROOT / "conf/dataset/monkey").glob("*.yaml"))
    assert len(data.sources) == 14 and {source.repeat for source in data.sources.values()} == {1.0}
    for name, source in data.sources.items():
        words = shlex.split(source.make.replace("<data.root>", "data"))
        assert words[:4] == ["bestiary", "shards", "write", "qwen_vl"] and words[-1] == f"data/{source.path}"
        assert name in words and source.origin and source.licence
    assert (data.max_tokens, stage.batch_size, stage.micro_batch, stage.clip_norm) == (2048, 128, 1, 1.0)
    optimizer = stage.optimizer
    assert (optimizer.lr, [*optimizer.betas], optimizer.weight_decay) == (1e-5, [0.9, 0.95], 0.1)
    assert (stage.schedule.warmup, stage.schedule.shape) == (0.02, "cosine")
    longer = composed("experiment=monkey_1344x896", "scale=paper").data
    assert longer.max_tokens - 1794 == data.max_tokens - 1282 and longer.sources == data.sources


def model_of(image_px: Any = 32, **changes: Any) -> MultimodalLM:
    vision = MONKEY_VISION | {"image_px": image_px} | changes.pop("vision", {})
    return build_monkey(vision=vision, decoder=MONKEY_DECODER, **changes)


def run_of(recipe: str) -> Run:
    return composed(f"experiment={recipe}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four windows, and Qwen-VL, which has no adapters and says no stage."""
    path = tmp_path_factory.mktemp("parents")
    monkey = model_of()
    export_weights(monkey, path / "monkey.safetensors", stage="monkey_finetune", identity=monkey.identity)
    save_file(model_of(vision={"adapters": None}).state_dict(), path / "qwen_vl.safetensors")
    return path


@pytest.mark.slow
def test_a_monkey_starts_from_qwen_vl_or_a_monkey_of_its_own_grid(folder: Path) -> None:
    stage, small = run_of("monkey_finetune").stage, run_of("monkey_lora_3090").stage
    wide = run_of("monkey_1344x896").stage
    for name in ("monkey", "qwen_vl"):
        for made, its_stage in ((model_of(), stage), (model_of(decoder_lora={"rank": 2}), small)):
            load_parent(made, folder / f"{name}.safetensors", stage=its_stage, identity=made.identity)
    six = model_of([32, 48])
    load_parent(six, folder / "qwen_vl.safetensors", stage=wide, identity=six.identity)
    for other in (six, model_of([16, 64])):  # six windows, and four in another grid
        with pytest.raises(ValueError, match=r"made with windows=2 x 2, this run has windows=\d x \d; their adapters"):
            load_parent(other, folder / "monkey.safetensors", stage=wide, identity=other.identity)


def test_a_quantised_decoder_does_not_lose_the_models_own_adapters_unsaid() -> None:
    stage = tiny_stage(train=["decoder.*_lora.*"], freeze=[])
    with torch.device("meta"):
        model = model_of(decoder_lora={"rank": 2})
    line = r"tuning.quantize=nf4: decoder.model.layers.0.self_attn.q_proj and \d+ more layers have .*decoder_lora=null"
    with pytest.raises(ValueError, match=line):
        plan_tuning(model, stage, Tuning(quantize="nf4"))
