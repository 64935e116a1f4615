"""What every variant's processor asks of a sample's text, says of what is wrong with it, and remembers of it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from bestiary.schema import Sample, SampleError
from bestiary.text.tokenizer import Tokenizer

TOO_LONG = ("error", "skip", "truncate_text")
"""What a processor may do with a sample that fits no row: the last cuts its text, the others raise."""


def check_too_long(too_long: str) -> None:
    """Raise for a policy that there is not."""
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r} is unknown; choose one of {', '.join(TOO_LONG)}")


def check_quirks(quirks: Iterable[str], known: Sequence[str]) -> None:
    """Raise for a quirk of the published code that a processor does not have."""
    if unknown := [quirk for quirk in quirks if quirk not in known]:
        raise ValueError(f"quirk {unknown[0]!r} is unknown; there are {', '.join(known)}")


def require_text(text: object, where: str) -> str:
    """The text itself; ValueError for what is none, and for half a surrogate pair, which JSON can spell."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is {text!r:.40}, not text; write it as a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            odd = text[error.start]
            raise ValueError(f"{where} holds the lone surrogate {odd!a}; write the text as UTF-8") from error
    return text


def text_key(sample: Sample, *more: object) -> Hashable | None:
    """What shapes a sample's text and what it is checked for; None where that cannot be told in a key.

    more: what a variant reads beside turns, regions and the number of pictures.
    """
    key = (sample.turns, len(sample.images), sample.regions, *more)
    try:
        hash(key)
    except TypeError:  # made by hand with lists in it
        return None
    return key


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Names the sample in every error about its data."""
    try:
        yield
    except SampleError:
        raise
    except ValueError as error:
        raise SampleError(sample.key, str(error)) from error


def fingerprint_of(processor: object, tokenizer: Tokenizer, *, pixels: str) -> str:
    """A digest of everything that shapes examples: a processor's plain settings and the tokenizer's content.

    pixels: a word for how pixels are made, another one wherever that changes.
    """
    settings = {k: v for k, v in sorted(vars(processor).items()) if isinstance(v, str | int | bool | tuple)}
    told = f"{type(processor).__name__} {settings} {tokenizer.sha256} {pixels}"
    return hashlib.sha256(told.encode()).hexdigest()
