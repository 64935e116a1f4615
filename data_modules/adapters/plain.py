"""Our own plain format: one JSON object a record that says what a Sample says, for data that has no format yet.

    {"id": "a1", "images": ["cats/1.jpg"], "domain": "natural",
     "turns": [{"role": "human", "text": "What is <Mark 1>?"}, {"role": "assistant", "text": "A cat."}],
     "regions": [{"kind": "box", "coords": [0.1, 0.2, 0.5, 0.9], "mark": 1}], "meta": {}}

`coords` are fractions of the original picture, marks count from 1. `id`, `images`, `domain`, `regions` and `meta` may
be left out. Nothing is dropped: any other field is refused, and `meta` takes what has no field of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bestiary.schema import Region, Sample, Turn
from data_modules.adapters.boxes import numbers
from data_modules.adapters.conversations import check_filled, check_tags
from data_modules.adapters.fields import shown, text_of
from data_modules.adapters.images import read_image
from data_modules.adapters.mdvp import check_marks
from data_modules.adapters.protocol import Record, RejectedRecordError, Rejection, sample_key
from data_modules.adapters.reading import decode_record, file_identity, json_records

_OPTIONAL = ("id", "images", "domain", "regions", "meta")
_ROLES = ("human", "assistant")
_KINDS = ("point", "box", "stroke")


class PlainAdapter:
    """One JSON array or JSON lines file of plain records.

    id_key: the record's `id` becomes the sample's key (it must be unique and a key); otherwise keys count records.
    keep_empty: accept empty words and conversations without an answer.
    """

    name = "plain"

    def __init__(
        self,
        annotations: Path,
        images: Path | None,
        *,
        source: str,
        domain: str | None = None,
        id_key: bool = False,
        keep_empty: bool = False,
    ) -> None:
        self.annotations = annotations
        self.images = images
        self.source = source
        self.domain = domain
        self.id_key = id_key
        self.keep_empty = keep_empty

    def records(self) -> Iterator[Record]:
        """The records of the file; payload: raw JSON."""
        return json_records(self.annotations)

    def to_sample(self, record: Record) -> Sample:
        """The sample that a record spells out."""
        where = record.where
        found = _object(decode_record(record), "plain record", ("turns",), where, others=_OPTIONAL)
        turns, names, regions = _turns(found, where), _list(found, "images", where), _regions(found, where)
        if not self.keep_empty:
            check_filled(turns, where)
        check_tags(turns, len(names), where)
        check_marks(turns, len(regions), where)
        return Sample(
            key=self._key(found, record),
            source=self.source,
            domain=self._domain(found, where),
            turns=turns,
            images=tuple(read_image(self.images, name, where) for name in names),
            regions=regions,
            meta=_meta(found, where),
        )

    def identity(self) -> dict[str, Any]:
        """The file, the folder of pictures and every option."""
        return {
            "format": self.name,
            "annotations": file_identity(self.annotations),
            "images": str(self.images.resolve()) if self.images else None,
            "source": self.source,
            "domain": self.domain,
            "id_key": self.id_key,
            "keep_empty": self.keep_empty,
        }

    def _key(self, found: dict[str, Any], record: Record) -> str:
        if not self.id_key:
            return sample_key(self.source, record.number)
        if "id" not in found:
            raise RejectedRecordError(record.where, "has no id; give it one or leave out --option id_key=true")
        return text_of(found["id"], "id", record.where)

    def _domain(self, found: dict[str, Any], where: str) -> str:
        domain = found.get("domain") or self.domain
        if not domain:
            raise RejectedRecordError(where, "names no domain; give one with --domain")
        return text_of(domain, "domain", where)


def _object(
    found: object, form: str, needed: Sequence[str], where: str, *, others: Sequence[str] = (), number: int = 0
) -> dict[str, Any]:
    """An object with all fields that are needed and none that is unknown; RejectedRecordError for anything else.

    form: what it is, and number: which one of the record, 0 for the record itself.
    """
    told, known = f"{form} {number} " if number else "", ", ".join((*needed, *others))
    if not isinstance(found, dict):
        raise RejectedRecordError(where, f"{told}is {shown(found)}; a {form} is an object of {known}")
    if unknown := [name for name in found if name not in (*needed, *others)]:
        problem = f"{told}has the unknown fields {shown(unknown)}; a {form} may have {known}; put the rest into meta"
        raise RejectedRecordError(where, problem)
    if missing := [name for name in needed if name not in found]:
        raise RejectedRecordError(where, f"{told}has no {missing[0]}; a {form} needs {', '.join(needed)}")
    return found


def _list(found: dict[str, Any], name: str, where: str) -> list[Any]:
    """A field that is a list, empty where it is left out."""
    values = found.get(name, [])
    if not isinstance(values, list):
        raise RejectedRecordError(where, f"{name} is {shown(values)}; it must be a list, write [...]")
    return values


def _turns(found: dict[str, Any], where: str) -> tuple[Turn, ...]:
    turns = []
    for number, value in enumerate(_list(found, "turns", where), start=1):
        turn = _object(value, "turn", ("role", "text"), where, number=number)
        if turn["role"] not in _ROLES:
            problem = f"turn {number} has role {shown(turn['role'])}; it must be human or assistant"
            raise RejectedRecordError(where, problem, Rejection.SAMPLE)
        if not isinstance(turn["text"], str):
            raise RejectedRecordError(where, f"text of turn {number} is {shown(turn['text'])}; it must be text")
        turns.append(Turn(turn["role"], turn["text"]))
    if not turns:
        problem = "conversation is empty; a sample needs at least one turn"
        raise RejectedRecordError(where, problem, Rejection.SAMPLE)
    return tuple(turns)


def _regions(found: dict[str, Any], where: str) -> tuple[Region, ...]:
    """The regions with the marks 1, 2, ..., each once, in any order."""
    listed = enumerate(_list(found, "regions", where), start=1)
    regions = tuple(_region(value, number, where) for number, value in listed)
    marks = [region.mark for region in regions]
    is_whole = all(isinstance(mark, int) and not isinstance(mark, bool) for mark in marks)
    if not is_whole or sorted(marks) != list(range(1, len(marks) + 1)):
        problem = f"regions have the marks {shown(marks)}; number them 1 to {len(marks)}, each once"
        raise RejectedRecordError(where, problem, Rejection.REGION)
    return regions


def _region(value: object, number: int, where: str) -> Region:
    found = _object(value, "region", ("kind", "coords", "mark"), where, number=number)
    kind, coords = found["kind"], found["coords"]
    if kind not in _KINDS:
        problem = f"region {number} has kind {shown(kind)}; it must be point, box or stroke"
        raise RejectedRecordError(where, problem, Rejection.REGION)
    length = len(coords) if isinstance(coords, list) else 0
    count = {"point": 2, "box": 4}.get(kind, max(4, length + length % 2))
    values = numbers(coords, count, f"coords of region {number} ({kind})", where)
    region = Region(kind, tuple(map(float, values)), found["mark"])
    if kind == "stroke" and region.box[:2] == region.box[2:]:
        raise RejectedRecordError(where, f"region {number} (stroke) has no length; make it a point", Rejection.REGION)
    return region


def _meta(found: dict[str, Any], where: str) -> dict[str, Any]:
    """The record's `meta`, with its `id`."""
    meta = found.get("meta", {})
    if not isinstance(meta, dict):
        raise RejectedRecordError(where, f"meta is {shown(meta)}; it must be an object, write {{...}}")
    own = {"id": found["id"]} if "id" in found else {}
    if own and meta.get("id", own["id"]) != own["id"]:
        problem = f"has the id {shown(own['id'])} but another in meta, {shown(meta['id'])}; rename that of meta"
        raise RejectedRecordError(where, problem)
    return meta | own
