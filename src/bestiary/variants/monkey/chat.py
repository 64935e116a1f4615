"""The chat form of Qwen-VL that Monkey inherits and its published models were not trained with (ChatML).

Source: reference/monkey.md, section 6; goldens `chatml`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bestiary.text.tokenizer import Tokenizer

SYSTEM = "You are a helpful assistant."
MAX_WINDOW = 6144  # section 6: ids of history that a context may hold
START, END = "<|im_start|>", "<|im_end|>"
Exchange = tuple[str, str]


def chat_context(
    tokenizer: Tokenizer,
    query: str,
    *,
    history: Sequence[Exchange] = (),
    system: str = SYSTEM,
    max_window: int = MAX_WINDOW,
    picture_ids: int = 0,
) -> tuple[str, list[int]]:
    """The text of a conversation that waits for its answer, and its ids.

    The newest exchanges are kept while all fit into `max_window` ids. picture_ids: what a picture counts for there
    beyond its tags; the pictures' own rows are not among the ids returned.
    """
    first = _message(tokenizer, "system", system)
    kept: list[tuple[str, list[int]]] = []
    room = len(first[1]) + picture_ids * query.count("<img>")
    for question, answer in reversed(history):
        asked, said = _message(tokenizer, "user", question), _message(tokenizer, "assistant", answer)
        newline = tokenizer.encode("\n")
        ids = [*newline, *asked[1], *newline, *said[1]]
        num = len(ids) + picture_ids * question.count("<img>")
        if room + num + sum(len(own) for _, own in kept) >= max_window:
            break
        kept.insert(0, (f"\n{asked[0]}\n{said[0]}", ids))
    asked = _message(tokenizer, "user", query)
    newline = tokenizer.encode("\n")
    tail = [*newline, *asked[1], *newline, *tokenizer.encode(START), *tokenizer.encode("assistant"), *newline]
    text = first[0] + "".join(part for part, _ in kept) + f"\n{asked[0]}\n{START}assistant\n"
    return text, [*first[1], *(i for _, ids in kept for i in ids), *tail]


def _message(tokenizer: Tokenizer, role: str, words: str) -> tuple[str, list[int]]:
    """One message as text and as ids; its parts are tokenised apart."""
    ids = tokenizer.encode(START) + tokenizer.encode(role) + tokenizer.encode("\n")
    return f"{START}{role}\n{words}{END}", ids + tokenizer.encode(words) + tokenizer.encode(END)
