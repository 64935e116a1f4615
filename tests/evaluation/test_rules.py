from __future__ import annotations

import json
from pathlib import Path

import pytest

from bestiary.evaluation.questions import Answered, Question, Rule, question_of, read_truths
from bestiary.evaluation.referring import BoxOverlap
from bestiary.evaluation.rules import (
    Anls,
    ExactMatch,
    MultipleChoice,
    RelaxedAccuracy,
    VqaAccuracy,
    choice_letter,
    published_choice,
)
from bestiary.evaluation.yes_no import Mme, YesNo, yes_no_label
from bestiary.schema import SampleError

from .asked import ask, asked_of

CHOICES = "Question:\nHow is the light?\nChoices:\nA. High\nB. Low\nC. Just right"
TASKS = {"perception": ["MME_count", "MME_scene"], "cognition": ["MME_code_reasoning"]}


def mme(tasks: tuple[str, ...] = ("MME_count", "MME_scene"), pictures: int = 3) -> list[Question]:
    """Two questions a picture, the truth yes then no; ids run on over the tasks."""
    found = []
    for t, task in enumerate(tasks):
        for p in range(pictures):
            for half, truth in enumerate(("Yes", "No")):
                number = (t * pictures + p) * 2 + half
                sample = ask(number, f"Is it {half}?", truth, picture=t * pictures + p, dataset_name=task)
                found.append(asked_of(sample, t * pictures + p, "dataset_name"))
    return found


def said(questions: list[Question], answers: list[str], controls: list[str] | None = None) -> list[Answered]:
    others = [None] * len(questions) if controls is None else controls
    return [Answered(q, a, c) for q, a, c in zip(questions, answers, others, strict=True)]


def values(rule: Rule, items: list[Answered], *, quirks: bool = False) -> dict[str, float]:
    return {name: metric.value for name, metric in rule.metrics(items, seed=0, quirks=quirks).items()}


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (ExactMatch(), ask(0, "Where?", "In the sea")),
        (ExactMatch(), ask(0, "Where?", "sea", gt_answers=["sea", "ocean"])),
        (MultipleChoice(), ask(0, CHOICES, "B")),
        (MultipleChoice(), ask(0, "Which?crab\nfish", "crab")),
        (VqaAccuracy(), ask(0, "What?", "red dogs", gt_answers=["red dogs"] * 6 + ["cat"] * 4)),
        (VqaAccuracy(), ask(0, "What?", "a dog")),
        (RelaxedAccuracy(), ask(0, "How many?", "0.57")),
        (Anls(), ask(0, "Who?", "itc limited")),
        (Mme(), ask(0, "Is it?", "Yes")),
        (YesNo(), ask(0, "Is it?", "no")),
        (BoxOverlap(), ask(0, "the cup", "", gt_box=[0.1, 0.2, 0.5, 0.9])),
    ],
)
def test_the_gold_answer_scores_one_and_nonsense_nothing(rule: Rule, sample: object) -> None:
    question = asked_of(sample)  # type: ignore[arg-type]
    for quirks in (False, True):
        assert rule.score(question, rule.gold(question), quirks=quirks) == 1
    assert rule.score(question, "xyzzy plugh", quirks=False) == 0


def test_all_yes_scores_fifty_a_task_of_mme_and_no_picture_twice() -> None:
    questions = mme(("MME_count", "MME_scene", "MME_code_reasoning"))
    found = values(Mme(TASKS), said(questions, ["Yes."] * len(questions)))
    assert found == {"perception": 100, "cognition": 50, "score": 150, "accuracy": 0.5, "accuracy_plus": 0}
    found = values(Mme(TASKS), said(questions, [q.truths[0] for q in questions]))
    assert found == {"perception": 400, "cognition": 200, "score": 600, "accuracy": 1, "accuracy_plus": 1}


def test_mme_pairs_the_questions_of_a_picture_in_any_order_and_quirks_pair_by_the_text_of_the_id() -> None:
    questions = mme(("MME_count",), pictures=6)  # as text the ids run 0, 1, 10, 11, 2, 3, ...
    answers = [q.truths[0] if q.picture < 3 else "perhaps" for q in questions]
    mixed = sorted(said(questions, answers), key=lambda item: item.question.truths)
    assert values(Mme(), mixed)["accuracy_plus"] == 0.5
    assert values(Mme(), mixed, quirks=True)["accuracy_plus"] == 0.5
    odd = mme(("MME_count",), pictures=6)[1:-1]  # 1, 10, 2, 3, ...: pairs of two pictures
    assert values(Mme(), said(odd, [q.truths[0] for q in odd]), quirks=True)["accuracy_plus"] == 1
    with pytest.raises(SampleError, match="has 1 question"):
        Mme().metrics(said(odd, ["Yes"] * len(odd)), seed=0, quirks=False)


