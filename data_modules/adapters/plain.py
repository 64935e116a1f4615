"""Our own plain format: one JSON object a record that says what a Sample says, for data that has no format yet.

    {"id": "a1", "images": ["cats/1.jpg"], "domain": "natural",
     "turns": [{"role": "human", "text": "What is <Mark 1>?"}, {"role": "assistant", "text": "A cat."}],
     "regions": [{"kind": "box", "coords": [0.1, 0.2, 0.5, 0.9], "mark": 1}], "meta": {}}

`coords` are fractions of the original picture. `id`, `images`, `domain`, `regions` and `meta` may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bestiary.schema import Region, Sample, Turn
from data_modules.adapters.images import read_image
from data_modules.adapters.protocol import Record, RejectedRecordError, sample_key
from data_modules.adapters.reading import decode_record, file_identity, json_records


class PlainAdapter:
    """One JSON array or JSON lines file of plain records.

    id_key: the record's `id` becomes the sample's key (it must be unique and a key); otherwise keys count records.
    """

    name = "plain"

    def __init__(
        self, annotations: Path, images: Path | None, *, source: str, domain: str | None = None, id_key: bool = False
    ) -> None:
        self.annotations = annotations
        self.images = images
        self.source = source
        self.domain = domain
        self.id_key = id_key

    def records(self) -> Iterator[Record]:
        """The records of the file; payload: raw JSON."""
        return json_records(self.annotations)

    def to_sample(self, record: Record) -> Sample:
        """The sample that a record spells out."""
        found = decode_record(record)
        try:
            return self._sample(record, found)
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"is not a plain record ({type(error).__name__}: {error}); it needs turns of role and text"
            raise RejectedRecordError(record.where, problem) from error

    def identity(self) -> dict[str, Any]:
        """The file, the folder of pictures and every option."""
        return {
            "format": self.name,
            "annotations": file_identity(self.annotations),
            "images": str(self.images.resolve()) if self.images else None,
            "source": self.source,
            "domain": self.domain,
            "id_key": self.id_key,
        }

    def _sample(self, record: Record, found: dict[str, Any]) -> Sample:
        domain = found.get("domain") or self.domain
        if not domain:
            raise RejectedRecordError(record.where, "names no domain; give one with --domain")
        images = tuple(read_image(self.images, name, record.where) for name in found.get("images", ()))
        return Sample(
            key=str(found["id"]) if self.id_key else sample_key(self.source, record.number),
            source=self.source,
            domain=domain,
            turns=tuple(Turn(turn["role"], turn["text"]) for turn in found["turns"]),
            images=images,
            regions=tuple(
                Region(region["kind"], tuple(map(float, region["coords"])), region["mark"])
                for region in found.get("regions", ())
            ),
            meta={**found.get("meta", {}), **({"id": found["id"]} if "id" in found else {})},
        )
