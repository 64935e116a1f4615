"""Benchmarks of one question and one short answer or box: which set, how it is asked and which rule scores it are data.

Every question is asked about its own picture and, as the control, about another picture of its domain. Only the
question reaches the model, so no true answer can leak.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.evaluation.asking import answers, by_length, check_counts, decoding_named, even_choice
from bestiary.evaluation.control import other_pictures
from bestiary.evaluation.panels import PanelRow, draw_boxes, open_picture, panel, table_row, to_png
from bestiary.evaluation.questions import Answered, Question, Rule, numbered, picture_name, question_of, read_truths
from bestiary.evaluation.referring import BoxOverlap
from bestiary.evaluation.report import Report, write_atomically
from bestiary.schema import Processor, Sample, Turn

if TYPE_CHECKING:
    from bestiary.mllm import MultimodalLM
    from bestiary.vision.geometry import Box

log = logging.getLogger(__name__)

TABLE_COLUMNS = ("picture", "domain and category", "question", "truth", "prediction", "another picture", "correct")
_RIGHT = 0.5
"""A score from here on is shown as right: half of VQA's people, half of the letters."""


@dataclass(frozen=True, slots=True)
class QuestionPrediction:
    """One line of predictions.jsonl.

    picture: questions about one picture share the number. asked: the question as the model read it. gold: an answer
    that scores best. score, control_score: in [0, 1]. box, truth_box: fractions of the original picture.
    """

    key: str
    source: str
    domain: str
    category: str | None
    picture: int
    question: str
    asked: str
    truths: tuple[str, ...]
    gold: str
    prediction: str
    control: str | None
    score: float
    control_score: float | None
    is_correct: bool
    box: Box | None
    truth_box: Box | None


