"""Published conversations, `[{"from": speaker, "value": words}, ...]`, as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from bestiary.schema import IMAGE_TAG, Turn
from data_modules.adapters.fields import shown, text_of
from data_modules.adapters.protocol import RejectedRecordError

SPEAKERS: Mapping[str, Literal["human", "assistant"]] = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""Speaker, in small letters -> role."""
SYSTEM = ("reject", "meta", "prepend")
"""What becomes of a system turn: refuse the record, keep its text as `meta["system"]`, or put it in front of the first
human turn with an empty line between."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a record, and what else its messages held.

    facts: `system`, the system turn's text (policy "meta"); `turn_fields`, one dict a turn, where messages have fields
    beside speaker and words. Both only where there is something to say.
    """

    turns: tuple[Turn, ...]
    facts: dict[str, Any]


def check_system_policy(system: str) -> None:
    """ValueError unless `system` is one of SYSTEM."""
    if system not in SYSTEM:
        raise ValueError(f"system={system!r} is unknown; choose one of {', '.join(SYSTEM)}")


@dataclass
class ConversationOptions:
    """What the adapters of conversation formats can be told; each says what `images` is relative to.

    domain: of samples with a picture; text_domain: of the others. system: what becomes of a system message, one of
    SYSTEM. keep_empty: accept empty words and conversations without an answer. ValueError for another `system`.
    """

    annotations: Path
    images: Path | None
    _: KW_ONLY
    source: str
    domain: str | None = None
    text_domain: str = "text"
    system: str = "reject"
    keep_empty: bool = False

    def __post_init__(self) -> None:
        check_system_policy(self.system)


def read_conversation(found: object, where: str, *, system: str = "reject", keep_empty: bool = False) -> Conversation:
    """The turns of a list of messages, words verbatim; RejectedRecordError for anything else.

    system: one of SYSTEM. keep_empty: accept empty words and conversations without an answer.
    """
    if not isinstance(found, list) or not found:
        raise RejectedRecordError(where, f"conversations is {shown(found)}; it must be a list of messages")
    turns: list[Turn] = []
    others: list[dict[str, Any]] = []
    told: str | None = None
    for number, message in enumerate(found, start=1):
        speaker, words, rest = _read_message(message, f"message {number}", where)
        if speaker == "system":
            if system == "reject" or number > 1:
                advice = "give --option system=meta or prepend" if number == 1 else "only the first message may"
                raise RejectedRecordError(where, f"message {number} is by the system; {advice}")
            told = words
            continue
        turns.append(Turn(_role(speaker, number, where), words))
        others.append(rest)
    if not keep_empty:
        check_filled(turns, where)
    facts: dict[str, Any] = {"turn_fields": others} if any(others) else {}
    if told is not None and system == "prepend":
        turns = _prepended(turns, told, where)
    elif told is not None:
        facts["system"] = told
    return Conversation(tuple(turns), facts)


def check_filled(turns: Sequence[Turn], where: str) -> None:
    """RejectedRecordError where a turn is blank or nobody answers."""
    for number, turn in enumerate(turns, start=1):
        if not turn.text.strip():
            raise RejectedRecordError(
                where, f"turn {number} ({turn.role}) is empty: {turn.text!r}; fill it or give --option keep_empty=true"
            )
    if not any(turn.role == "assistant" for turn in turns):
        raise RejectedRecordError(where, "has no answer; add one or give --option keep_empty=true")


def check_tags(turns: Sequence[Turn], num_images: int, where: str) -> None:
    """RejectedRecordError unless every `<image>` has its picture; pictures without any tag stand in front of all."""
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if tags > num_images or 0 < tags < num_images:
        raise RejectedRecordError(
            where, f"speaks of {tags} {IMAGE_TAG} but names {num_images} pictures; make them as many"
        )


def _read_message(message: object, what: str, where: str) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(message, dict) or "from" not in message or "value" not in message:
        raise RejectedRecordError(where, f"{what} is {shown(message)}; it must have the fields 'from' and 'value'")
    speaker = message["from"]
    if not isinstance(speaker, str):
        raise RejectedRecordError(where, f"{what} is by {shown(speaker)}; name human, user, gpt or assistant")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return speaker.lower(), text_of(message["value"], what, where), rest


def _role(speaker: str, number: int, where: str) -> Literal["human", "assistant"]:
    if speaker not in SPEAKERS:
        raise RejectedRecordError(
            where, f"message {number} is by {speaker!r}; speakers are {', '.join(SPEAKERS)} and system"
        )
    return SPEAKERS[speaker]


def _prepended(turns: Sequence[Turn], told: str, where: str) -> list[Turn]:
    first = next((number for number, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        raise RejectedRecordError(where, "has a system message but no human turn to put it in front of")
    said = Turn("human", f"{told}\n\n{turns[first].text}")
    return [*turns[:first], said, *turns[first + 1 :]]
