"""Ovis' conversation formats as data, and the ids and labels they give.

Every turn is one string of header, words and end, tokenised by itself: chunks around `<image>` apart from one another
(so that no token spans a picture), the placeholder `IMAGE_ID` between them. Of an answer the tokens after as many as
its header has are learned. Source: reference/ovis.md, sections 1.6 and 5; AIDC-AI/Ovis, commits 8c76854 and 50bb634.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from bestiary.schema import IGNORE, IMAGE_TAG

IMAGE_ID = -200
"""Stands for a picture among token ids (section 1.4)."""

Role = Literal["system", "human", "assistant"]
Message = tuple[Role, str]
_CONTROL = re.compile(r"<[^<>\n]+>")


class WordTokenizer(Protocol):
    """What this module needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands, nothing added; control tokens written out in it become their ids."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How turns become text and what of it is learned.

    start: in front of everything. headers: what opens a turn of a role; a role without one cannot be said.
    end: closes a turn. between: follows every turn but the last. system: what is said first unless the conversation
    says something else; None for nothing. strips: words lose their outer white space.
    unlearned_tail: tokens at the end of an answer that are not learned.
    learns_open: a conversation left open has labels too, the words that begin its answer included.
    stops: control tokens that end an answer; the first is the one answers are taught to end with.
    """

    start: str
    headers: Mapping[str, str]
    end: str
    between: str
    system: str | None
    strips: bool
    unlearned_tail: int
    learns_open: bool
    stops: tuple[str, ...]

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens that turns are written with, which a tokenizer must have."""
        written = "".join((self.start, *self.headers.values(), self.end))
        return tuple(dict.fromkeys(_CONTROL.findall(written)))


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as text and as ids; `IMAGE_ID` stands for each picture. labels: the id where learned, IGNORE else.

    A picture in an answer has its placeholder among the labels too; the rows that replace it are never learned.
    """

    text: str
    ids: list[int]
    labels: list[int]


def _headers(opening: str, **names: str) -> dict[str, str]:
    """What opens a turn of each role, by the role's name in the format."""
    return {role: opening.format(name) for role, name in names.items()}


_QWEN_1_0 = ChatFormat(
    start="",
    headers=_headers("<|im_start|>{}\n", system="system", human="user", assistant="assistant"),
    end="<|im_end|>",
    between="\n",
    system="You are a helpful assistant.",
    strips=False,
    unlearned_tail=0,
    learns_open=True,
    stops=("<|im_end|>", "<|endoftext|>"),
)
_QWEN_1_5 = replace(_QWEN_1_0, end="<|im_end|>\n", between="", unlearned_tail=1, learns_open=False)
_LLAMA3 = ChatFormat(
    start="<|begin_of_text|>",
    headers=_headers(
        "<|start_header_id|>{}<|end_header_id|>\n\n", system="system", human="user", assistant="assistant"
    ),
    end="<|eot_id|>",
    between="",
    system="You are a helpful and honest multimodal assistant.",
    strips=True,
    unlearned_tail=0,
    learns_open=True,
    stops=("<|eot_id|>", "<|end_of_text|>"),
)
# Added to 1.5 in commit cc96306; the reference report tells that it exists, the markup is Gemma's own.
_GEMMA = ChatFormat(
    start="<bos>",
    headers=_headers("<start_of_turn>{}\n", human="user", assistant="model"),
    end="<end_of_turn>\n",
    between="",
    system=None,
    strips=True,
    unlearned_tail=1,
    learns_open=False,
    stops=("<end_of_turn>", "<eos>"),
)


@dataclass(frozen=True, slots=True)
class Version:
    """What a version of Ovis says of the text around pictures.

    formats: by the decoder they were written for. query: how the runner puts a picture in front of a question.
    has_grid: pictures are cut into tiles, told apart by five marks. strips_captions: an image tag inside a caption
    goes; otherwise only where there is no caption template.
    """

    formats: Mapping[str, ChatFormat]
    query: str
    has_grid: bool
    strips_captions: bool


_FORMATS_1_5 = {"qwen": _QWEN_1_5, "llama3": _LLAMA3, "gemma": _GEMMA}
VERSIONS: Mapping[str, Version] = {
    "1.0": Version({"qwen": _QWEN_1_0, "llama3": _LLAMA3}, f"{IMAGE_TAG} ", False, False),
    "1.5": Version(_FORMATS_1_5, f"{IMAGE_TAG}\n", False, True),
    "1.6": Version(_FORMATS_1_5, f"{IMAGE_TAG}\n", True, True),
}


