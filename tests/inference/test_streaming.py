"""Text pieces as pure functions: whole characters, no part of a stop string, together the whole text."""

from __future__ import annotations

import random

import pytest

from bestiary.inference.streaming import cut_at, pieces

LETTERS = "ab \n#é€🙂"


def decode(ids: list[int]) -> str:
    """Ids are bytes; whitespace around the text goes, as processors do it."""
    return bytes(ids).decode("utf-8", errors="replace").strip()


def whole(ids: list[int], stops: list[str]) -> str:
    text = decode(ids)
    cut = cut_at(text, stops)
    return text if cut is None else cut


@pytest.mark.parametrize("stops", [[], ["ab"], ["#a#", "b\nb"], ["€", "🙂🙂"]])
def test_pieces_of_any_bytes_are_the_text_of_all_of_them(stops: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = list("".join(rng.choices(LETTERS, k=12)).encode())[: rng.randint(0, 40)]
        if rng.random() < 0.3 and ids:
            ids[rng.randrange(len(ids))] = 0xE2  # a byte that begins a character which never comes
        got = list(pieces(ids, decode, stops))
        assert "".join(got) == whole(ids, stops)
        assert all(got), "no empty pieces"
        assert not any(stop in "".join(got) for stop in stops)


def test_a_character_of_several_bytes_comes_in_one_piece() -> None:
    seen = []
    for piece in pieces(list("a€b".encode()), decode):
        seen.append(piece)
    assert seen == ["a", "€", "b"]


def test_what_may_become_a_stop_string_waits_and_what_does_not_is_given_at_once() -> None:
    assert list(pieces(list(b"x##y"), decode, ["##z"])) == ["x", "##y"]
    assert list(pieces(list(b"x##zy"), decode, ["##z"])) == ["x"]


def test_ids_after_a_stop_string_are_not_asked_for() -> None:
    asked = []

    def ids() -> object:
        for letter in b"abSTOPcd":
            asked.append(chr(letter))
            yield letter

    assert "".join(pieces(ids(), decode, ["STOP"])) == "ab"  # type: ignore[arg-type]
    assert "".join(asked) == "abSTOP"