def test_mme_names_tasks_that_are_lacking_or_in_no_total() -> None:
    questions = mme(("MME_count",))
    items = said(questions, ["maybe"] * len(questions))
    told = " ".join(Mme(TASKS).notes(items))
    assert "perception is the sum of 1 of its 2 tasks" in told and "6 of 6 answers are neither" in told
    with pytest.raises(ValueError, match="MME_posters"):
        Mme(TASKS).metrics(said(mme(("MME_posters",)), ["Yes"] * 6), seed=0, quirks=False)


def test_mme_totals_have_intervals_and_controls() -> None:
    questions = mme(("MME_count", "MME_scene"), pictures=20)
    right = [q.truths[0] for q in questions]
    some = [answer if i % 3 else "Yes" for i, answer in enumerate(right)]
    metrics = Mme(TASKS).metrics(said(questions, some, ["Yes"] * len(right)), seed=0, quirks=False)
    total = metrics["perception"]
    assert total.control == 100 and total.n == 40 and total.interval is not None
    assert total.interval.low < total.value < total.interval.high
    assert set(metrics["score"].by["category"]) == {"MME_count", "MME_scene"}
    assert sum(part.value for part in metrics["score"].by["category"].values()) == pytest.approx(total.value)
    perfect = Mme(TASKS).metrics(said(questions, right, right), seed=0, quirks=False)["perception"]
    assert perfect.interval is not None and perfect.interval.low == perfect.interval.high == 400
    assert perfect.gain_interval is not None and perfect.gain_interval.low == 0


def test_pope_counts_yes_as_its_paper_does() -> None:
    truths = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    answers = ["Yes", "Yes, it is", "No", "yes.", "There is not", "no", "No, there", "banana"]
    questions = [asked_of(ask(i, "Is there a cat?", truth), i) for i, truth in enumerate(truths)]
    found = values(YesNo(), said(questions, answers, ["yes"] * 8))
    assert found == {
        "accuracy": 5 / 8,
        "f1": 2 * 2 / (3 + 3),
        "precision": 2 / 3,
        "recall": 2 / 3,
        "yes_ratio": 3 / 8,
    }
    assert values(YesNo(), said(questions, answers), quirks=True)["yes_ratio"] == 4 / 8  # banana is a yes
    metrics = YesNo().metrics(said(questions, answers, ["yes"] * 8), seed=0, quirks=False)
    assert metrics["yes_ratio"].control == 1 and metrics["precision"].control == 3 / 8
    assert metrics["precision"].n == 3 and metrics["recall"].n == 3


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("I do not see it", "no"),
        ("'Yes'!", "yes"),
        ("", "other"),
        ("Yesterday", "other"),
    ],
)
def test_the_first_word_of_yes_no_and_not_decides(answer: str, label: str) -> None:
    assert yes_no_label(answer) == label


def test_rates_of_no_answer_at_all_are_zero_and_have_no_interval() -> None:
    questions = [asked_of(ask(i, "Is it?", "no"), i) for i in range(8)]
    metrics = YesNo().metrics(said(questions, ["no"] * 8), seed=0, quirks=False)
    assert metrics["precision"].value == 0 and metrics["precision"].interval is None
    json.dumps([metric.to_json() for metric in metrics.values()], allow_nan=False)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. Low", "B"),
        ("The answer is C.", "C"),
        ("Answer: A", "A"),
        ("just right", "C"),
        ("A dog is running", None),
        ("", None),
        ("Low light", None),
    ],
)
def test_a_choice_is_read_from_its_letter_or_its_text(answer: str, letter: str | None) -> None:
    assert choice_letter(answer, CHOICES) == letter


def test_answers_that_name_no_choice_are_told() -> None:
    questions = [asked_of(ask(i, CHOICES, "B"), i) for i in range(3)]
    assert MultipleChoice().notes(said(questions, ["B", "who knows", "C"])) == ["1 of 3 answers name no choice"]


