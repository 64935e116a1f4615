"""What every processor says of a sample's text and remembers of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bestiary.schema import Region, Sample, SampleError, SampleTooLongError, Turn
from bestiary.text.samples import fingerprint_of, naming, require_text, text_key
from bestiary.text.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "goldens/ovis/tokenizers/qwen"
PLAIN = Sample("k", "s", "d", (Turn("human", "Hi"), Turn("assistant", "yes")))


def test_texts_share_a_key_only_where_everything_that_is_checked_is_equal() -> None:
    turns, point = PLAIN.turns, Region("point", (0.5, 0.5), 1)
    others = [
        Sample("k", "s", "d", turns[:1]),
        Sample("k", "s", "d", turns, (b"",)),
        Sample("k", "s", "d", turns, regions=(point,)),
    ]
    assert text_key(PLAIN) == text_key(Sample("other", "t", "e", turns))
    assert len({text_key(PLAIN), text_key(PLAIN, "system"), *map(text_key, others)}) == 5
    assert text_key(PLAIN, ["a", "list"]) is None


def test_an_error_names_its_sample_once_and_keeps_its_kind() -> None:
    with pytest.raises(SampleError, match=r"^sample k: too odd$"), naming(PLAIN), naming(PLAIN):
        raise ValueError("too odd")
    with pytest.raises(SampleTooLongError), naming(PLAIN):
        raise SampleTooLongError("k", "too long", 3, 2)


@pytest.mark.parametrize(("text", "told"), [(3, "turn 1 is 3, not text"), ("a\ud800", r"lone surrogate '\\ud800'")])
def test_what_is_no_text_is_told_with_its_place(text: object, told: str) -> None:
    assert require_text("é", "turn 1") == "é"
    with pytest.raises(ValueError, match=told):
        require_text(text, "turn 1")


def test_a_digest_follows_settings_and_the_way_pixels_are_made() -> None:
    class Settings:
        def __init__(self, size: int) -> None:
            self.size = size

    tokenizer = load_tokenizer(TOKENIZER)
    first = fingerprint_of(Settings(3), tokenizer, pixels="one")
    assert first == fingerprint_of(Settings(3), tokenizer, pixels="one")
    others = [
        fingerprint_of(Settings(4), tokenizer, pixels="one"),
        fingerprint_of(Settings(3), tokenizer, pixels="two"),
    ]
    assert first not in others
