"""The published sets: their settings, and real annotations from their files through shards to a score."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from bestiary.compose import build, register_schema, typed
from bestiary.config import Evaluation
from bestiary.evaluation.question_benchmark import QuestionBenchmark
from bestiary.evaluation.questions import Answered
from bestiary.evaluation.suite import sources_of
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.sphinx.processor import SphinxProcessor
from data_modules.adapters.benchmark import BenchmarkAdapter
from data_modules.heldout import Samples
from data_modules.writing import Plan, write_source
from tests.data_modules.adapters.making import SHARED, needs
from tests.variants.sphinx_tiny import DECODER, VISION

from .asked import photo

ROOT = Path(__file__).parents[2]
ANNOTATIONS = SHARED / "eval_annotations"
TOKENIZER = ROOT / "tests" / "goldens" / "sphinx" / "tiny_tokenizer.model"
NAMES = {"Qbench_dev": "qbench_dev"}
"""Published name -> ours, where they differ."""


@pytest.fixture(scope="module")
def suite() -> Evaluation:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        asked = typed(compose("eval", ["run=none", "suite=sphinx", "+benchmark@suite.mmmu_val=mmmu_val"]))
    assert isinstance(asked, Evaluation)
    return asked


def questions_file(source: str, suite: Evaluation) -> Path:
    """The annotation file that a source's command reads."""
    words = suite.data.heldout[source].make.split()
    return ANNOTATIONS / Path(words[words.index("benchmark") + 1]).name


def test_every_published_set_finds_its_source_and_the_command_that_makes_it(suite: Evaluation) -> None:
    for name, node in suite.suite.items():
        benchmark = build(node)
        assert isinstance(benchmark, QuestionBenchmark) and benchmark.name == name
        assert sources_of(name, benchmark, suite.data.heldout) == [name]
        source = suite.data.heldout[name]
        assert source.path == f"benchmark/{name}" and source.make.startswith("bestiary shards write benchmark ")
        assert source.origin and source.licence
    missing = {"mme": asdict(suite.data.heldout["mme"])}
    with pytest.raises(ValueError, match=r"benchmark/mme does not exist.*`bestiary shards write benchmark .*MME_"):
        Samples(missing)


@needs("eval_annotations")
def test_prompts_lengths_and_metrics_are_those_of_the_published_configuration(suite: Evaluation) -> None:
    metrics = {
        "mme_score": "Mme", "vqa_score": "VqaAccuracy", "anls": "Anls", "relaxed_accuracy": "RelaxedAccuracy",
        "accuracy": ("ExactMatch", "MultipleChoice"), "miou0.5": "BoxOverlap",
    }  # fmt: skip
    published = json.loads((ANNOTATIONS / "annotation_config.json").read_text())
    told = {NAMES.get(name, name): entry for name, entry in published.items() if entry["metric"] != "ureader"}
    assert set(told) == set(suite.suite) - {"pope", "mmmu_val"}
    for name, entry in told.items():
        benchmark = build(suite.suite[name])
        assert benchmark.prompt == entry["prompt"]["input"], name
        assert benchmark.answer_start == entry["prompt"]["output"], name
        assert benchmark.max_new_tokens == entry["max_new_tokens"], name
        assert type(benchmark.rule).__name__ in metrics[entry["metric"]], name
        assert questions_file(name, suite).name == Path(entry["test"]).name


def read(source: str, suite: Evaluation, folder: Path, images: Path | None = None) -> Samples:
    """A set's annotations as held-out shards."""
    adapter = BenchmarkAdapter(
        questions_file(source, suite),
        images,
        source=source,
        without_images=images is None,
        keep_empty="--option keep_empty=true" in suite.data.heldout[source].make,
    )
    write_source(adapter, Plan(folder / source, source, workers=1))
    return Samples({source: {"path": str(folder / source)}})


@pytest.mark.slow
@needs("eval_annotations")
def test_gold_answers_score_all_and_answers_to_other_questions_little(suite: Evaluation, tmp_path: Path) -> None:
    for source in suite.data.heldout:
        if source in ("pope", "vqav2_val", "ocrvqa_val"):
            continue  # no file of theirs is among the real ones
        benchmark: QuestionBenchmark = build(suite.suite[source])
        questions = benchmark.questions(read(source, suite, tmp_path))
        gold = [benchmark.rule.gold(question) for question in questions]
        first, scores = _scores(benchmark, questions, gold)
        perfect = {"perception": 200.0 * 1}.get(first, 1.0)  # MME's forty are all of one task
        assert scores[first] == pytest.approx(perfect), source
        others = random.Random(0).sample(gold, len(gold))
        lowered = 0.75 if {str(g).lower() for g in gold} <= {*"abcde", "yes", "no", "true", "false"} else 0.5
        assert _scores(benchmark, questions, others)[1][first] <= lowered * perfect, source


def _scores(benchmark: QuestionBenchmark, questions: Any, answers: list[str]) -> tuple[str, dict[str, float]]:
    items = [Answered(q, a, None) for q, a in zip(questions, answers, strict=True)]
    metrics = benchmark.rule.metrics(items, seed=0, quirks=False)
    return next(iter(metrics)), {name: metric.value for name, metric in metrics.items()}


@pytest.mark.slow
@needs("eval_annotations")
def test_all_yes_scores_half_of_mmes_real_questions(suite: Evaluation, tmp_path: Path) -> None:
    benchmark: QuestionBenchmark = build(suite.suite["mme"])
    questions = benchmark.questions(read("mme", suite, tmp_path))
    _, scores = _scores(benchmark, questions, ["Yes"] * len(questions))
    assert scores == {"perception": 50, "score": 50, "accuracy": 0.5, "accuracy_plus": 0}


@pytest.mark.slow
@needs("eval_annotations")
@pytest.mark.parametrize("source", ["mme", "scienceqa_test", "refcoco_testB"])
def test_a_random_model_is_scored_on_real_questions_from_end_to_end(
    source: str, suite: Evaluation, tmp_path: Path
) -> None:
    for number, record in enumerate(json.loads(questions_file(source, suite).read_text())):
        path = tmp_path / "pictures" / record["image_path"]  # ours in their places: the sets' own are not at hand
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, (33, 50) if source == "refcoco_testB" else (40, 30)))
    samples = read(source, suite, tmp_path, images=tmp_path / "pictures")
    torch.manual_seed(0)
    decoder = {**DECODER, "vocab_size": load_tokenizer(str(TOKENIZER)).vocab_size, "max_seq_len": 2000}
    model = build_sphinx(vision=VISION, decoder=decoder)
    processor = SphinxProcessor(
        tokenizer=str(TOKENIZER), canvas_px=VISION["canvas_px"], max_tokens=2000,
        image_rows=model.vision.image_rows, num_views=model.vision.num_views,  # type: ignore[union-attr, arg-type]
    )  # fmt: skip
    lines = []
    for batch_size in (8, 3):
        node = suite.suite[source] | {
            "max_samples": 4,
            "batch_size": batch_size,
            "decoding": "reference",
            "max_new_tokens": 6,
        }
        report = build(node).run(model, processor, samples.of([source]), tmp_path / "eval")
        lines.append((tmp_path / "eval" / "predictions.jsonl").read_text())
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == report.counts["questions"] >= 4
    assert report.counts["pictures"] == 4 and (tmp_path / "eval" / "panel.png").stat().st_size > 10_000
    first = next(iter(json.loads((tmp_path / "eval" / "report.json").read_text())["metrics"].values()))
    assert first["value"] < (100 if source == "mme" else 0.9) and first["control"] is not None
