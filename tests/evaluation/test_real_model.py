"""The benchmark and the session on a real, untrained SPHINX-V of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bestiary.evaluation.regions import RegionsBenchmark
from bestiary.inference.session import Session
from bestiary.mllm import MultimodalLM
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.processor import SphinxVProcessor

from ..variants.sphinx_tiny import DECODER, VISION
from .scenes import scene

TOKENIZER = str(Path(__file__).parents[1] / "goldens" / "sphinxv" / "data" / "tokenizer.model")
SAMPLES = [scene(i).sample for i in range(5)]


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    torch.manual_seed(0)
    vocab_size = load_tokenizer(TOKENIZER).vocab_size
    return build_sphinx_v(vision=VISION, decoder={**DECODER, "vocab_size": vocab_size}, prompt_dim=8, num_slots=4)


@pytest.fixture(scope="module")
def processor(model: MultimodalLM) -> SphinxVProcessor:
    return SphinxVProcessor(
        tokenizer=TOKENIZER,
        canvas_px=VISION["canvas_px"],
        image_rows=model.vision.image_rows,  # type: ignore[union-attr, arg-type]
        num_views=model.vision.num_views,  # type: ignore[union-attr, arg-type]
        num_slots=4,
        max_tokens=400,
    )


def test_answers_do_not_depend_on_the_batch(model: MultimodalLM, processor: SphinxVProcessor, tmp_path: Path) -> None:
    model.train()
    lines = []
    for batch_size in (1, 4):
        benchmark = RegionsBenchmark(batch_size=batch_size, max_new_tokens=6, semantic_similarity=False)
        report = benchmark.run(model, processor, SAMPLES, tmp_path / str(batch_size))
        lines.append([(p.key, p.prediction, p.control) for p in report.predictions])
        saved = json.loads((tmp_path / str(batch_size) / "report.json").read_text())
        assert saved["metrics"]["accuracy"]["n"] == sum(len(s.regions) for s in SAMPLES)
    assert lines[0] == lines[1]
    assert any(prediction for _, prediction, _ in lines[0])
    assert model.training


def test_a_session_answers_as_the_benchmark_does(
    model: MultimodalLM, processor: SphinxVProcessor, tmp_path: Path
) -> None:
    benchmark = RegionsBenchmark(max_new_tokens=6, semantic_similarity=False, panel_pictures=0)
    report = benchmark.run(model.eval(), processor, SAMPLES, tmp_path)
    session = Session(model, processor)
    for sample, prediction in zip(SAMPLES, report.predictions, strict=True):
        answer = session.respond(sample.images[0], sample.turns[0].text, sample.regions, max_new_tokens=6)
        assert answer == prediction.prediction
