"""Chat templates as data, and which characters of a conversation carry loss.

A conversation becomes one text; the learned parts are known as character spans while it is being written, so that one
tokenisation gives both ids and labels. The published loader instead tokenises every answer once more and looks for the
ids from left to right; `search_labels` is that rule, kept because published weights were trained with it: it also
finds a question that happens to end in the answer's words ("Hi my darling" / "my darling"), which spans never do.

Texts: LLaMA2-Accessory accessory/data/conversation/lib.py and accessory/data/system_prompt.py @ 3777c43 (2024-05-24);
`nov2023` is commit 2b2f7cb, with which the first SPHINX weights were released.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from bestiary.schema import IGNORE, IMAGE_TAG, Turn


class SpanTokenizer(Protocol):
    """What this module needs of a tokenizer."""

    @property
    def bos_id(self) -> int:
        """The id that opens every sequence."""

    @property
    def eos_id(self) -> int:
        """The id that closes every training sequence."""

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`."""

    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of `text` with the characters they cover: (ids, begins, ends)."""

    def encode_segment(self, text: str) -> list[int]:
        """Ids of `text` inside a longer text, after a space."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How turns become one text: `system`, then per turn the role's name, a space, the words and the turn's end.

    signal: the characters that end an answer; learned with it, and what generation stops at. `assistant_end` starts
        with it.
    prompt: name of the template generation uses instead, where the published demo differed from training.
    strip: clean every turn of outer white space, or (False) only turns that held an image tag.
    """

    system: str
    human: str
    assistant: str
    human_end: str
    assistant_end: str
    signal: str
    prompt: str | None = None
    strip: bool = True


_VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_LLAVA = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.Follow the instructions carefully and explain your answers in detail."
)
_CURRENT = ChatTemplate(f"{_VICUNA}\n\n###", " Human:", " Assistant:", "\n###", "\n###", "\n###")
_LLAVA_V1 = ChatTemplate(f"{_LLAVA} ", " USER:", " ASSISTANT:", " ", "</s>", "</s>")

TEMPLATES: Mapping[str, ChatTemplate] = {
    "current": _CURRENT,
    "default": _CURRENT,
    "v1": _CURRENT,
    "simple": _CURRENT,
    "multimodal": replace(_CURRENT, system=f"{_LLAVA}\n\n###"),
    "vicuna_v1_1": replace(_LLAVA_V1, system=f"{_VICUNA.replace('human', 'user')} "),
    "bair_v1": replace(_LLAVA_V1, system="BEGINNING OF CONVERSATION: ", assistant=" GPT:"),
    "llava_v1": _LLAVA_V1,
    "nov2023": ChatTemplate(
        f"{_VICUNA}\n\n### ", "Human:", "Assistant:", "\n### ", "\n### ", "\n###", prompt="nov2023_prompt", strip=False
    ),
    "nov2023_prompt": ChatTemplate(f"{_VICUNA}\n\n###", "Human:", "Assistant:", "\n###", "\n###", "\n###"),
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text.

    spans: character ranges [begin, end) that carry loss: the space before an answer, the answer, the end signal.
    learned: the same as texts, without the space.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    learned: tuple[str, ...]


def template_named(name: str) -> ChatTemplate:
    """The template of that name."""
    if name not in TEMPLATES:
        known = ", ".join((*TEMPLATES, *SINGLE_TURN, DOCUMENT))
        raise ValueError(f"chat template {name!r} is unknown; there are {known}")
    return TEMPLATES[name]


def render(template: ChatTemplate, turns: Iterable[Turn], *, is_open: bool = False) -> Rendered:
    """The text of `turns`; `is_open` adds an assistant turn that waits for its answer."""
    text = template.system
    spans, learned = [], []
    for turn in turns:
        if turn.role == "human":
            text += f"{template.human} {turn.text}{template.human_end}"
            continue
        answer = turn.text + template.signal
        begin = len(text) + len(template.assistant)
        spans.append((begin, begin + 1 + len(answer)))
        learned.append(answer)
        text += f"{template.assistant} {turn.text}{template.assistant_end}"
    if is_open:
        text += template.assistant
    return Rendered(text, tuple(spans), tuple(learned))


def encode_prompt(tokenizer: SpanTokenizer, text: str) -> list[int]:
    """Ids of a text to be continued: BOS in front, no EOS."""
    return tokenizer.encode(text, bos=True)


def encode_rendered(tokenizer: SpanTokenizer, chat: Rendered, *, search: bool = False) -> tuple[list[int], list[int]]:
    """Ids (BOS, text, EOS) and labels of a conversation; EOS itself is not learned, as in the reference.

    search: place the labels by the reference's left-to-right search instead of by characters.
    """
    if search:
        ids = tokenizer.encode(chat.text, bos=True, eos=True)
        # Only `nov2023` keeps outer spaces, and its loader looked for them too.
        parts = [tokenizer.encode(p) if p.startswith(" ") else tokenizer.encode_segment(p) for p in chat.learned]
        return ids, search_labels(ids, parts)
    tokens, begins, ends = tokenizer.encode_spans(chat.text)
    labels = [IGNORE] * len(tokens)
    for begin, end in chat.spans:
        first, stop = _tokens_of(begins, ends, begin, end, chat.text)
        labels[first:stop] = tokens[first:stop]
    return [tokenizer.bos_id, *tokens, tokenizer.eos_id], [IGNORE, *labels, IGNORE]


def first_beyond(tokenizer: SpanTokenizer, template: ChatTemplate, turns: Sequence[Turn], room: int) -> int | None:
    """Number, from 1, of the turn with which a conversation first takes more than `room` tokens; None if all fit."""
    for number in range(1, len(turns) + 1):
        if len(encode_prompt(tokenizer, render(template, turns[:number]).text)) > room:
            return number
    return None


def search_labels(ids: list[int], parts: Iterable[list[int]]) -> list[int]:
    """Labels by the reference's rule: each part's first occurrence after the one before it.

    Raises where the reference goes on with a wrong position (its miss test only works for the first part).
    """
    labels = [IGNORE] * len(ids)
    start = 0
    for number, part in enumerate(parts, 1):
        width = len(part)
        found = (k for k in range(start, len(ids) - width + 1) if ids[k] == part[0] and ids[k : k + width] == part)
        at = next(found, None)
        if at is None:
            raise ValueError(f"the tokens of answer {number} are not found in the conversation; reword the answer")
        start = at + width
        labels[at:start] = part
    return labels


def _tokens_of(begins: list[int], ends: list[int], begin: int, end: int, text: str) -> tuple[int, int]:
    first, stop = bisect_left(begins, begin), bisect_left(begins, end)
    # Words start tokens in LLaMA vocabularies, so the ids of a span do not depend on what stands around it. A
    # vocabulary with pieces across ": " or "\n###" would break that: refuse rather than mislabel.
    has_edges = first < stop and begins[first] == begin and ends[stop - 1] == end
    if not has_edges or (first and ends[first - 1] > begin):
        raise ValueError(
            f"the tokenizer merges the edge of the answer {text[begin + 1 : end][:40]!r} with its neighbours; "
            "use a tokenizer whose pieces do not cross words"
        )
    return first, stop


# Conversations as the published JSON files hold them.


def role_of(name: str) -> Literal["human", "assistant"]:
    """Our role for a speaker's name in published annotation files."""
    match name.lower():
        case "human":
            return "human"
        case "gpt" | "assistant":
            return "assistant"
    raise ValueError(f"speaker {name!r} is unknown; use human, gpt or assistant")


