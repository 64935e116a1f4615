"""Ovis' data: a `dataset_info.json` that names data sets, `{name: {meta_file, image_dir, data_format}}`.

`caption` is a parquet of `caption` and `image_path`: one sample a row, whose question is the caption template (or
`<image>` alone) and whose answer is the caption; `meta["data_format"]` tells a processor that there is no chat around
them. The template is the data set's `caption_template`, or the option for all that have none. `conversation` is a JSON
list as LLaVA's, with system messages (`meta["system"]`) and text-only records.

Published rules that a sample carries: of several pictures version 1.0 uses the first (the others stay in
`meta["image"]`); a caption loses `<image>` only where there is no template (1.0) or always (1.5), a missing caption is
an empty one. What it cannot carry: the published loader keeps a record with a missing or broken picture as one without
any target, which teaches nothing; here it is refused and reported. Likewise an empty caption, unless keep_empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestiary.schema import IMAGE_TAG, Sample, Turn
from data_modules.adapters.conversations import (
    Conversation,
    ConversationOptions,
    check_filled,
    check_tags,
    read_conversation,
)
from data_modules.adapters.fields import Fields, shown, text_of
from data_modules.adapters.files import AnnotationFile, all_records, domain_of, fields_of, identity_of, place_in
from data_modules.adapters.images import image_names, read_image
from data_modules.adapters.protocol import Record, sample_key
from data_modules.adapters.reading import whole_json

TEMPLATE_1_0 = "<image>'s caption: "
"""The template of Ovis 1.0's first stage, given to its trainer (AIDC-AI/Ovis @ 8c76854)."""
VERSIONS = ("1.0", "1.5")
_ENTRY_FIELDS = ("meta_file", "image_dir", "data_format", "caption_template")


@dataclass
class OvisAdapter(ConversationOptions):
    """A dataset_info.json.

    images: where a relative `image_dir` starts (default: the file's folder). dataset: the one data set to read
    (default: all). moved: `OLD=NEW` replaces the beginning of the paths in the file, which are the authors' own.
    version: whose rules, 1.0 or 1.5. caption_template: for caption sets that name none; `<image>` stands where the
    picture does.
    """

    dataset: str = ""
    moved: str = ""
    version: str = "1.0"
    caption_template: str = ""
    system: str = "meta"
    name: str = field(default="ovis", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version!r} is unknown; choose {' or '.join(VERSIONS)}")
        if self.moved.count("=") != bool(self.moved):
            raise ValueError(f"moved={self.moved!r}; write OLD=NEW")
        _check_template(self.caption_template, "caption_template")

    def records(self) -> Iterator[Record]:
        """The records of the chosen data sets, in the file's order."""
        return all_records(self._files())

    def to_sample(self, record: Record) -> Sample:
        """The caption or the conversation of a record, with its pictures."""
        fields, file = fields_of(record)
        is_caption = file.facts["data_format"] == "caption"
        names = image_names(fields.look("image_path" if is_caption else "image"), record.where)
        if names and file.images is None:
            raise fields.rejected(f"names picture {shown(names[0])} but the data set {file.label!r} has no image_dir")
        if is_caption:
            talk = self._caption(fields, file.facts.get("caption_template") or self.caption_template)
        else:
            names = names[:1] if self.version == "1.0" else names
            talk = self._conversation(fields, len(names))
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=domain_of(self, len(names), record.where),
            turns=talk.turns,
            images=tuple(read_image(file.images, name, record.where) for name in names),
            meta=fields.meta(data_format=file.facts["data_format"], **talk.facts, **place_in(record)),
        )

    def identity(self) -> dict[str, Any]:
        """The list, its files, the folder of pictures and every option."""
        return identity_of(self, self._files())

    def _caption(self, fields: Fields, template: str) -> Conversation:
        found = fields.take("caption")
        caption = "" if found is None else text_of(found, "the caption", fields.where)
        if not template or self.version != "1.0":
            caption = caption.replace(IMAGE_TAG, "")
        if not fields.look("image_path"):
            raise fields.rejected(f"has image_path {shown(fields.look('image_path'))}; name the picture of the caption")
        turns = (Turn("human", template or IMAGE_TAG), Turn("assistant", caption))
        if not self.keep_empty:
            check_filled(turns, fields.where)
        return Conversation(turns, {})

    def _conversation(self, fields: Fields, num_images: int) -> Conversation:
        found = fields.need("conversations")
        talk = read_conversation(found, fields.where, system=self.system, keep_empty=self.keep_empty)
        check_tags(talk.turns, num_images, fields.where)
        return talk

    def _files(self) -> list[AnnotationFile]:
        listed = _load(self.annotations)
        if self.dataset and self.dataset not in listed:
            raise ValueError(f"{self.annotations} has no data set {self.dataset!r}, only {', '.join(listed)}")
        return [self._file(name, listed[name]) for name in listed if self.dataset in ("", name)]

    def _file(self, name: str, entry: object) -> AnnotationFile:
        told = f"{self.annotations}: data set {name!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("meta_file"), str):
            raise ValueError(f"{told} is {shown(entry)}; it must name its meta_file")
        if unknown := [option for option in entry if option not in _ENTRY_FIELDS]:
            raise ValueError(f"{told} has {', '.join(unknown)}; it may have {', '.join(_ENTRY_FIELDS)}")
        if entry.get("data_format") not in ("caption", "conversation"):
            raise ValueError(f"{told} has data_format {entry.get('data_format')!r}; use caption or conversation")
        folder, template = entry.get("image_dir"), entry.get("caption_template")
        if not isinstance(folder, str | None) or not isinstance(template, str | None):
            raise ValueError(f"{told}: image_dir and caption_template are text or left out")
        _check_template(template or "", f"{told}: caption_template")
        return AnnotationFile(
            path=self.annotations.parent / self._moved(entry["meta_file"]),
            images=None if folder is None else (self.images or self.annotations.parent) / self._moved(folder),
            label=name,
            columns=("caption", "image_path") if entry["data_format"] == "caption" else (),
            facts={"data_format": entry["data_format"], "caption_template": template},
        )

    def _moved(self, path: str) -> str:
        old, _, new = self.moved.partition("=")
        return new + path.removeprefix(old) if old and path.startswith(old) else path


def _load(path: Path) -> Mapping[str, Any]:
    found = whole_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is no object of data sets; write {{name: {{meta_file, image_dir, data_format}}}}")
    return found


def _check_template(template: str, told: str) -> None:
    if template and template.count(IMAGE_TAG) != 1:
        raise ValueError(f"{told} is {template!r}; it must hold {IMAGE_TAG} once")