class QuestionBenchmark:
    """Asks every question of its held-out sources and scores the answers with one rule."""

    def __init__(
        self,
        *,
        name: str,
        rule: Rule,
        sources: Sequence[str] = (),
        prompt: str = "{}",
        answer_start: str = "",
        max_new_tokens: int = 10,
        min_new_tokens: int = 0,
        category: str = "task",
        answers_file: str | None = None,
        decoding: str = "greedy",
        reference_quirks: bool = False,
        control: bool = True,
        max_samples: int = 0,
        batch_size: int = 16,
        seed: int = 0,
        panel_pictures: int = 12,
    ) -> None:
        """Keeps the arguments.

        sources: globs of the names in `data.heldout`; empty = all. prompt: what is asked, `{}` standing for the
        question. answer_start: see `schema.Processor.prompt`. min_new_tokens: see `MultimodalLM.generate`. category:
        the field of a sample's meta that scores are broken down by. answers_file: the set's official answers
        (`questions.read_truths`). decoding: greedy | reference. reference_quirks: score as the published evaluation
        (see the rule). control: ask about another picture too. max_samples: pictures with all their questions, an even
        draw over the domains; 0 = all.
        """
        check_counts(
            max_samples=max_samples,
            panel_pictures=panel_pictures,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
        )
        if "{}" not in prompt:
            raise ValueError(f"prompt={prompt!r} has no {{}} where the question goes")
        self.name = name
        self.rule = rule
        self.sources = tuple(sources)
        self.prompt = prompt
        self.answer_start = answer_start
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.category = category
        self.answers_file = answers_file
        self.decoding = decoding
        self.reference_quirks = reference_quirks
        self.control = control
        self.max_samples = max_samples
        self.batch_size = batch_size
        self.seed = seed
        self.panel_pictures = panel_pictures
        self._decoding = decoding_named(decoding)

    def run(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], out: Path) -> Report:
        """Asks, scores, and writes report.json, predictions.jsonl and panel.png into the folder `out`."""
        start = time.perf_counter()
        items = self._ask(model, processor, self.questions(samples))
        notes = self._notes(items)
        lines = tuple(self._line(item) for item in items)
        shown = self._shown(items)
        rows = [self._panel_row(items[i], lines[i]) for i in shown]
        if rows:
            write_atomically(out / "panel.png", to_png(panel(rows)))
        report = Report(
            benchmark=self.name,
            metrics=self.rule.metrics(items, seed=self.seed, quirks=self.reference_quirks),
            predictions=lines,
            counts=_counts(items),
            notes=tuple(notes),
            settings=self._settings(),
            seconds=time.perf_counter() - start,
            panel=out / "panel.png" if rows else None,
            table_columns=TABLE_COLUMNS,
            table_rows=tuple(table_row(row) for row in rows),
        )
        report.write(out)
        log.info("%s: %d questions in %.1f s -> %s", self.name, len(items), report.seconds, out)
        return report

    def questions(self, samples: Sequence[Sample]) -> list[Question]:
        """The questions to ask, in the order of the samples; SampleError for one that this rule cannot score."""
        if not len(samples):
            raise ValueError(f"{self.name}: its held-out sources hold no sample; name others in sources")
        # Pictures of a large set are not held: the first pass keeps their names and domains only.
        seen = [(picture_name(sample), sample.domain) for sample in samples]
        pictures = numbered(name for name, _ in seen)
        domains = {picture: domain for picture, (_, domain) in zip(pictures, seen, strict=True)}
        chosen = {list(domains)[i] for i in even_choice(list(domains.values()), self.max_samples, seed=self.seed)}
        truths = None if self.answers_file is None else read_truths(Path(self.answers_file))
        asked = [
            question_of(samples[place], picture, category=self.category, truths=truths)
            for place, picture in enumerate(pictures)
            if picture in chosen
        ]
        for question in asked:
            self.rule.gold(question)  # raises before hours of asking
        return asked

    def _ask(self, model: MultimodalLM, processor: Processor, questions: Sequence[Question]) -> list[Answered]:
        def ask(asked: Sequence[Sample]) -> Iterator[str]:
            order = by_length(asked)
            said = answers(
                model,
                processor,
                [asked[i] for i in order],
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                decoding=self._decoding,
                answer_start=self.answer_start,
                min_new_tokens=self.min_new_tokens,
            )
            places = {place: rank for rank, place in enumerate(order)}
            return (said[places[i]] for i in range(len(asked)))

        asked = [replace(q.sample, turns=(Turn("human", self._wrapped(q)), q.sample.turns[1])) for q in questions]
        strangers = self._strangers(questions)
        said = list(ask(asked))
        changed = ask([replace(asked[i], images=asked[j].images) for i, j in enumerate(strangers) if j is not None])
        return [
            Answered(question, text, None if stranger is None else next(changed))
            for question, text, stranger in zip(questions, said, strangers, strict=True)
        ]

    def _strangers(self, questions: Sequence[Question]) -> Sequence[int | None]:
        if not self.control:
            return [None] * len(questions)
        pictures = [q.picture if q.sample.images else None for q in questions]
        return other_pictures(pictures, [q.sample.domain for q in questions], seed=self.seed)

    def _wrapped(self, question: Question) -> str:
        return self.prompt.replace("{}", question.text)

    def _notes(self, items: Sequence[Answered]) -> list[str]:
        notes = self.rule.notes(items)
        without = sum(item.control is None for item in items)
        if self.control and without:
            notes.append(f"{without} of {len(items)} questions have no control: there is no other picture to ask about")
        return notes

    def _line(self, item: Answered) -> QuestionPrediction:
        question, sample = item.question, item.question.sample
        score = self.rule.score(question, item.answer, quirks=self.reference_quirks)
        control = None
        if item.control is not None:
            control = self.rule.score(question, item.control, quirks=self.reference_quirks)
        return QuestionPrediction(
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
            category=question.groups.get("category"),
            picture=question.picture,
            question=question.text,
            asked=self._wrapped(question),
            truths=question.truths,
            gold=self.rule.gold(question),
            prediction=item.answer,
            control=item.control,
            score=score,
            control_score=control,
            is_correct=score >= _RIGHT,
            box=self.rule.answered_box(question, item.answer) if isinstance(self.rule, BoxOverlap) else None,
            truth_box=question.box,
        )

    def _shown(self, items: Sequence[Answered]) -> list[int]:
        domains = [item.question.sample.domain for item in items]
        return even_choice(domains, self.panel_pictures, seed=self.seed) if self.panel_pictures else []

    def _panel_row(self, item: Answered, line: QuestionPrediction) -> PanelRow:
        picture = open_picture(item.question.sample)
        return PanelRow(
            picture=draw_boxes(picture, truth=line.truth_box, answer=line.box),
            title=f"{line.domain} · {line.category}" if line.category else line.domain,
            question=line.question,
            reference=line.gold,
            prediction=line.prediction,
            control=line.control,
            is_correct=line.is_correct,
        )

    def _settings(self) -> dict[str, Any]:
        rule = type(self.rule)
        told = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        named = {"_target_": f"{rule.__module__}.{rule.__name__}"}
        return told | {"rule": named | asdict(self.rule), "sources": list(self.sources)}  # type: ignore[call-overload]


def _counts(items: Sequence[Answered]) -> dict[str, int]:
    return {
        "questions": len(items),
        "pictures": len({item.question.picture for item in items if item.question.sample.images}),
        "without_picture": sum(not item.question.sample.images for item in items),
        "empty_answers": sum(not item.answer for item in items),
    }
