"""LLaVA's JSON: `{"id", "image": name or names, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`.

The words stay verbatim, `<image>` included: the k-th tag is where the k-th picture stands. `id`, `image` (the names)
and every field the format does not know stay in `meta`. Speakers are human, user, gpt and assistant, in any case.
A record that names pictures or a film in `images` or `video` alone is refused: it would be a text without what it
speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bestiary.schema import Sample
from data_modules.adapters.conversations import ConversationOptions, check_tags, read_conversation
from data_modules.adapters.fields import Fields, shown
from data_modules.adapters.files import domain_of, identity_of
from data_modules.adapters.images import image_names, read_image
from data_modules.adapters.protocol import Record, sample_key
from data_modules.adapters.reading import decode_record, json_records

_OTHERS = ("images", "video")
"""Fields of other formats that say of what the conversation is."""


@dataclass
class LlavaAdapter(ConversationOptions):
    """One file of LLaVA records, a JSON array or JSON lines.

    images: the folder that picture names are relative to.
    """

    name: str = field(default="llava", init=False)

    def records(self) -> Iterator[Record]:
        """The records of the file; payload: raw JSON."""
        return json_records(self.annotations)

    def to_sample(self, record: Record) -> Sample:
        """The conversation of a record with its pictures."""
        fields = Fields(decode_record(record), record.where)
        names = image_names(fields.look("image"), record.where)
        if not names and (other := next(filter(fields.look, _OTHERS), None)):
            told = f"has {other} {shown(fields.look(other))} but no image"
            raise fields.rejected(f"{told}; name its pictures in the field 'image' or drop the record")
        talk = read_conversation(
            fields.need("conversations"), record.where, system=self.system, keep_empty=self.keep_empty
        )
        check_tags(talk.turns, len(names), record.where)
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=domain_of(self, len(names), record.where),
            turns=talk.turns,
            images=tuple(read_image(self.images, name, record.where) for name in names),
            meta=fields.meta(**talk.facts),
        )

    def identity(self) -> dict[str, Any]:
        """The file, the folder of pictures and every option."""
        return identity_of(self)
