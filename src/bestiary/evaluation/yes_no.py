"""Rules for questions of yes and no: MME with its two questions a picture, and POPE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bestiary.evaluation.questions import Answered, Question, mean_metric
from bestiary.evaluation.report import Metric, Score, metric_of, ratio_metric, total_metric
from bestiary.evaluation.scorers import normalise
from bestiary.evaluation.short_answers import mme_label, mme_scores
from bestiary.schema import SampleError

_NEGATIONS = frozenset({"no", "not"})
"""What POPE's script looks for in the first sentence (AoiDragon/POPE evaluate.py)."""


@dataclass(frozen=True)
class Mme:
    """MME: every picture has a question whose answer is yes and one whose answer is no; both right count again.

    groups: totals of papers -> their tasks (values of the category): `perception`, `cognition`. A task scores
    100 * (accuracy + share of pictures with both right), so 200 at most. Questions about one picture belong together;
    quirks: any two that follow one another when their ids are sorted as text, as in the published evaluation.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def gold(self, question: Question) -> str:
        """`yes` or `no`."""
        return _truth(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 where yes or no begins in the first four letters and is right."""
        return float(mme_label(answer) == _truth(question))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """The totals of `groups` whose tasks were asked, `score` by task, `accuracy`, `accuracy_plus` by picture."""
        tasks = {name: _pairs(found, quirks) for name, found in _by_task(items).items()}
        named = [task for members in self.groups.values() for task in members]
        if self.groups and (odd := sorted(set(tasks) - set(named))):
            raise ValueError(f"MME's task {odd[0]!r} is in none of rule.groups, which names {', '.join(sorted(named))}")
        metrics = {
            group: _total([tasks[task] for task in members if task in tasks], seed)
            for group, members in self.groups.items()
            if any(task in tasks for task in members)
        }
        whole = _total(list(tasks.values()), seed)
        by_task = {task: _total([pairs], seed) for task, pairs in sorted(tasks.items())}
        metrics["score"] = Metric(
            whole.value, whole.n, whole.control, whole.interval, whole.control_interval, whole.gain_interval,
            by={"category": by_task},
        )  # fmt: skip
        metrics["accuracy"] = mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)
        both = [_both(pair) for pairs in tasks.values() for pair in pairs]
        metrics["accuracy_plus"] = metric_of(both, seed=seed, groups=("domain", "category"))
        return metrics

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """Totals that lack tasks, and answers that are neither yes nor no."""
        asked = set(_by_task(items))
        lacking = [
            f"{group} is the sum of {len(asked & set(members))} of its {len(members)} tasks"
            for group, members in self.groups.items()
            if 0 < len(asked & set(members)) < len(members)
        ]
        return lacking + _neither(items, [mme_label(item.answer) for item in items])


@dataclass(frozen=True)
class YesNo:
    """POPE: is the object in the picture? Accuracy, precision, recall and F1 of `yes`, and how often it is said.

    The first sentence's first yes, no or not decides. An answer with neither is wrong and a `yes` to no rate; quirks:
    whatever says neither no nor not is yes, as in POPE's own script.
    """

    def gold(self, question: Question) -> str:
        """`yes` or `no`."""
        return _truth(question)

    def score(self, question: Question, answer: str, *, quirks: bool) -> float:
        """1 or 0."""
        return float(yes_no_label(answer, quirks=quirks) == _truth(question))

    def metrics(self, items: Sequence[Answered], *, seed: int, quirks: bool) -> dict[str, Metric]:
        """`accuracy`, `f1`, `precision`, `recall`, `yes_ratio`."""
        truths = [_truth(item.question) for item in items]
        pictures = [item.question.picture for item in items]
        ours = _rates(truths, [yes_no_label(item.answer, quirks=quirks) for item in items], pictures)
        theirs = None
        if all(item.control is not None for item in items):
            theirs = _rates(truths, [yes_no_label(item.control or "", quirks=quirks) for item in items], pictures)
        accuracy = mean_metric(items, lambda q, a: self.score(q, a, quirks=quirks), seed=seed)
        rates = {name: ratio_metric(ours[name], None if theirs is None else theirs[name], seed=seed) for name in ours}
        return {"accuracy": accuracy, **rates}

    def notes(self, items: Sequence[Answered]) -> list[str]:
        """Answers that are neither yes nor no."""
        return _neither(items, [yes_no_label(item.answer) for item in items])


