"""The chat form of Qwen-VL that Monkey inherits and its published models were not trained with (ChatML).

`MonkeyProcessor(chat=True)` asks in it, for weights that were.

Source: reference/monkey.md, section 6; goldens `chatml`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SYSTEM = "You are a helpful assistant."
MAX_WINDOW = 6144  # section 6: ids of history that a context may hold
START, END = "<|im_start|>", "<|im_end|>"
Exchange = tuple[str, str]
Encode = Callable[[str], list[int]]


def chat_context(
    encode: Encode,
    query: str,
    *,
    history: Sequence[Exchange] = (),
    system: str = SYSTEM,
    max_window: int | None = MAX_WINDOW,
) -> tuple[str, list[int]]:
    """The text of a conversation that waits for its answer, and its ids, as `encode` gives them piece by piece.

    The newest exchanges are kept while all fit into `max_window` ids; None keeps all.
    """
    first = _message(encode, "system", system)
    kept: list[tuple[str, list[int]]] = []
    newline, room = encode("\n"), len(first[1])
    for question, answer in reversed(history):
        asked, said = _message(encode, "user", question), _message(encode, "assistant", answer)
        ids = [*newline, *asked[1], *newline, *said[1]]
        room += len(ids)
        if max_window is not None and room >= max_window:
            break
        kept.insert(0, (f"\n{asked[0]}\n{said[0]}", ids))
    asked = _message(encode, "user", query)
    tail = [*newline, *asked[1], *newline, *encode(START), *encode("assistant"), *newline]
    text = first[0] + "".join(part for part, _ in kept) + f"\n{asked[0]}\n{START}assistant\n"
    return text, [*first[1], *(i for _, ids in kept for i in ids), *tail]


def _message(encode: Encode, role: str, words: str) -> tuple[str, list[int]]:
    """One message as text and as ids; its parts are tokenised apart."""
    ids = encode(START) + encode(role) + encode("\n")
    return f"{START}{role}\n{words}{END}", ids + encode(words) + encode(END)