def version_named(name: str) -> Version:
    """The version of that name."""
    if name not in VERSIONS:
        raise ValueError(f"version={name!r} of Ovis is unknown; choose one of {', '.join(VERSIONS)}")
    return VERSIONS[name]


def format_named(version: str, name: str) -> ChatFormat:
    """A version's conversation format."""
    formats = version_named(version).formats
    if name not in formats:
        raise ValueError(f"Ovis {version} has no conversation format {name!r}; choose one of {', '.join(formats)}")
    return formats[name]


def encode_chat(
    form: ChatFormat, tokenizer: WordTokenizer, messages: Sequence[Message], *, preface: str | None = None
) -> Chat:
    """Text, ids and labels of a conversation; `messages` is left alone.

    preface: leaves an answer open that begins with these words, "" for none; None closes the last turn.
    """
    said = list(messages)
    if form.system is not None and (not said or said[0][0] != "system"):
        said.insert(0, ("system", form.system))
    if preface is not None:
        said.append(("assistant", preface))
    num_header = len(encode_words(tokenizer, form.headers["assistant"]))
    texts, ids = [form.start], encode_words(tokenizer, form.start)
    labels = [IGNORE] * len(ids)
    for number, (role, words) in enumerate(said):
        is_last = number == len(said) - 1
        is_open = is_last and preface is not None
        text = _turn(form, role, words, is_last=is_last, is_open=is_open)
        turn_ids = encode_words(tokenizer, text)
        turn_labels = [IGNORE] * len(turn_ids)
        if role == "assistant" and (form.learns_open or preface is None):
            stop = len(turn_ids) - (0 if is_open else form.unlearned_tail)
            turn_labels[num_header:stop] = turn_ids[num_header:stop]
        texts.append(text)
        ids += turn_ids
        labels += turn_labels
    return Chat("".join(texts), ids, labels)


def encode_caption(tokenizer: WordTokenizer, template: str, caption: str) -> Chat:
    """A picture's caption as stage 1 learns it: no chat around it, no end; the caption's words alone are learned.

    template: text with one image tag, or the tag alone. A tag inside the caption is text.
    """
    head = encode_words(tokenizer, template)
    words = tokenizer.encode(caption)
    return Chat(template + caption, head + words, [IGNORE] * len(head) + words)


def encode_words(tokenizer: WordTokenizer, text: str) -> list[int]:
    """Ids of a text with `IMAGE_ID` for every image tag; what lies between tags is tokenised by itself."""
    ids: list[int] = []
    for number, chunk in enumerate(text.split(IMAGE_TAG)):
        if number:
            ids.append(IMAGE_ID)
        if chunk:
            ids += tokenizer.encode(chunk)
    return ids


def published_format(
    form: ChatFormat,
    tokenizer: WordTokenizer,
    conversations: list[dict[str, Any]],
    *,
    preface: str | None = None,
    mutate: bool = False,
) -> Chat:
    """`encode_chat` of a published `[{"from": system|human|gpt, "value": words}, ...]` list.

    mutate: change the list given as the published formatter does (the default system message is put in front, the
    preface behind); off unless something relies on it.
    """
    roles: dict[str, Role] = {"system": "system", "human": "human", "gpt": "assistant"}
    for message in conversations:
        if message.get("from") not in roles:
            raise ValueError(f"speaker {message.get('from')!r} is unknown; use {', '.join(roles)}")
    chat = encode_chat(form, tokenizer, [(roles[m["from"]], m["value"]) for m in conversations], preface=preface)
    if mutate:
        if form.system is not None and (not conversations or conversations[0]["from"] != "system"):
            conversations.insert(0, {"from": "system", "value": form.system})
        if preface is not None:
            conversations.append({"from": "gpt", "value": preface})
    return chat


def _turn(form: ChatFormat, role: Role, words: str, *, is_last: bool, is_open: bool) -> str:
    if role not in form.headers:
        raise ValueError(f"this conversation format has no {role} turn; it has {', '.join(form.headers)}")
    words = words.strip() if form.strips else words
    end = "" if is_open else form.end + ("" if is_last else form.between)
    return form.headers[role] + words + end
