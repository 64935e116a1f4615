"""Captions and plain texts learned whole, beside pictures in one batch; and what is said of texts that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bestiary.schema import IGNORE, Sample, SampleError, SampleTooLongError, Slot, Turn
from bestiary.variants.sphinx.model import build_sphinx
from data_modules.collate import collate_rows
from tests.variants.sphinx_tiny import DECODER, VISION
from tests.variants.test_sphinx_processor import SAMPLE, _make

CAPTION = replace(SAMPLE, turns=(Turn("assistant", "A dog and a cat."),))
TEXT = Sample("t/1", "web", "text", (Turn("assistant", "A dog ran to the cat. It was red."),))


def _documents(**more: Any) -> Any:
    return _make(template="document", **more)


def test_a_document_is_learned_whole_behind_its_picture() -> None:
    processor = _documents()
    caption, text = processor(CAPTION), processor(TEXT)
    words = processor.tokenizer.encode("A dog and a cat.")
    assert caption.slots.tolist() == [Slot.TEXT, *[Slot.IMAGE] * 12, *[Slot.TEXT] * (len(words) + 1)]
    assert caption.labels.tolist() == [IGNORE] * 13 + [*words, 2]
    assert (text.slots == Slot.TEXT).all() and text.ids[0] == 1
    assert text.labels.tolist() == [IGNORE, *text.ids[1:].tolist()] and text.labels[-1] == 2
    assert processor.lengths(CAPTION) == (len(caption), 5, len(words) + 1)


def test_a_question_that_only_shows_the_picture_is_none() -> None:
    processor = _documents()
    for shown in ("<image>", "", "<image>\n"):
        turns = (Turn("human", shown), *CAPTION.turns)
        assert processor(replace(CAPTION, turns=turns)).ids.tolist() == processor(CAPTION).ids.tolist()
    for turns in (SAMPLE.turns, SAMPLE.turns * 2, CAPTION.turns * 2):
        with pytest.raises(SampleError, match=r"sample a/1: template document takes one text, not .*; drop"):
            processor(replace(CAPTION, turns=turns))


def test_web_text_may_hold_an_image_tag() -> None:
    processor = _documents()
    text = replace(TEXT, turns=(Turn("assistant", " see <image> here "),))
    assert processor.tokenizer.decode(processor(text).ids.tolist()) == "see <image> here"
    with pytest.raises(SampleError, match="an assistant answer is empty"):
        processor(replace(TEXT, turns=(Turn("assistant", " \n"),)))


def test_a_document_goes_on_from_its_picture_or_its_first_words() -> None:
    processor = _documents()
    alone = processor.prompt(CAPTION)
    assert alone.slots.tolist() == [Slot.TEXT, *[Slot.IMAGE] * 12]
    begun = processor.prompt(replace(CAPTION, turns=(Turn("human", "<image>A dog"), *CAPTION.turns)))
    assert begun.ids.tolist() == processor(CAPTION).ids.tolist()[: len(begun)]
    assert processor.stop_sequences() == [[2]]


def test_long_documents_are_cut_at_the_end_alone() -> None:
    long = replace(CAPTION, turns=(Turn("assistant", "a dog " * 200),))
    whole, cut = _documents(max_tokens=5000)(long), _documents(too_long="truncate_text", max_tokens=100)(long)
    assert len(cut) == 100 and cut.labels.tolist() == whole.labels[:100].tolist()


def test_pictures_and_texts_of_one_packed_batch_learn_what_each_learns_alone() -> None:
    torch.manual_seed(0)
    model = build_sphinx(vision=VISION, decoder={**DECODER, "vocab_size": 512})
    documents = _make(template="document", canvas_px=48, image_rows=model.layout["image_rows"], num_views=3)
    dialogs = _make(canvas_px=48, image_rows=model.layout["image_rows"], num_views=3, max_tokens=400)
    question = replace(SAMPLE, images=(), turns=(Turn("human", "What?"), Turn("assistant", "red")))
    examples = [documents(CAPTION), documents(TEXT), dialogs(SAMPLE), dialogs(question)]
    together = model.train()(collate_rows([examples[:3], examples[3:]]))
    assert set(together.segment.tolist()) == {0, 1, 2, 3}
    for number, example in enumerate(examples):
        alone = model(collate_rows([[example]]))
        assert torch.allclose(together.values[together.segment == number], alone.values, atol=1e-5)
        assert len(alone.values) == example.num_targets > 0
    together.values.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("turn", "role"), [(1, "human"), (2, "assistant"), (3, "human"), (4, "assistant")])
def test_the_turn_that_does_not_fit_is_named(turn: int, role: str) -> None:
    turns = [Turn("human", "What?"), Turn("assistant", "A dog."), Turn("human", "Where?"), Turn("assistant", "There.")]
    turns[turn - 1] = replace(turns[turn - 1], text="a dog " * 100)
    sample = replace(SAMPLE, turns=tuple(turns))
    line = rf"max_tokens=200, which turn {turn} \({role}\) is the first to pass; raise it, shorten that turn, or set"
    with pytest.raises(SampleTooLongError, match=line):
        _make()(sample)
    if turn < 4:
        with pytest.raises(SampleTooLongError, match=rf"which turn {turn} \({role}\) .*raise it or shorten that turn$"):
            _make().prompt(sample)
    if turn == 1:
        with pytest.raises(SampleError, match=r"no answer is left; raise max_tokens or shorten turn 1 \(human\)"):
            _make(too_long="truncate_text")(sample)


def test_the_side_of_a_single_question_that_does_not_fit_is_named() -> None:
    for number, role in ((1, "human"), (2, "assistant")):
        turns = list(SAMPLE.turns)
        turns[number - 1] = replace(turns[number - 1], text="a dog " * 100)
        with pytest.raises(SampleTooLongError, match=rf"turn {number} \({role}\)"):
            _make(template="none")(replace(SAMPLE, turns=tuple(turns)))
