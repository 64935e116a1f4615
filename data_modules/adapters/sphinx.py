"""SPHINX's data (LLaMA2-Accessory): a META yaml of annotation files, or one of them: JSON, JSON lines or CSV with tabs.

A record with `conversations` is a dialog; one with `instruction`, `input`, `output` is a single turn, its `input` kept
as `meta["input"]` for the question form of the processor. An entry's `preprocess` reads records otherwise:
`single_turn_llava` wants a dialog of one question and one answer, `caption` a caption (or several, of which the
record's number takes one; the published reader draws anew each time) for the picture at `url`, after an empty question.
`type` and `prompt_type` of the entry go into `meta`; both forms know `root` and `ratio` (the published single-turn
reader ignores them). Words stay verbatim, `<image>` included; published processors cut the tags and the outer blanks.
A tag without a picture is refused, for no model could tell what it means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bestiary.schema import IMAGE_TAG, Sample, Turn
from data_modules.adapters.conversations import (
    Conversation,
    ConversationOptions,
    check_filled,
    read_conversation,
)
from data_modules.adapters.fields import Fields, shown, text_of
from data_modules.adapters.files import AnnotationFile, all_records, domain_of, fields_of, identity_of, place_in
from data_modules.adapters.images import image_names, read_image
from data_modules.adapters.meta_list import ENTRY_FIELDS, listed_files
from data_modules.adapters.protocol import Record, sample_key


@dataclass
class SphinxAdapter(ConversationOptions):
    """A META yaml, or one annotation file.

    images: what an entry's `root` is relative to (default: the yaml's folder); of a single file, the folder of its
    pictures.
    """

    name: str = field(default="sphinx", init=False)

    def records(self) -> Iterator[Record]:
        """The records of all files of the list, in its order."""
        return all_records(self._files())

    def to_sample(self, record: Record) -> Sample:
        """The dialog or single turn of a record, with its picture."""
        fields, file = fields_of(record)
        preprocess = file.facts.get("preprocess")
        names = image_names(fields.look("url" if preprocess == "caption" else "image"), record.where)
        talk = self._talk(fields, preprocess, record)
        if not names and any(IMAGE_TAG in turn.text for turn in talk.turns):
            raise fields.rejected(f"speaks of an {IMAGE_TAG} but names no picture; add it or cut the tag")
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=domain_of(self, len(names), record.where),
            turns=talk.turns,
            images=tuple(read_image(file.images, name, record.where) for name in names),
            meta=fields.meta(**talk.facts, **file.facts, **place_in(record)),
        )

    def identity(self) -> dict[str, Any]:
        """The list, its files, the folder of pictures and every option."""
        return identity_of(self, self._files())

    def _files(self) -> list[AnnotationFile]:
        return listed_files(self.annotations, self.images, allowed=ENTRY_FIELDS)

    def _talk(self, fields: Fields, preprocess: str | None, record: Record) -> Conversation:
        where = record.where
        if preprocess == "caption":
            return _caption(fields, record.payload.number)
        if "conversations" not in fields:
            return self._single_turn(fields)
        found = fields.need("conversations")
        talk = read_conversation(found, where, system=self.system, keep_empty=self.keep_empty)
        if preprocess and [turn.role for turn in talk.turns] != ["human", "assistant"]:
            raise fields.rejected(
                f"has {len(talk.turns)} turns, but {preprocess} reads one question and its answer; drop preprocess"
            )
        return talk

    def _single_turn(self, fields: Fields) -> Conversation:
        if "instruction" not in fields or "output" not in fields:
            raise fields.rejected("has neither conversations nor instruction and output; is it of another format?")
        context = fields.look("input")
        if context is not None:
            text_of(context, "field 'input'", fields.where)
        turns = (Turn("human", fields.text("instruction")), Turn("assistant", fields.text("output")))
        if not self.keep_empty:
            check_filled(turns, fields.where)
        return Conversation(turns, {})


def _caption(fields: Fields, number: int) -> Conversation:
    """An empty question and the caption; several captions stay in meta."""
    found = fields.look("caption")
    captions = found if isinstance(found, list) else [found]
    if not captions or not fields.look("url"):
        raise fields.rejected(f"has caption {shown(found)} and url {shown(fields.look('url'))}; both are needed")
    text = text_of(captions[number % len(captions)], "the caption", fields.where)
    if not text.strip():
        raise fields.rejected("has an empty caption; write one or drop the record")
    if not isinstance(found, list):
        fields.take("caption")
    return Conversation((Turn("human", ""), Turn("assistant", text)), {})
