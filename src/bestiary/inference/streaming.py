"""Token ids to pieces of text as soon as they are sure: whole characters, and never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

_INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that make no character (yet)."""


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None where there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else None


def pieces(ids: Iterable[int], decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> Iterator[str]:
    """Pieces that together are the text of all ids, cut at the first stop string.

    decode: ids to text without outer white space. A piece never ends in bytes that may become a character, in white
    space that may turn out to be the end, or in what may become a stop string.
    """
    given, seen = "", list[int]()
    for token in ids:
        seen.append(token)
        text = decode(seen)
        whole = cut_at(text, stops)
        if whole is not None:
            yield from _rest(whole, given)
            return
        sure = _sure(text, stops)
        yield from _rest(sure, given)
        given = max(given, sure, key=len)
    yield from _rest(decode(seen) if seen else "", given)


def _rest(text: str, given: str) -> Iterator[str]:
    assert text.startswith(given) or given.startswith(text), f"{given!r} was given, but the text became {text!r}"
    if len(text) > len(given):
        yield text[len(given) :]


def _sure(text: str, stops: Sequence[str]) -> str:
    """The part that later ids cannot change."""
    text = text.rstrip(_INCOMPLETE)
    held = 0
    for stop in stops:
        tails = (length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length]))
        held = max(held, next(tails, 0))
    return text[: len(text) - held].rstrip()