def test_the_published_choice_is_the_text_before_the_first_period_or_a_draw_by_key() -> None:
    question = asked_of(ask(0, CHOICES, "B"))
    assert ExactMatch().score(question, "B. Low", quirks=True) == 1
    assert ExactMatch().score(question, "C. Low", quirks=True) == 0
    drawn = [published_choice("I cannot tell", f"key-{i}") for i in range(200)]
    assert set(drawn) == set("ABCDE") and drawn == [published_choice("who knows", f"key-{i}") for i in range(200)]
    text = asked_of(ask(0, "How much?", "1.5"))
    assert ExactMatch().score(text, "15", quirks=True) == 1 and ExactMatch().score(text, "15", quirks=False) == 0


def test_several_peoples_answers_come_from_the_official_file(tmp_path: Path) -> None:
    people = [{"question_id": 7, "answers": [{"answer": "red"}] * 2 + [{"answer": "blue"}] * 8}]
    (tmp_path / "vqa.json").write_text(json.dumps({"annotations": people}))
    truths = read_truths(tmp_path / "vqa.json")
    question = question_of(ask(7, "Colour?", "blue"), 0, category="task", truths=truths)
    assert VqaAccuracy().score(question, "red", quirks=False) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert VqaAccuracy().score(question, "blue", quirks=False) == 1
    (tmp_path / "doc.json").write_text(json.dumps({"data": [{"questionId": 7, "answers": ["ITC", "itc limited"]}]}))
    question = question_of(ask(7, "Who?", "x"), 0, category="task", truths=read_truths(tmp_path / "doc.json"))
    assert Anls().score(question, "ITC Limited", quirks=False) == 1
    with pytest.raises(SampleError, match="question_id 8"):
        question_of(ask(8, "Who?", "x"), 0, category="task", truths=truths)
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(ValueError, match="neither VQA's nor DocVQA's"):
        read_truths(tmp_path / "odd.json")
    with pytest.raises(FileNotFoundError, match=r"answers_file .*none\.json does not exist"):
        read_truths(tmp_path / "none.json")


def test_one_truth_a_question_is_told_where_the_metric_asks_for_several() -> None:
    items = said([asked_of(ask(0, "What?", "dog")), asked_of(ask(1, "What?", "x", gt_answers=["a", "b"]))], ["a", "a"])
    assert VqaAccuracy().notes(items) == [
        "1 of 2 questions have one true answer: not VQA accuracy, which asks several people; set answers_file"
    ]


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (64, 64)])
def test_a_box_is_scored_in_the_padded_square_whatever_the_pictures_shape(size: tuple[int, int]) -> None:
    width, height = size
    sample = ask(0, "cup", "", picture=-1, gt_box=[0.25, 0.5, 0.75, 1.0], question_id=f"height{height}_width{width}")
    question, rule = asked_of(sample), BoxOverlap()
    side, pad_x, pad_y = max(size), (max(size) - width) // 2, (max(size) - height) // 2
    px = (0.25 * width + pad_x, 0.5 * height + pad_y, 0.75 * width + pad_x, height + pad_y)
    answer = "it is at [" + ",".join(f"{value / side:.4f}" for value in px) + "]"
    metrics = rule.metrics([Answered(question, answer, "nowhere")], seed=0, quirks=False)
    assert metrics["accuracy"].value == 1 and metrics["mean_iou"].value == pytest.approx(1, abs=1e-2)
    assert metrics["accuracy"].control == 0
    box = rule.answered_box(question, answer)
    assert box == pytest.approx(sample.meta["gt_box"], abs=1e-3)
    assert rule.answered_box(question, "nowhere") is None
    assert rule.notes([Answered(question, "nowhere", None)]) == ["1 of 1 answers hold no box"]


@pytest.mark.parametrize(
    ("rule", "sample", "told"),
    [
        (BoxOverlap(), ask(0, "cup", "[0,0,1,1]"), "has no gt_box"),
        (Mme(), ask(0, "Is it?", "perhaps"), "'perhaps'"),
        (YesNo(), ask(0, "Is it?", "seldom"), "'seldom'"),
    ],
)
def test_a_sample_that_a_rule_cannot_score_is_named(rule: Rule, sample: object, told: str) -> None:
    with pytest.raises(SampleError, match=f"q-000.*{told}"):
        rule.gold(asked_of(sample))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"gt_box": [1, 2, 3]}, "gt_box"),
        ({"gt_box": [0, 0, 1, 1], "question_id": "7"}, "neither a picture nor its size"),
    ],
)
def test_a_malformed_box_is_named(meta: dict[str, object], told: str) -> None:
    with pytest.raises(SampleError, match=told):
        asked_of(ask(0, "cup", "x", picture=-1, **meta))
