"""MDVP-Bench: folders `<domain>_<task>` with `images`, `<folder>_box.json` and `<folder>_point.json`.

One record is one question about the marks of one picture, with its reference answer. Marks are read as in `mdvp`; the
task becomes `meta["task"]`, `question_id`, `dataset_name` and `image_name` stay in `meta`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from bestiary.schema import Sample, Turn
from data_modules.adapters.boxes import Frame
from data_modules.adapters.conversations import check_filled
from data_modules.adapters.files import AnnotationFile, all_records, fields_of, identity_of, place_in
from data_modules.adapters.images import image_size, read_image
from data_modules.adapters.mdvp import check_marks, read_marks
from data_modules.adapters.protocol import Record, sample_key

DOMAINS: Mapping[str, str] = {
    "android": "screenshot",
    "multipanel": "multi_panel",
    "natural": "natural",
    "ocr_doc": "document",
    "ocr_spotting": "ocr",
    "web": "web",
}
"""Beginning of a folder's name -> domain."""


@dataclass
class MdvpBenchAdapter:
    """The folder that holds the tasks, or the folder of one task.

    images: not used; the pictures stand beside the annotations. domain: instead of DOMAINS. clip, widen: as in `mdvp`.
    """

    annotations: Path
    images: Path | None
    _: KW_ONLY
    source: str
    domain: str | None = None
    clip: bool = False
    widen: bool = False
    name: str = field(default="mdvp_bench", init=False)

    def __post_init__(self) -> None:
        if self.images is not None:
            raise ValueError(
                f"--images {self.images} has no effect on mdvp_bench: its pictures lie in <task>/images beside the "
                "annotations; leave it out"
            )

    def records(self) -> Iterator[Record]:
        """The records of all tasks, by the names of their folders and files."""
        return all_records(self._files())

    def to_sample(self, record: Record) -> Sample:
        """The question of a record, its answer, its picture and its marks."""
        fields, file = fields_of(record)
        name = fields.look("image_name")
        data = read_image(file.images, name, record.where)
        size = image_size(data, record.where, name=str(name))
        regions = read_marks(fields, Frame(*size, clip=self.clip, widen=self.widen), required=True)
        turns = (Turn("human", fields.text("question")), Turn("assistant", fields.text("gt_answers")))
        check_filled(turns, record.where)
        check_marks(turns, len(regions), record.where)
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=self.domain or file.facts["domain"],
            turns=turns,
            images=(data,),
            regions=regions,
            meta=fields.meta(task=file.facts["task"], image_size=list(size), **place_in(record)),
        )

    def identity(self) -> dict[str, Any]:
        """The files of all tasks and every option."""
        return identity_of(self, self._files())

    def _files(self) -> list[AnnotationFile]:
        folders = [self.annotations, *sorted(path for path in self.annotations.glob("*") if path.is_dir())]
        files = [
            _file(folder, path)
            for folder in folders
            for path in sorted(folder.glob("*.json"))
            if path.stem in (f"{folder.name}_box", f"{folder.name}_point")
        ]
        if not files:
            raise ValueError(
                f"{self.annotations} has no <task>/<task>_box.json or _point.json; give the folder of MDVP-Bench"
            )
        return files


def _file(folder: Path, path: Path) -> AnnotationFile:
    prefix = next((name for name in DOMAINS if folder.name.startswith(f"{name}_")), None)
    if prefix is None:
        raise ValueError(f"{folder} begins with none of {', '.join(DOMAINS)}; rename it or keep it elsewhere")
    facts = {"domain": DOMAINS[prefix], "task": folder.name.removeprefix(f"{prefix}_")}
    return AnnotationFile(path, folder / "images", label=f"{folder.name}/{path.name}", facts=facts)
