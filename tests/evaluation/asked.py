"""Questions about small pictures, and a stand-in for a model that answers from what it is asked."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from bestiary.evaluation.question_benchmark import QuestionBenchmark
from bestiary.evaluation.questions import Question, question_of
from bestiary.schema import Example, Sample, Turn

from .scenes import StandInProcessor

Reply = Callable[[Sample], str]
"""What to say to a sample as it was asked."""


def photo(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG that no other number has."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 90)).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(number: int, question: str, answer: str, *, picture: int | None = None, **meta: Any) -> Sample:
    """A held-out sample; `picture` None: `number`'s own, negative: none."""
    shown = number if picture is None else picture
    return Sample(
        key=f"q-{number:03d}",
        source="asked",
        domain=("natural", "document")[shown % 2] if shown >= 0 else "text",
        turns=(Turn("human", question), Turn("assistant", answer)),
        images=(photo(shown),) if shown >= 0 else (),
        meta={"question_id": number, "gt_answers": answer} | meta,
    )


def asked_of(sample: Sample, picture: int = 0, category: str = "task") -> Question:
    return question_of(sample, picture, category=category)


class ReplyingModel(torch.nn.Module):
    """Says `reply(sample)` to the samples its processor saw last; keeps how it was asked."""

    def __init__(self, processor: StandInProcessor, reply: Reply) -> None:
        super().__init__()
        self._processor, self._reply = processor, reply
        self.calls: list[dict[str, Any]] = []

    def generate(self, examples: Sequence[Example], **how: Any) -> list[list[int]]:
        self.calls.append({"num": len(examples), **how})
        asked = self._processor.seen[-len(examples) :]
        assert [sample.key for sample in asked] == [e.key for e in examples]
        return [[ord(letter) for letter in self._reply(sample)] for sample in asked]


def by_picture(samples: Sequence[Sample], benchmark: QuestionBenchmark) -> Reply:
    """Answers every question as is right for the picture it sees; another picture gets that picture's first answer."""
    questions = benchmark.questions(samples)
    gold = {(q.sample.images[:1], q.text): benchmark.rule.gold(q) for q in reversed(questions)}
    first = {q.sample.images[:1]: benchmark.rule.gold(q) for q in reversed(questions)}

    def reply(sample: Sample) -> str:
        before, _, after = benchmark.prompt.partition("{}")
        text = sample.turns[0].text.removeprefix(before).removesuffix(after)
        return gold.get((sample.images[:1], text), first[sample.images[:1]])

    return reply