def yes_no_label(answer: str, *, quirks: bool = False) -> str:
    """`yes`, `no`, or `other`: the first of these words (or `not`) in the first sentence."""
    words = answer.split(".")[0].replace(",", " ").lower().split()
    if quirks:
        return "no" if _NEGATIONS & set(words) else "yes"
    said = (word.strip("\"'!?:;()") for word in words)
    return next(("yes" if word == "yes" else "no" for word in said if word == "yes" or word in _NEGATIONS), "other")


def _truth(question: Question) -> str:
    truth = normalise(question.truths[0]).removesuffix(".") if question.truths else ""
    if truth not in ("yes", "no"):
        raise SampleError(question.sample.key, f"has the true answer {truth!r}; this benchmark's are yes and no")
    return truth


def _by_task(items: Sequence[Answered]) -> dict[str, list[Answered]]:
    tasks: dict[str, list[Answered]] = defaultdict(list)
    for item in items:
        tasks[item.question.groups.get("category", "all")].append(item)
    return tasks


def _pairs(items: Sequence[Answered], quirks: bool) -> list[tuple[Answered, Answered]]:
    """The two questions of every picture of one task."""
    if quirks:
        ordered = sorted(items, key=lambda item: str(item.question.sample.meta.get("question_id")))
        return list(zip(ordered[::2], ordered[1::2], strict=False))
    pictures: dict[int, list[Answered]] = defaultdict(list)
    for item in items:
        pictures[item.question.picture].append(item)
    for found in pictures.values():
        if len(found) != 2:
            raise SampleError(
                found[0].question.sample.key,
                f"its picture has {len(found)} question(s) of one task, but MME asks two; check image_path in its meta",
            )
    return [(first, second) for first, second in pictures.values()]


def _total(tasks: Sequence[Sequence[tuple[Answered, Answered]]], seed: int) -> Metric:
    """The sum of the tasks' scores; a picture's part of its task is 100 * (share of right answers + both right)."""
    ours = [[_picture_score(pair, is_control=False) for pair in pairs] for pairs in tasks]
    theirs = None
    if all(item.control is not None for pairs in tasks for pair in pairs for item in pair):
        theirs = [[_picture_score(pair, is_control=True) for pair in pairs] for pairs in tasks]
    return total_metric(ours, theirs, seed=seed)


def _picture_score(pair: tuple[Answered, Answered], *, is_control: bool) -> float:
    labels = [mme_label(item.control or "" if is_control else item.answer) for item in pair]
    return mme_scores([_truth(item.question) for item in pair], labels).score


def _both(pair: tuple[Answered, Answered]) -> Score:
    control = None
    if all(item.control is not None for item in pair):
        control = float(_picture_score(pair, is_control=True) == 200)
    question = pair[0].question
    return Score(question.picture, float(_picture_score(pair, is_control=False) == 200), control, question.groups)


def _rates(
    truths: Sequence[str], labels: Sequence[str], pictures: Sequence[int]
) -> dict[str, tuple[list[float], list[float]]]:
    """Numerators and denominators by picture of what is counted over `yes`."""
    places = {picture: place for place, picture in enumerate(dict.fromkeys(pictures))}
    right, said, true, asked = ([0.0] * len(places) for _ in range(4))
    for truth, label, picture in zip(truths, labels, pictures, strict=True):
        place = places[picture]
        right[place] += truth == label == "yes"
        said[place] += label == "yes"
        true[place] += truth == "yes"
        asked[place] += 1
    return {
        "f1": ([2 * r for r in right], [s + t for s, t in zip(said, true, strict=True)]),
        "precision": (right, said),
        "recall": (right, true),
        "yes_ratio": (said, asked),
    }


def _neither(items: Sequence[Answered], labels: Sequence[str]) -> list[str]:
    other = labels.count("other")
    return [f"{other} of {len(items)} answers are neither yes nor no"] if other else []
