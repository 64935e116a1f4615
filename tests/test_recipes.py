"""Recipes: published sizes, the source of every number, what may start what, the switches of their YAML."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.compose import build
from bestiary.config import Run
from bestiary.language.decoder import Decoder, llama_config
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import build_pieces, with_processor
from bestiary.training.assembly import cache_arguments, check_start, make_ready, show_plan, stream_arguments
from bestiary.training.parents import load_first_weights
from bestiary.training.stages import apply_stage
from data_modules.datamodule import StreamDataModule
from data_modules.sources import StreamError
from tests.test_compose import ROOT, composed

MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("sphinx*.yaml"))
RECIPES = sorted(path.stem for path in (ROOT / "conf/experiment").glob("sphinx_*.yaml"))
TOKENIZER = "src/bestiary/variants/sphinx_v/assets/tokenizer.model"
SOURCED = re.compile(
    r"(sphinx(_v)?|ovis|monkey)\.md|params\.json|config\.json|BLIP-2's configuration|unpublished, our choice"
)
NUMBER = re.compile(r"(?<![\w./'-])-?\d[\d_]*(\.\d+)?(e-?\d+)?(?![\w'])")


def _on_meta(run: Run) -> MultimodalLM:
    with torch.device("meta"):
        model: MultimodalLM = build(run.model.build, attention="sdpa")
    return model


@pytest.mark.parametrize(
    ("name", "rows", "views"),
    [
        pytest.param("sphinx", 291, 1, marks=pytest.mark.slow),
        pytest.param("sphinx_1k", 1455, 5, marks=pytest.mark.slow),
        pytest.param("sphinx_v2_1k", 1455, 5, marks=pytest.mark.slow),
        pytest.param("sphinx_672", 2910, 10, marks=pytest.mark.slow),
    ],
)
def test_the_family_has_the_published_size_whatever_its_views(name: str, rows: int, views: int) -> None:
    run = composed(f"model={name}", "stage=sphinx_stage2", "scale=paper")
    model = _on_meta(run)
    apply_stage(model, run.stage)
    assert sum(p.numel() for p in model.parameters()) == 16_462_228_609  # reference/sphinx.md 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_048_673_280  # the same
    assert (model.layout["image_rows"], model.layout["num_views"]) == (rows, views)


@pytest.mark.slow
@pytest.mark.parametrize(
    # As Meta's params.json make them; transformers counts the same in the published folders.
    ("size", "count"),
    [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)],
)
def test_a_decoder_is_chosen_with_its_size_and_its_weights(size: str, count: int) -> None:
    run = composed("model=sphinx", "scale=paper", f"decoder=llama2_{size}")
    sizes = {key: value for key, value in run.model.build["decoder"].items() if key != "_args_of_"}
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(llama_config(**sizes)).parameters()) == count
    assert run.model.weights[0] == run.model.decoder_weights == f"weights/llama-2-{size}"


@pytest.mark.slow
def test_each_choice_of_a_decoder_replaces_every_number_of_another() -> None:
    small = composed("model=sphinx", "scale=demo", "decoder=llama2_7b").model.build["decoder"]
    assert small == composed("model=sphinx", "scale=paper", "decoder=llama2_7b").model.build["decoder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_the_shipped_weights_at_demo_scale(name: str) -> None:
    run = composed(f"model={name}")
    pieces = build_pieces(run)
    weights = dict(unused=run.model.unused_weights)
    found = load_first_weights(pieces.model, run.model.weights, pieces.identity, **weights)
    drawn = {
        name for name in pieces.model.state_dict() if name.startswith("regions.proj.")
    }  # stage 1 of SPHINX-V learns it
    assert found == set(pieces.model.state_dict()) - drawn
    if run.model.unused_weights:
        with pytest.raises(ValueError, match=r"holds 11 that the model has not \(regions"):
            load_first_weights(pieces.model, run.model.weights, pieces.identity)


@pytest.mark.slow
def test_switches_are_in_the_yaml() -> None:
    run = composed(
        "experiment=sphinx_stage2",
        "model.build.vision.clip.activation=quick_gelu",
        "model.build.decoder.rope_scaling=0.5",
        "model.processor.template=nov2023",
    )
    pieces = build_pieces(run)
    config = pieces.model.decoder.config
    assert config.rope_parameters["factor"] == 2.0
    assert pieces.model.vision.clip.tower.config.hidden_act == "quick_gelu"  # type: ignore[union-attr]
    assert pieces.processor.template == "nov2023"  # type: ignore[attr-defined]
    for template in ("current", "alpaca", "document"):
        run.model.processor["template"] = template
        assert with_processor(run, pieces.model).processor.template == template  # type: ignore[attr-defined]


PARENTS = {
    "sphinx_stage1": (set(), False),
    "sphinx_stage2": ({"sphinx_stage1", "sphinx_stage2"}, False),
    "sphinx_1k_stage1": ({"sphinx_stage1"}, True),
    "sphinx_1k_stage2": ({"sphinx_stage1", "sphinx_stage2", "sphinx_1k_stage1", "sphinx_1k_stage2"}, False),
    "sphinx_v2_1k_finetune": ({"sphinx_1k_stage2", "sphinx_v2_1k_finetune"}, True),
    "sphinxv_stage1": ({"sphinx_1k_stage2", "sphinx_v2_1k_finetune"}, True),
    "sphinxv_stage2": ({"sphinxv_stage1", "sphinxv_stage2"}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARENTS)
def test_a_stage_without_the_parent_it_needs_is_refused_before_anything_is_built(name: str) -> None:
    run = composed(f"experiment={name}", "scale=paper")
    parents, is_optional = PARENTS[name]
    assert (set(run.stage.parents), run.stage.parent_optional) == (parents, is_optional)
    missing = "weights/llama-2/tokenizer.model does not exist"
    needed = bool(parents) and not is_optional
    with pytest.raises((ValueError, FileNotFoundError), match="give parent=" if needed else missing) as error:
        check_start(run)
    assert "\n" not in str(error.value)
    run.resume = "auto"
    check_start(run)


@pytest.mark.slow
def test_a_tokenizer_of_another_size_is_refused_by_the_plan_and_by_the_run() -> None:
    run = composed("experiment=sphinx_1k_stage2", "scale=paper", f"model.processor.tokenizer={TOKENIZER}")
    line = r"the decoder has 32000 token ids but the tokenizer .*tokenizer.model has 768; set .*vocab_size, or use"
    with pytest.raises(ValueError, match=line):
        show_plan(run, {"somewhere": "a source is missing"}, _no_stream)
    small = composed("experiment=sphinx_1k_stage2", "model.build.decoder.vocab_size=700")
    with pytest.raises(ValueError, match=r"has 700 token ids but the tokenizer .* has 768; set"):
        build_pieces(small)


@pytest.mark.slow
def test_rows_shorter_than_a_picture_are_refused_with_both_numbers() -> None:
    run = composed("experiment=sphinx_1k_stage2", "scale=paper", "data.max_tokens=512", "decoder=llama_demo")
    with pytest.raises(ValueError, match=r"max_tokens=512 leaves no room .* takes 1455 positions .* well above 14\d\d"):
        show_plan(run, {"somewhere": "a source is missing"}, _no_stream)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipe_is_planned_without_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = composed(f"experiment={name}", "scale=paper")
    assert show_plan(run, {"somewhere": "source 'x': nowhere"}, _no_stream) == 0
    told = capsys.readouterr().out
    assert re.search(r"^total +16,462,228,609 +13,048,673,280$", told, re.MULTILINE)
    assert all(f"  {name} " in told for name in run.data.sources)
    assert "tokenizer: weights/llama-2/tokenizer.model does not exist" in told
    assert ("give parent=" in told) == bool(run.stage.parents and not run.stage.parent_optional)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0), ("look_ahead", 0), ("chunk", 0), ("max_views", -1)])
def test_a_dry_run_refuses_numbers_that_the_run_refuses_whatever_is_missing(name: str, value: int) -> None:
    run = composed("experiment=sphinxv_stage2", f"data.{name}={value}")
    stream = partial(StreamDataModule, sources={}, **stream_arguments(run))
    with pytest.raises(StreamError, match=name):
        show_plan(run, {"somewhere": "a source is missing"}, stream)


@pytest.mark.parametrize("dry_run", ["dry_run=true", "dry_run=false"])
def test_data_that_would_have_to_be_made_at_an_address_is_refused(
    dry_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = ["experiment=sphinxv_stage2", "cluster.data_root=http://u:SE/CRET@127.0.0.1:1/set", dry_run]
    with pytest.raises(ValueError, match=r"http://\*\*\*@127\.0\.0\.1:1/set/embedded is an address") as caught:
        make_ready(composed(*address), tmp_path)
    assert "CRET" not in str(caught.value) and "data.prepare=null" in str(caught.value)
    make_ready(composed(*address[:2], "data.prepare=null", "dry_run=true"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_fetched_is_kept_below_a_data_root_that_is_a_folder() -> None:
    for overrides, place in (
        (["cluster.data_root=/data"], "/data/.remote"),
        (["cluster.data_root=http://u:p@h/x"], None),
        (["cluster.data_root=file:///data"], None),
        (["cluster.data_root=http://u:p@h/x", "data.cache_root=/cache"], "/cache"),
    ):
        run = composed("experiment=sphinxv_stage2", *overrides, "data.cache_gb=3")
        assert cache_arguments(run) == {"cache_root": place, "cache_gb": 3.0}
        assert stream_arguments(run)["cache_root"] == place


def test_a_plan_prints_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    address = "http://u:SECRET@h/x?sig=SECRET"
    run = composed("experiment=sphinxv_stage2", f"data.sources.natural_stage2.path='{address}'")
    show_plan(run, {"somewhere": "a source is missing"}, _no_stream)
    out = capsys.readouterr().out
    assert "http://***@h/x?***" in out and "SECRET" not in out


def _no_stream(**_: Any) -> Any:
    return None  # data is missing: nobody may ask it for the mix


def _paper_files() -> list[Path]:
    conf = ROOT / "conf"
    named = [*conf.glob("family/*.yaml"), *conf.glob("stage/sphinx_*.yaml"), conf / "scale/family/sphinx_paper.yaml"]
    scaled = [path for path in conf.glob("scale/*/sphinx_*/paper.yaml") if path.parent.name != "sphinx_v"]
    ovis = [path for part in ("stage/ovis_*", "scale/*/ovis*/paper", "scale/stage/ovis_s3/lr/*",
                          "scale/*/monkey*/paper", "stage/monkey_*")
            for path in conf.glob(f"{part}.yaml")]  # fmt: skip
    decoders = [path for path in conf.glob("decoder/*.yaml") if not path.stem.endswith("_demo")]
    return sorted([*named, *scaled, *ovis, *decoders, *conf.glob("model/*.yaml")])


@pytest.mark.parametrize("path", _paper_files(), ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_every_number_of_a_published_recipe_names_its_source(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = " ".join(line for line in lines if line.startswith("#"))
    for number, line in enumerate(lines, 1):
        value, _, comment = line.partition("#")
        if NUMBER.search(value) and not SOURCED.search(comment):
            in_header = path.parent.name in ("model", "family") and "views" in value and SOURCED.search(header)
            assert in_header, f"line {number} has a number without a source: {line}"