def turns_of(conversation: Iterable[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Turns of a `[{"from": speaker, "value": words}, ...]` list; numbers become their text."""
    return tuple(Turn(role_of(str(message["from"])), str(message["value"])) for message in conversation)


def clean(text: str, template: ChatTemplate) -> str:
    """A turn's words as the template's training texts have them: image tags out, outer white space off."""
    if template.strip or IMAGE_TAG in text:
        return text.replace(IMAGE_TAG, "").strip()
    return text


# Single questions without a chat (LLaMA2-Accessory accessory/data/system_prompt.py).

_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_DO = ". Write a response that appropriately completes the request"
_SHORT = " using a single word or phrase"
SINGLE_TURN: Mapping[str, tuple[str, str]] = {
    "alpaca": (
        f"{_TASK}{_DO}.\n\n### Instruction:\n{{instruction}}\n\n### Response:",
        f"{_TASK}{_INPUT}{_DO}.\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:",
    ),
    "shortqa": (f"{_TASK}{_DO}{_SHORT}.\n\n### Instruction:\n{{instruction}}\n\n### Response:",) * 2,
    "qg": ("Generate a question whose answer is:\n{instruction}\n\nQuestion:\n",) * 2,
    "caption": ("",) * 2,
    "none": ("{instruction}",) * 2,
}
"""Name -> (prompt without an input, prompt with one)."""


def single_turn_prompt(name: str, instruction: str, context: str | None = None) -> str:
    """The prompt in front of an answer; `context` is the optional further input of the task."""
    if name not in SINGLE_TURN:
        raise ValueError(f"single-turn prompt {name!r} is unknown; there are {', '.join(SINGLE_TURN)}")
    values = {"{instruction}": instruction, "{input}": context or ""}
    # Not str.format: instructions may hold braces of their own.
    return re.sub(r"\{instruction\}|\{input\}", lambda match: values[match[0]], SINGLE_TURN[name][bool(context)])


def encode_single_turn(tokenizer: SpanTokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids (BOS, prompt + answer, EOS) and labels: every id after as many as the prompt alone has, EOS included."""
    ids = tokenizer.encode(prompt + answer, bos=True, eos=True)
    learned_from = len(tokenizer.encode(prompt, bos=True))
    return ids, [IGNORE] * learned_from + ids[learned_from:]


# Captions and plain texts, as in pre-training (LLaMA2-Accessory accessory/data/falcon.py: every token a label but BOS).

DOCUMENT = "document"
"""Name of the form without a question, beside those of `TEMPLATES` and `SINGLE_TURN`."""


def encode_document(tokenizer: SpanTokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids (BOS, text, EOS) and labels: all but BOS."""
    ids = tokenizer.encode(text, bos=True, eos=True)
    return ids, [IGNORE, *ids[1:]]
