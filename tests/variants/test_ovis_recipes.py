"""Ovis' recipes: which parts each stage trains, the three published models, the data sets, the baseline connectors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.compose import build
from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.training.parents import load_first_weights
from bestiary.training.stages import apply_stage
from bestiary.variants.ovis import weights
from bestiary.variants.ovis.module import OvisModule, trained_parts
from data_modules.adapters.ovis import TEMPLATE_1_0
from data_modules.embedded.plain import CAPTION_TEMPLATE
from experiments.ovis_vs_mlp import __main__ as study
from experiments.ovis_vs_mlp import report
from tests.test_compose import ROOT, composed

STAGES = ("ovis_s1", "ovis_s2", "ovis_s3")


@pytest.fixture(scope="module")
def stage_1() -> Run:
    """Stage 1 at demo scale, composed once."""
    return composed("experiment=ovis_s1")


def with_vision(run: Run, **changes: Any) -> MultimodalLM:
    """The run's model with other arguments of its visual tokenizer."""
    model: MultimodalLM = build(
        {**run.model.build, "vision": {**run.model.build["vision"], **changes}}, attention="sdpa"
    )
    return model


def on_meta(run: Run) -> MultimodalLM:
    with torch.device("meta"):
        model: MultimodalLM = build(run.model.build, attention="sdpa")
    return model


def trained(run: Run, model: MultimodalLM) -> set[str]:
    """Published names of what a stage trains."""
    apply_stage(model, run.stage)
    return set(weights.to_reference({name: p for name, p in model.named_parameters() if p.requires_grad}))


@pytest.mark.parametrize("scale", ["demo", pytest.param("paper", marks=pytest.mark.slow)])
def test_a_stage_trains_the_published_parts(scale: str) -> None:
    runs = [composed(f"experiment={stage}", f"scale={scale}") for stage in STAGES]
    model = on_meta(runs[0])
    every = set(weights.manifest(model))
    first = trained(runs[0], model)
    assert trained_parts(model) == {"visual_tokenizer.backbone": 16, "visual_tokenizer.head": 3, "vte": 1}
    second, third = trained(runs[1], model), trained(runs[2], model)
    last = len(model.vision.backbone.encoder.layers) - 1  # type: ignore[union-attr]
    block = {name for name in every if f".encoder.layers.{last}." in name}
    head = {"visual_tokenizer.head.0.weight", "visual_tokenizer.head.1.weight", "visual_tokenizer.head.1.bias"}
    assert len(block) == 16 and first == block | head | {"vte.weight"}  # reference/ovis.md 2: 20 tensors
    assert second == {name for name in every if name.startswith(("visual_tokenizer.", "vte."))}
    assert third == every


def test_stage_1_draws_the_last_block_of_the_shipped_encoder_anew_and_no_other_stage_does(
    stage_1: Run,
) -> None:
    run = stage_1
    model: MultimodalLM = build(run.model.build, attention="sdpa")
    own = set(model.state_dict())
    given = load_first_weights(model, run.model.weights, {}, unused=run.model.unused_weights)
    assert own - given == {name for name in own if name.startswith(("vision.head.", "vision.table."))}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    OvisModule(model, run.stage, redraw_from=run.model.module["redraw_from"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rsplit(".", 2)[0] for name in changed} >= {"vision.backbone.encoder.layers.2.mlp"}
    assert all(name.startswith("vision.backbone.encoder.layers.2.") for name in changed)
    later = OmegaConf.load(ROOT / "conf/experiment/ovis_s2.yaml")
    assert "model" not in later


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "count", "lr", "chat_format"),
    [  # reference/ovis.md 1.8 and 2
        ([], 8_696_180_732, 2e-5, "qwen"),
        (["decoder=qwen1_5_14b"], 15_276_364_796, 2e-5, "qwen"),
        (["decoder=llama3_8b"], 9_005_117_436, 1e-5, "llama3"),
    ],
)
def test_one_option_chooses_a_published_model_with_its_rate(
    overrides: list[str], count: int, lr: float, chat_format: str
) -> None:
    run = composed("experiment=ovis_s3", "scale=paper", *overrides)
    assert sum(p.numel() for p in on_meta(run).parameters()) == count
    assert run.stage.optimizer.lr == lr
    assert run.model.processor["chat_format"] == chat_format
    assert run.model.weights[0] == run.model.decoder_weights
    earlier = composed("experiment=ovis_s2", "scale=paper", *overrides)
    assert earlier.stage.optimizer.lr == 1e-4


@pytest.mark.slow
def test_the_mixes_hold_the_published_sets_each_seen_once_and_a_command_that_writes_it() -> None:
    mixes = [composed(f"experiment={stage}", "scale=paper").data for stage in STAGES]
    assert [len(mix.sources) for mix in mixes] == [1, 6, 12]  # reference/ovis.md 2
    assert [mix.max_tokens for mix in mixes] == [1024, 2048, 2048]
    names = [name for mix in mixes for name in mix.sources]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "conf/dataset/ovis").glob("*.yaml"))
    for mix in mixes:
        for name, source in mix.sources.items():
            words = shlex.split(source.make.replace("<data.root>", "data"))
            assert words[:4] == ["bestiary", "shards", "write", "ovis"]
            assert words[-1] == f"data/{source.path}" and name in words
            assert source.repeat == 1.0
    captions = shlex.split(mixes[0].sources["coyo-10m"].make.replace("<data.root>", "data"))
    assert f"caption_template={TEMPLATE_1_0}" in captions
    assert TEMPLATE_1_0 == CAPTION_TEMPLATE


def test_a_baseline_connector_has_the_same_rows_and_marks_and_about_as_many_parameters(stage_1: Run) -> None:
    forms, sizes = [], {}
    for connector, width in (("table", None), ("mlp", 512), ("linear", None)):
        vision: Any = with_vision(stage_1, connector=connector, connector_width=width).vision
        pixels = torch.randint(0, 256, (2, 4, vision.canvas_px, vision.canvas_px), dtype=torch.uint8)
        rows, marks = vision(pixels, torch.tensor([0, 1, 1]))
        (rows.square().mean() + marks.square().mean()).backward()
        assert vision.table.weight.grad is not None and vision.head[0].weight.grad is not None
        sizes[connector] = sum(p.numel() for part in (vision.head, vision.table) for p in part.parameters())
        forms.append((rows.shape, marks.shape, vision.layout))
        if connector != "table":
            with pytest.raises(ValueError, match="has no visual words"):
                vision.probabilities(vision.features(pixels))
    assert forms[0] == forms[1] == forms[2]
    assert sizes["mlp"] == pytest.approx(sizes["table"], rel=0.01)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"connector": "mpl"}, "connector='mpl' is unknown; choose one of table, linear, mlp"),
        ({"connector": "mlp", "tokenize": "st_argmax"}, "connector=mlp has no visual words to choose"),
        ({"connector_width": 3}, "connector_width=3 is the inner width of connector=mlp"),
    ],
)
def test_a_connector_that_does_not_exist_or_has_no_words_to_choose_is_refused(
    stage_1: Run, change: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        with_vision(stage_1, **change)


def test_the_study_of_connectors_tells_its_own_results_and_plots_them(tmp_path: Path) -> None:
    folder = ROOT / "experiments/ovis_vs_mlp"
    found = json.loads((folder / "results.json").read_text())
    assert report.table(found) in (folder / "README.md").read_text()
    assert all(set(stages) == set(study.STAGES) for seeds in found["scores"].values() for stages in seeds.values())
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
