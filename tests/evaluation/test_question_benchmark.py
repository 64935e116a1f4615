from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bestiary.evaluation.control import other_pictures
from bestiary.evaluation.question_benchmark import QuestionBenchmark
from bestiary.evaluation.questions import Rule, picture_name, question_of
from bestiary.evaluation.referring import BoxOverlap
from bestiary.evaluation.report import Report
from bestiary.evaluation.rules import ExactMatch
from bestiary.evaluation.suite import checked, run_suite, sources_of
from bestiary.evaluation.yes_no import Mme
from bestiary.schema import Sample, Turn

from .asked import Reply, ReplyingModel, ask, by_picture, photo
from .scenes import StandInProcessor

COLOURS = [
    ask(
        i,
        "What colour?" if i % 3 else "Which colour is the largest thing?",
        f"shade {i}",
        task=("colour", "size")[i % 2],
    )
    for i in range(24)
]
CORNERS = [(0.1 + 0.04 * (i % 12), 0.1 + 0.3 * (i % 3)) for i in range(24)]
BOXES = [
    replace(ask(i, f"thing {i}", "", gt_box=[x, y, x + 0.2, y + 0.2]), images=(photo(i, (60, 30)),))
    for i, (x, y) in enumerate(CORNERS)
]


def run(
    out: Path, samples: list[Sample], *, rule: Rule | None = None, reply: Reply | None = None, **settings: Any
) -> tuple[Report, StandInProcessor, ReplyingModel]:
    benchmark = QuestionBenchmark(**({"name": "tried", "rule": rule or ExactMatch(), "panel_pictures": 0} | settings))
    processor = StandInProcessor()
    model = ReplyingModel(processor, reply or by_picture(samples, benchmark))
    return benchmark.run(model, processor, samples, out), processor, model  # type: ignore[arg-type]


def test_a_model_that_sees_scores_and_its_control_does_not(tmp_path: Path) -> None:
    report, _, _ = run(tmp_path, COLOURS)
    accuracy = report.metrics["accuracy"]
    assert accuracy.value == 1 and accuracy.control == 0 and accuracy.n == len(COLOURS)
    assert accuracy.gain_interval is not None and accuracy.gain_interval.low == 1
    assert set(accuracy.by["domain"]) == {"natural", "document"} and set(accuracy.by["category"]) == {"colour", "size"}
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["metrics"]["accuracy"]["by_category"]["size"]["n"] == 12
    assert saved["settings"]["rule"] == {"_target_": "bestiary.evaluation.rules.ExactMatch"}
    assert "category" not in saved["metrics"]["accuracy"]["by_domain"]


def test_a_model_that_guesses_from_the_question_scores_the_same_in_the_control(tmp_path: Path) -> None:
    samples = [replace(sample, meta=sample.meta | {"gt_answers": str(i % 2)}) for i, sample in enumerate(COLOURS)]
    report, _, _ = run(tmp_path, samples, reply=lambda sample: str(int("largest" in sample.turns[0].text)))
    assert report.metrics["accuracy"].control == report.metrics["accuracy"].value


def test_predictions_come_in_the_order_of_the_samples_however_they_were_batched(tmp_path: Path) -> None:
    lines = {}
    for batch_size in (1, 5, 64):
        _, _, model = run(tmp_path, COLOURS, batch_size=batch_size, panel_pictures=0)
        lines[batch_size] = (tmp_path / "predictions.jsonl").read_text()
        assert {call["num"] for call in model.calls} <= {batch_size, len(COLOURS) % batch_size, len(COLOURS)}
    assert lines[1] == lines[5] == lines[64]
    found = [json.loads(line) for line in lines[1].splitlines()]
    assert [line["key"] for line in found] == [sample.key for sample in COLOURS]
    assert all(line["prediction"] == line["truths"][0] and line["control"] != line["prediction"] for line in found)


