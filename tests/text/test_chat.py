from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.schema import IGNORE, Turn
from bestiary.text import chat
from bestiary.text.tokenizer import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer(Path(__file__).parents[1] / "goldens" / "sphinx" / "tiny_tokenizer.model")
NAMES = [name for name in chat.TEMPLATES if name != "nov2023_prompt"]
WORDS = st.text(alphabet="ab dog#\n.é🙂:", min_size=1, max_size=12).map(str.strip).filter(bool)


def _learned(ids: list[int], labels: list[int]) -> list[int]:
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return [label for label in labels if label != IGNORE]


@pytest.mark.parametrize("name", NAMES)
@given(answers=st.lists(WORDS, min_size=1, max_size=3))
def test_labels_are_the_answers_with_their_end_signal(name: str, answers: list[str]) -> None:
    template = chat.TEMPLATES[name]
    turns = [turn for answer in answers for turn in (Turn("human", "What?"), Turn("assistant", answer))]
    ids, labels = chat.encode_rendered(TOKENIZER, chat.render(template, turns))
    expected = [token for answer in answers for token in TOKENIZER.encode_segment(answer + template.signal)]
    assert _learned(ids, labels) == expected
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)


@given(question=WORDS, answer=WORDS)
def test_search_agrees_with_characters_unless_the_question_holds_the_answer(question: str, answer: str) -> None:
    turns = [Turn("human", question), Turn("assistant", answer)]
    rendered = chat.render(chat.TEMPLATES["current"], turns)
    ids, labels = chat.encode_rendered(TOKENIZER, rendered)
    same_ids, searched = chat.encode_rendered(TOKENIZER, rendered, search=True)
    assert ids == same_ids
    if not question.endswith(answer):
        assert searched == labels


def test_a_question_that_ends_in_the_answer_is_not_learned() -> None:
    rendered = chat.render(chat.TEMPLATES["current"], [Turn("human", "Hi my darling"), Turn("assistant", "my darling")])
    ids, labels = chat.encode_rendered(TOKENIZER, rendered)
    _, searched = chat.encode_rendered(TOKENIZER, rendered, search=True)
    assert labels != searched  # the published rule finds the question
    first = next(k for k, label in enumerate(labels) if label != IGNORE)
    assert TOKENIZER.decode(ids[:first]).endswith("Assistant:")


def test_a_prompt_is_the_beginning_of_its_training_text() -> None:
    turns = [Turn("human", "One?"), Turn("assistant", "1"), Turn("human", "Two?")]
    for name in NAMES:
        template = chat.TEMPLATES[name]
        prompt = chat.render(template, turns, is_open=True).text
        assert chat.render(template, [*turns, Turn("assistant", "2")]).text.startswith(prompt + " 2")


def test_answers_that_are_not_found_are_refused() -> None:
    assert chat.search_labels([1, 5, 6, 7, 2], [[5, 6]]) == [IGNORE, 5, 6, IGNORE, IGNORE]
    with pytest.raises(ValueError, match="answer 2 are not found"):
        chat.search_labels([1, 5, 6, 7, 2], [[5, 6], [5, 6]])


def test_the_first_turn_beyond_a_row_is_the_one_whose_last_token_it_cannot_hold() -> None:
    template, turns = chat.TEMPLATES["current"], [Turn("human", "One?"), Turn("assistant", "1"), Turn("human", "Two?")]
    takes = [len(TOKENIZER.encode(chat.render(template, turns[:n]).text, bos=True)) for n in (1, 2, 3)]
    for number, (room, after) in enumerate(zip(takes, (2, 3, None), strict=True), 1):
        assert chat.first_beyond(TOKENIZER, template, turns, room - 1) == number
        assert chat.first_beyond(TOKENIZER, template, turns, room) == after


@pytest.mark.parametrize("edges", ["one piece", "behind the begin", "over the begin", "over the end"])
def test_a_piece_across_the_answer_is_refused(edges: str) -> None:
    turns = [Turn("human", "a"), Turn("assistant", "b"), Turn("human", "c")]
    rendered = chat.render(chat.TEMPLATES["current"], turns)
    [(first, stop)], size = rendered.spans, len(rendered.text)
    begins, ends = {
        "one piece": ([0], [size]),
        "behind the begin": ([0, first + 1, stop], [first, stop, size]),
        "over the begin": ([0, first, stop], [first + 1, stop, size]),
        "over the end": ([0, first, stop - 1], [first, stop - 1, size]),
    }[edges]

    class Merging:
        bos_id, eos_id = 1, 2

        def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
            raise AssertionError

        encode_segment = encode

        def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
            return [9] * len(begins), begins, ends

    with pytest.raises(ValueError, match="merges the edge of the answer"):
        chat.encode_rendered(Merging(), rendered)


def test_published_annotations_become_turns() -> None:
    talk = [{"from": "Human", "value": "<image>\nCount."}, {"from": "GPT", "value": 7}]
    assert chat.turns_of(talk) == (Turn("human", "<image>\nCount."), Turn("assistant", "7"))
    assert chat.clean("<image>\nCount. ", chat.TEMPLATES["current"]) == "Count."
    assert chat.clean(" Count. ", chat.TEMPLATES["nov2023"]) == " Count. "
    with pytest.raises(ValueError, match="speaker 'system' is unknown"):
        chat.turns_of([{"from": "system", "value": ""}])


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"chat template 'vicunia'.*vicuna_v1_1"):
        chat.template_named("vicunia")
    with pytest.raises(ValueError, match=r"prompt 'alpacca'.*alpaca"):
        chat.single_turn_prompt("alpacca", "i")


def test_single_questions_may_hold_braces() -> None:
    text = chat.single_turn_prompt("alpaca", "use {input} and {x}", "{instruction}")
    assert "use {input} and {x}" in text and "### Input:\n{instruction}\n" in text
