"""Monkey's published benchmarks: how they ask, how they score, and the files they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from bestiary.compose import build, register_schema, typed
from bestiary.config import Evaluation
from bestiary.evaluation.question_benchmark import QuestionBenchmark
from bestiary.evaluation.questions import Answered, question_of
from bestiary.evaluation.rules import Containment
from bestiary.evaluation.suite import sources_of
from data_modules.adapters.benchmark import BenchmarkAdapter

from .asked import ask, photo

ROOT = Path(__file__).parents[2]
HINT = 'When the provided information is insufficient, respond with "Unanswerable".'
METRICS = {  # reference/monkey.md 5: rule and most new tokens of its keys
    **dict.fromkeys(["estvqa_test", "docvqa_test", "infovqa_test", "stvqa_test"], ("Anls", 100)),
    "chartqa": ("RelaxedAccuracy", 100),
    **dict.fromkeys(["deepform", "KLC", "WTQ"], ("Containment", 100)),
    **dict.fromkeys(["gqa_testdev", "ai2diagram_test"], ("Containment", 10)),
    **dict.fromkeys(["vizwiz_val", "okvqa_val", "textvqa_val", "vqav2_val"], ("VqaAccuracy", 10)),
}


@pytest.mark.slow
def test_the_suite_asks_and_scores_every_key_as_published() -> None:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        asked = typed(compose("eval", ["run=none", "suite=monkey"]))
    assert isinstance(asked, Evaluation)
    found: dict[str, QuestionBenchmark] = {name: build(node) for name, node in asked.suite.items()}
    assert {n: (type(b.rule).__name__, b.max_new_tokens) for n, b in found.items()} == METRICS
    for name, benchmark in found.items():
        assert benchmark.name == name and benchmark.min_new_tokens == 1 and benchmark.decoding == "greedy"
        assert benchmark.prompt == (f" {{}} {HINT} Answer:" if name == "vizwiz_val" else "{} Answer:")
        assert sources_of(name, benchmark, asked.data.heldout) == list(benchmark.sources)
        assert all(asked.data.heldout[source].make.startswith("bestiary shards write ") for source in benchmark.sources)
    assert found["gqa_testdev"].rule == Containment(reduced=True)
    assert found["chartqa"].rule.relative_to == "answer"  # type: ignore[attr-defined]


def _answered(answer: str, truth: str) -> Answered:
    return Answered(question_of(ask(0, "What?", truth), 0, category="task"), answer, None)


def test_containment_is_generous_and_says_which_truths_nothing_contains() -> None:
    def score(rule: Containment, answer: str, truth: str) -> float:
        [metric] = rule.metrics([_answered(answer, truth)], seed=0, quirks=False).values()
        return metric.value

    whole, reduced = Containment(), Containment(reduced=True)
    assert score(whole, "concatenate", "cat") == 1 and score(whole, "a dog", "cat") == 0
    said = "The cat is a white animal, not a dog"
    assert score(whole, said, "dog") == 1 and score(reduced, said, "dog") == 0
    notes = whole.notes([_answered("1.5", "1.5"), _answered("x", "x")])
    assert notes == ["1 of 2 questions have truths with a period alone, which no answer contains"]


def test_rows_of_monkeys_evaluation_become_questions_with_all_their_true_answers(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "Which?", "question_id": 7, "answer": ["red", "Red"]},
        {"image": "a.png", "question": "How many?", "question_id": 8, "answer": "3"},
    ]
    (tmp_path / "a.png").write_bytes(photo(0))
    file = tmp_path / "docvqa_test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = BenchmarkAdapter(file, tmp_path, source="docvqa_test")
    samples = [adapter.to_sample(record) for record in adapter.records()]
    assert [sample.domain for sample in samples] == ["document", "document"]
    assert [sample.turns[1].text for sample in samples] == ["red", "3"]
    questions = [question_of(sample, 0, category="dataset_name") for sample in samples]
    assert [question.truths for question in questions] == [("red", "Red"), ("3",)]
    assert samples[0].meta["image_path"] == "a.png" and samples[0].meta["question_id"] == 7