def test_questions_of_like_length_are_asked_together(tmp_path: Path) -> None:
    samples = [ask(i, "word " * (1 + 7 * i % 24), "x") for i in range(24)]
    _, processor, _ = run(tmp_path, samples, control=False, batch_size=4)
    lengths = [len(sample.turns[0].text) for sample in processor.seen]
    assert lengths == sorted(lengths)


def test_the_model_is_asked_with_the_prompt_and_never_sees_the_truth(tmp_path: Path) -> None:
    prompt = "{}\nIn a word {braces} stay."
    _, processor, _ = run(tmp_path, COLOURS, prompt=prompt, answer_start=" The answer is")
    assert len(processor.seen) == 2 * len(COLOURS) and set(processor.starts) == {" The answer is"}
    for sample in processor.seen:
        [turn] = sample.turns
        assert turn.text.endswith("\nIn a word {braces} stay.") and not sample.meta


def test_the_reference_decoding_is_the_published_one(tmp_path: Path) -> None:
    _, _, model = run(tmp_path, COLOURS[:1], decoding="reference", max_new_tokens=7)
    [call] = model.calls
    asked = {name: call[name] for name in ("temperature", "top_p", "seed", "max_new_tokens")}
    assert asked == {"temperature": 0.1, "top_p": 0.75, "seed": 1, "max_new_tokens": 7}
    for decoding, score in (("reference", 1), ("greedy", 0)):
        report, _, _ = run(tmp_path, COLOURS[:1], decoding=decoding, reply=lambda _: "shade 0### Human: and")
        assert report.metrics["accuracy"].value == score


def test_questions_without_a_picture_are_scored_without_a_control(tmp_path: Path) -> None:
    texts = [ask(100 + i, f"What is {i}?", str(i), picture=-1) for i in range(6)]
    report, _, _ = run(tmp_path, [*COLOURS, *texts], panel_pictures=3)
    accuracy = report.metrics["accuracy"]
    assert accuracy.value == 1 and accuracy.control is None
    assert accuracy.by["domain"]["text"].control is None and accuracy.by["domain"]["natural"].control == 0
    assert report.counts["without_picture"] == 6 and "6 of 30 questions have no control" in report.notes[0]
    assert report.panel is not None


