"""Qwen-VL's conversations, which Monkey is trained on: pictures and places are tags inside the words.

`<img>path</img>` becomes `<image>` in the turn's text, the picture one of the sample's, the path one of
`meta["image_paths"]`. `<ref>`, `<box>(x0,y0),(x1,y1)</box>` and `<quad>` (four corners) stay in the text, which is what
models learn; `meta["boxes"]` and `meta["quads"]` say them again as fractions of the picture, each with its turn and the
`<ref>` right before it. Coordinates are whole numbers of 0 to 1000 of the picture's width and height, and stand in the
text as models read them, `(x0,y0),(x1,y1)`, whatever blanks the file has there. Other words stay verbatim: the blank
that ends a published question is a token of its own. (The published loader reads the first two turns only and does not
look at who speaks; here a conversation that begins with an answer is refused.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestiary.schema import IMAGE_TAG, Sample, Turn
from data_modules.adapters.boxes import THOUSANDTHS, thousandths
from data_modules.adapters.conversations import ConversationOptions, read_conversation
from data_modules.adapters.fields import Fields, shown
from data_modules.adapters.files import domain_of, identity_of
from data_modules.adapters.images import read_image
from data_modules.adapters.protocol import Record, RejectedRecordError, Rejection, sample_key
from data_modules.adapters.reading import decode_record, json_records

_TAG = re.compile(r"<(/?)(img|ref|box|quad)>")
_PLACE = re.compile(r"\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*")
_BETWEEN = re.compile(r"(?<=\))\s*,")
_CORNERS = {"box": 2, "quad": 4}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a turn: plain `text`, or what stands between a pair of tags (`img`, `ref`, `box`, `quad`)."""

    kind: str
    text: str


@dataclass
class QwenVlAdapter(ConversationOptions):
    """One file of Qwen-VL conversations, a JSON array or JSON lines.

    images: the folder that paths are relative to. clip: coordinates beyond 1000 become 1000, in the words as in `meta`,
    instead of refusing the record.
    """

    clip: bool = False
    name: str = field(default="qwen_vl", init=False)

    def records(self) -> Iterator[Record]:
        """The records of the file; payload: raw JSON."""
        return json_records(self.annotations)

    def to_sample(self, record: Record) -> Sample:
        """The conversation of a record, with the pictures and the places its words name."""
        fields = Fields(decode_record(record), record.where)
        talk = read_conversation(
            fields.need("conversations"), record.where, system=self.system, keep_empty=self.keep_empty
        )
        if talk.turns and talk.turns[0].role == "assistant":
            told = shown(talk.turns[0].text)
            raise RejectedRecordError(record.where, f"begins with the answer {told}; put its question in front")
        turns, paths, places = [], [], _Places(record.where, self.clip)
        for number, turn in enumerate(talk.turns):
            parts = split_tags(turn.text, record.where)
            paths += _paths(parts, turn, record.where)
            parts = places.add(parts, number)
            turns.append(Turn(turn.role, _with_image_tags(parts)))
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=domain_of(self, len(paths), record.where),
            turns=tuple(turns),
            images=tuple(read_image(self.images, path, record.where) for path in paths),
            meta=fields.meta(
                image_paths=paths or None, boxes=places.boxes or None, quads=places.quads or None, **talk.facts
            ),
        )

    def identity(self) -> dict[str, Any]:
        """The file, the folder of pictures and every option."""
        return identity_of(self)


def split_tags(text: str, where: str) -> list[Part]:
    """A turn's text as plain and tagged stretches; RejectedRecordError where tags are not in whole, separate pairs."""
    if IMAGE_TAG in text:
        raise RejectedRecordError(where, f"says {IMAGE_TAG} by itself; pictures are <img>path</img> in this format")
    parts: list[Part] = []
    opened, at = "", 0
    for tag in _TAG.finditer(text):
        is_end, kind = bool(tag[1]), tag[2]
        if is_end != bool(opened) or (is_end and kind != opened):
            problem = f"<{opened}> is followed by {tag[0]}" if opened else f"{tag[0]} closes nothing"
            raise RejectedRecordError(where, f"{problem} in {shown(text)}; close every tag before the next one")
        stretch = text[at : tag.start()]
        if opened or stretch:
            parts.append(Part(opened or "text", stretch))
        opened, at = "" if is_end else kind, tag.end()
    if opened:
        raise RejectedRecordError(where, f"<{opened}> is not closed in {shown(text)}; add </{opened}>")
    return [*parts, Part("text", text[at:])] if at < len(text) else parts


class _Places:
    """The boxes and quads of a conversation, as fractions."""

    def __init__(self, where: str, clip: bool) -> None:
        self.where = where
        self.clip = clip
        self.boxes: list[dict[str, Any]] = []
        self.quads: list[dict[str, Any]] = []

    def add(self, parts: Sequence[Part], turn: int) -> list[Part]:
        """Takes the places of one turn, and gives its parts with the places as models read them.

        Each belongs to the `<ref>` in front of it, over other places in between.
        """
        ref, plain = None, []
        for part in parts:
            if part.kind in _CORNERS:
                values, fractions = self._read(part)
                place: dict[str, Any] = {"turn": turn, part.kind: fractions}
                (self.boxes if part.kind == "box" else self.quads).append(place | ({} if ref is None else {"ref": ref}))
                corners = zip(values[::2], values[1::2], strict=True)
                plain.append(Part(part.kind, ",".join(f"({x},{y})" for x, y in corners)))
            else:
                ref = part.text.strip() if part.kind == "ref" else None
                plain.append(part)
        return plain

    def _read(self, part: Part) -> tuple[list[int], list[float]]:
        """A place's numbers, none beyond 1000, and as fractions."""
        told = f"<{part.kind}>{shown(part.text)[1:-1]}</{part.kind}>"
        found = [_PLACE.fullmatch(corner) for corner in _BETWEEN.split(part.text)]
        if len(found) != _CORNERS[part.kind] or not all(found):
            raise self._rejected(f"{told} must be {_CORNERS[part.kind]} corners (x,y) of whole numbers, commas between")
        values = [int(number) for match in found if match for number in match.groups()]
        if part.kind == "box" and (values[0] > values[2] or values[1] > values[3]):
            raise self._rejected(f"{told} has its corners the wrong way round; the upper left comes first")
        fractions = thousandths(values, told, self.where, clip=self.clip)
        return [min(value, THOUSANDTHS) for value in values], fractions

    def _rejected(self, problem: str) -> RejectedRecordError:
        return RejectedRecordError(self.where, problem, Rejection.REGION)


def _paths(parts: Sequence[Part], turn: Turn, where: str) -> list[str]:
    paths = [part.text for part in parts if part.kind == "img"]
    if paths and turn.role == "assistant":
        raise RejectedRecordError(where, f"an answer shows the picture {paths[0]!r}; pictures belong to questions")
    return paths


def _with_image_tags(parts: Sequence[Part]) -> str:
    forms = {"text": "{}", "img": IMAGE_TAG}
    return "".join(forms.get(part.kind, f"<{part.kind}>{{}}</{part.kind}>").replace("{}", part.text) for part in parts)
