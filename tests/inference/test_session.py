from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.inference.session import Session
from bestiary.schema import IGNORE, Example, Region, Sample


class EchoProcessor:
    """Prompts are the text of the last question; ids are letters."""

    def prompt(self, sample: Sample) -> Example:
        self.sample = sample
        ids = np.array([ord(letter) for letter in sample.turns[-1].text], np.int64)
        pixels = np.zeros((len(sample.images), 3, 1, 1), np.uint8)
        labels, slots = np.full_like(ids, IGNORE), np.zeros(len(ids), np.uint8)
        return Example(ids, labels, slots, pixels, None, 0, sample.key, sample.source, sample.domain)

    def stop_sequences(self) -> list[list[int]]:
        return [[2]]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids)).strip()


class EchoModel:
    def generate(self, examples: Sequence[Example], **settings: Any) -> list[list[int]]:
        self.settings = settings
        return [list(example.ids) for example in examples]


def session() -> tuple[Session, EchoModel, EchoProcessor]:
    model, processor = EchoModel(), EchoProcessor()
    return Session(model, processor), model, processor  # type: ignore[arg-type]


def test_a_question_reaches_the_model_with_picture_and_regions() -> None:
    chat, model, processor = session()
    image = Image.new("RGB", (7, 5), (1, 2, 3))
    regions = [Region("point", (0.5, 0.5), 1)]
    assert chat.respond(image, "What is <Mark 1>?", regions, max_new_tokens=9, seed=4) == "What is <Mark 1>?"
    with Image.open(io.BytesIO(processor.sample.images[0])) as sent:
        assert (sent.size, sent.getpixel((0, 0))) == ((7, 5), (1, 2, 3))
    assert processor.sample.regions == (Region("point", (0.5, 0.5), 1),)
    assert model.settings == {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "stop": [[2]], "seed": 4}


def test_the_same_arguments_give_the_same_answer_twice() -> None:
    chat, _, processor = session()
    image, regions = Image.new("P", (4, 4)), [Region("box", (0.1, 0.1, 0.2, 0.2), 1)]
    qas: list[tuple[str, str | None]] = [("first?", "yes"), ("second?", None)]
    kept = (image.tobytes(), list(regions), list(qas))
    first, sample = chat.chat(image, qas, regions), processor.sample
    assert (chat.chat(image, qas, regions), processor.sample) == (first, sample)
    assert (image.tobytes(), regions, qas) == kept
    assert [(t.role, t.text) for t in sample.turns] == [("human", "first?"), ("assistant", "yes"), ("human", "second?")]


def test_encoded_pictures_are_passed_on_and_text_needs_none() -> None:
    chat, _, processor = session()
    chat.respond(b"bytes", "hello")
    assert processor.sample.images == (b"bytes",)
    chat.respond(None, "hello")
    assert processor.sample.images == ()


@pytest.mark.parametrize("qas", [[], [("q", "a")], [("q", None), ("r", None)]])
def test_only_the_last_question_waits_for_an_answer(qas: list[tuple[str, str | None]]) -> None:
    chat, _, _ = session()
    with pytest.raises(ValueError, match="the last must have None"):
        chat.chat(None, qas)