def test_pictures_are_chosen_whole(tmp_path: Path) -> None:
    samples = [
        ask(i, f"Is it {i}?", ("yes", "no")[i % 2], picture=i // 2, dataset_name=("MME_count", "MME_scene")[i // 2 % 2])
        for i in range(40)
    ]
    report, _, _ = run(tmp_path, samples, rule=Mme(), category="dataset_name", max_samples=6)
    assert report.counts == {"questions": 12, "pictures": 6, "without_picture": 0, "empty_answers": 0}
    assert report.metrics["score"].value == 400
    assert {line.domain for line in report.predictions} == {"natural", "document"}


def test_boxes_are_scored_and_drawn_beside_the_truth(tmp_path: Path) -> None:
    report, _, _ = run(tmp_path, BOXES, rule=BoxOverlap(), panel_pictures=6)
    assert report.metrics["accuracy"].value == 1
    assert report.metrics["accuracy"].control is not None and report.metrics["accuracy"].control < 0.5
    assert question_of(BOXES[0], 0, category="task").size == (60, 30)
    line = report.predictions[0]
    assert line.box == pytest.approx(line.truth_box, abs=0.02) and line.gold == line.prediction
    assert report.panel is not None
    sheet = Image.open(report.panel).convert("RGB")
    colours = {colour for _, colour in sheet.getcolors(1 << 24) or ()}
    assert {(20, 118, 52), (31, 97, 190)} <= colours


def test_a_run_that_cannot_be_scored_stops_before_asking(tmp_path: Path) -> None:
    processor = StandInProcessor()
    benchmark = QuestionBenchmark(name="tried", rule=BoxOverlap())
    model = ReplyingModel(processor, lambda _: "")
    with pytest.raises(ValueError, match=r"q-000.*gt_box"):
        benchmark.run(model, processor, COLOURS, tmp_path)  # type: ignore[arg-type]
    assert not processor.seen and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="hold no sample"):
        benchmark.run(model, processor, [], tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decoding": "beam"}, "choose one of greedy, reference"),
        ({"prompt": "What?"}, "where the question goes"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_senseless_setting_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        QuestionBenchmark(name="x", rule=ExactMatch(), **settings)


def test_another_picture_is_another_of_the_same_domain_where_there_are_two() -> None:
    pictures = [0, 0, 1, 2, 3, None, 3]
    domains = ["a", "a", "a", "a", "b", "t", "b"]
    found = other_pictures(pictures, domains, seed=3)
    assert found[5] is None
    for place, donor in enumerate(found):
        if donor is not None:
            assert pictures[donor] != pictures[place] and pictures[donor] is not None
            assert domains[donor] == domains[place] or domains[place] == "b"
    assert found[0] == found[1] and found[4] == found[6]
    assert other_pictures([4, 4], ["a", "a"], seed=0) == [None, None]
    assert found == other_pictures(pictures, domains, seed=3)


def test_a_picture_is_known_by_its_path_or_its_bytes() -> None:
    assert picture_name(ask(0, "a", "b", picture=7)) == picture_name(ask(1, "c", "d", picture=7))
    assert picture_name(ask(0, "a", "b")) != picture_name(ask(1, "a", "b"))
    assert picture_name(ask(0, "a", "b", image_path="x.jpg")) == "x.jpg"
    assert picture_name(ask(0, "a", "b", picture=-1)) is None


class Held:
    """Held-out sources in memory."""

    def __init__(self, **sources: list[Sample]) -> None:
        self._sources = sources
        self.names = tuple(sources)

    def of(self, names: Any) -> list[Sample]:
        return [sample for name in names for sample in self._sources[name]]


def test_a_benchmark_reads_its_own_sources_and_a_missing_one_is_named(tmp_path: Path) -> None:
    held = Held(colours=COLOURS, boxes=BOXES)
    both = {
        "words": QuestionBenchmark(name="words", rule=ExactMatch(), sources=["col*"], panel_pictures=0),
        "places": QuestionBenchmark(name="places", rule=BoxOverlap(), sources=["boxes"], panel_pictures=1),
    }
    processor = StandInProcessor()
    model = ReplyingModel(processor, lambda sample: "shade 3")
    found = run_suite(both, model, processor, held, tmp_path)  # type: ignore[arg-type]
    assert found["metrics"]["words/accuracy"] == pytest.approx(1 / 24)
    assert found["metrics"]["places/accuracy"] == 0 and set(found["panels"]) == {"places"}
    assert {"words", "places"} <= set(found["text"].split())
    wrong = QuestionBenchmark(name="w", rule=ExactMatch(), sources=["boxs"])
    with pytest.raises(ValueError, match=r"suite\.w reads the held-out source 'boxs'.*nearest: boxes"):
        checked({"w": wrong}, held)
    assert sources_of("all", QuestionBenchmark(name="all", rule=ExactMatch()), held.names) == ["colours", "boxes"]


def test_the_answers_first_words_stand_behind_the_open_turn() -> None:
    from bestiary.variants.sphinx.processor import SphinxProcessor

    path = Path(__file__).parents[1] / "goldens" / "sphinx" / "tiny_tokenizer.model"
    processor = SphinxProcessor(tokenizer=str(path), canvas_px=8, image_rows=3, num_views=1, max_tokens=600)
    sample = Sample("k", "s", "text", (Turn("human", "What is it?"),))
    plain, begun = processor.prompt(sample), processor.prompt(sample, answer_start=" The answer is")
    ids = begun.ids.tolist()
    assert ids[: len(plain)] == plain.ids.tolist()
    assert processor.decode(ids[len(plain) :]) == "The answer is"
