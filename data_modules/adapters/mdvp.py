"""SPHINX-V's annotations (MDVP): a dialog about one picture and its marks, points or boxes of x, y, width, height.

Coordinates are pixels of the original picture and become fractions of it, marks count from 1 in the file's order,
points win where a record has both (`bbox` then stays in `meta`). All marks are kept, also beyond the ten a published
model reads. A META yaml lists files with their `root`, `type` and `ratio`, as for SPHINX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from bestiary.schema import Region, Sample, Turn
from data_modules.adapters.boxes import Frame, box_regions, point_regions
from data_modules.adapters.conversations import check_system_policy, read_conversation
from data_modules.adapters.fields import Fields, shown
from data_modules.adapters.files import AnnotationFile, all_records, fields_of, identity_of, place_in
from data_modules.adapters.images import image_names, image_size, read_image
from data_modules.adapters.meta_list import listed_files
from data_modules.adapters.protocol import Record, RejectedRecordError, Rejection, sample_key

_ENTRY_FIELDS = ("path", "type", "root", "ratio")
_MARK = re.compile(r"<(?:Mark|Region) (\d+)>|\b(?:Mark|Region) (\d+):")


@dataclass
class MdvpAdapter:
    """A META yaml, or one annotation file.

    images: what an entry's `root` is relative to (default: the yaml's folder); of a single file, the folder of its
    pictures. domain: of all samples. clip: cut boxes and move points that leave the picture; widen: make boxes without
    width or height one pixel wide or high; otherwise such records are refused (`meta["bbox"]` or `meta["points"]` keeps
    the published numbers of a record that was changed). allow_unmarked: accept records without any mark.
    system: what becomes of a system message (`conversations.SYSTEM`). keep_empty: accept empty words and conversations
    without an answer.
    """

    annotations: Path
    images: Path | None
    _: KW_ONLY
    source: str
    domain: str | None = None
    clip: bool = False
    widen: bool = False
    allow_unmarked: bool = False
    system: str = "reject"
    keep_empty: bool = False
    name: str = field(default="mdvp", init=False)

    def __post_init__(self) -> None:
        check_system_policy(self.system)

    def records(self) -> Iterator[Record]:
        """The records of all files of the list, in its order."""
        return all_records(self._files())

    def to_sample(self, record: Record) -> Sample:
        """The dialog of a record, its picture and its marks."""
        fields, file = fields_of(record)
        if not self.domain:
            raise fields.rejected("its picture is of no domain; give one with --domain")
        names = image_names(fields.look("image"), record.where)
        if len(names) != 1:
            raise fields.rejected(f"has image {shown(fields.look('image'))}; marks lie on one picture")
        talk = read_conversation(
            fields.need("conversations"), record.where, system=self.system, keep_empty=self.keep_empty
        )
        data = read_image(file.images, names[0], record.where)
        size = image_size(data, record.where, name=names[0])
        regions = read_marks(fields, Frame(*size, clip=self.clip, widen=self.widen), required=not self.allow_unmarked)
        check_marks(talk.turns, len(regions), record.where)
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=self.domain,
            turns=talk.turns,
            images=(data,),
            regions=regions,
            meta=fields.meta(image_size=list(size), **talk.facts, **file.facts, **place_in(record)),
        )

    def identity(self) -> dict[str, Any]:
        """The list, its files, the folder of pictures and every option."""
        return identity_of(self, self._files())

    def _files(self) -> list[AnnotationFile]:
        return listed_files(self.annotations, self.images, allowed=_ENTRY_FIELDS)


def read_marks(fields: Fields, frame: Frame, *, required: bool) -> tuple[Region, ...]:
    """The marks of a record: its `points`, or else its `bbox`, in pixels of the picture."""
    for name, read in (("points", point_regions), ("bbox", box_regions)):
        found = fields.look(name)
        if not found:
            continue
        regions = read(found, frame, fields.where)
        if _is_exact(name, found, frame):
            fields.take(name)
        return regions
    if required:
        raise RejectedRecordError(
            fields.where, "has neither points nor bbox; give --option allow_unmarked=true", Rejection.REGION
        )
    return ()


def check_marks(turns: Sequence[Turn], num_regions: int, where: str) -> None:
    """RejectedRecordError where a question speaks of a mark that is not there."""
    for turn in turns:
        if turn.role != "human":
            continue
        for match in _MARK.finditer(turn.text):
            if not 1 <= int((match[1] or match[2])[:9]) <= num_regions:
                problem = f"the question speaks of {match[0]!r} but there are {num_regions} marks; add it or reword"
                raise RejectedRecordError(where, problem, Rejection.REGION)


def _is_exact(name: str, found: Any, frame: Frame) -> bool:
    """Whether no number had to be changed, so that the fractions say all."""
    if not (frame.clip or frame.widen):
        return True
    strict = Frame(frame.width, frame.height)
    try:
        (point_regions if name == "points" else box_regions)(found, strict, "")
    except RejectedRecordError:
        return False
    return True
