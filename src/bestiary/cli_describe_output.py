"""What `bestiary describe` makes of descriptions: shards to train on, the published JSON, a page to look at."""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from bestiary.description.engine import Description, Picture
from bestiary.description.prompts import QUESTION
from bestiary.description.tags import unusable_tag
from bestiary.description.words import Described
from bestiary.schema import IMAGE_TAG, Region, Sample, Turn
from data_modules.index import SOURCE_FILE, Shard
from data_modules.inspection.preview import Shown, page
from data_modules.shards import read_source
from data_modules.writer import finish_source, prepare_folder, shard_path, write_atomically, write_shard

MADE_BY = "describe"
"""In source.json's made_by: a hash of everything the shards were made of."""
REPORT = "report.json"
LEVELS = ("regions", "segments", "texts")
PUBLISHED = ("ann_all.json", "detailed_caption.json")
"""The files of the published pipeline; img_id is the name below the folder, since base names repeat."""
PAGE = "page.html"
_SOURCE = r"[A-Za-z0-9_][\w.-]*"
_OWN = re.compile("|".join((*map(re.escape, (*PUBLISHED, PAGE)), rf"conf/dataset/{_SOURCE}\.yaml")))
"""Names of what this run may remove of an earlier one."""
Result = tuple[Picture, bytes, Description]


@dataclass(frozen=True, slots=True)
class Output:
    """What is made of the descriptions.

    folder: of this part. published: also write ann_all.json and detailed_caption.json. num_shown: pictures of the page,
    0 for no page. with_shards: needs summaries.
    """

    folder: Path
    source: str = "described"
    domain: str = "natural"
    licence: str = ""
    question: str = QUESTION
    samples_per_shard: int = 1000
    published: bool = False
    num_shown: int = 24
    with_shards: bool = True

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.num_shown < 0:
            raise ValueError(f"{self.samples_per_shard} samples a shard, {self.num_shown} shown; give 1 or more, and 0")
        for name in ("source", "domain", "question"):
            if not getattr(self, name).strip():
                raise ValueError(f"the {name} is empty; write one")
        if not re.fullmatch(_SOURCE, self.source):
            raise ValueError(
                f"the source {self.source!r} names a file, too: write letters, digits, _, - and dots, the first one "
                "a letter of a to z, a digit or _"
            )
        if tag := unusable_tag(self.question, may_have_picture=True):
            raise ValueError(
                f"the question {self.question!r:.100} holds {tag}: {IMAGE_TAG} may stand there once, other tags of "
                "pictures never, those of names and places closed"
            )

    @property
    def shards(self) -> Path:
        """Where the shards go."""
        return self.folder / "shards"

    @property
    def page(self) -> Path:
        """The page."""
        return self.folder / PAGE

    @property
    def dataset(self) -> Path:
        """What a mix takes the shards by, in a folder for --config-dir."""
        return self.folder / "conf" / "dataset" / f"{self.source}.yaml"

    def made_of(self, identity: str) -> str:
        """A hash of what was described and of every option."""
        return sha256(repr([identity, *astuple(self)[1:]]).encode()).hexdigest()


def write_all(output: Output, results: Iterable[Result], *, identity: str, facts: dict[str, Any]) -> list[Path]:
    """Write everything; the files, or none where all of it is there already.

    identity: of everything described. facts: beside it in report.json.
    """
    made_of = output.made_of(identity)
    if _is_made(output, made_of):
        return []
    _check_own(output)
    written = []
    chosen = _Chosen(output.num_shown)
    with ExitStack() as stack:
        if output.published:
            lists = [stack.enter_context(_list_file(output.folder / name)) for name in PUBLISHED]
            results = _published(results, lists)
            written += [output.folder / name for name in PUBLISHED]
        results = chosen.through(results)
        samples = (
            sample_of(picture, data, found, output) for picture, data, found in results if found.summary is not None
        )
        shards = _write_shards(output, samples, made_of) if output.with_shards else []
        for _ in results:  # where no shard took them
            pass
    output.dataset.unlink(missing_ok=True)
    if shards:
        output.dataset.parent.mkdir(parents=True, exist_ok=True)
        lines = f"path: {json.dumps(str(output.shards.resolve()))}\ndomain: {json.dumps(output.domain)}\n"
        write_atomically(output.dataset, lines.encode())
        written = [output.shards / SOURCE_FILE, output.dataset, *written]
    if output.num_shown:
        shown = [Shown(sample_to_show(*result), output.source) for result in chosen.results()]
        write_atomically(output.page, page(shown, title=f"descriptions: {output.source}").encode())
        written.append(output.page)
    names = [path.relative_to(output.folder).as_posix() for path in written]
    _remove_stale(output, names)
    report = json.dumps({**facts, "written": names, "made_of": made_of}, indent=1, ensure_ascii=False)
    write_atomically(output.folder / REPORT, (report + "\n").encode())
    return written


def sample_of(picture: Picture, data: bytes, found: Description, output: Output) -> Sample:
    """The picture with the question and its detailed caption; all levels in meta."""
    assert found.summary is not None, "pictures without a summary teach nothing"
    levels = {name: [_plain(one) for one in getattr(found.levels, name)] for name in LEVELS}
    meta = {"task": "detailed_caption", "name": picture.name, "levels": {"caption": found.levels.caption, **levels}}
    turns = (Turn("human", output.question), Turn("assistant", found.summary))
    return Sample(picture.key, output.source, output.domain, turns, (data,), (), meta)


def sample_to_show(picture: Picture, data: bytes, found: Description) -> Sample:
    """A sample for the eye: every level a turn, every described place a mark in the picture."""
    turns = [Turn("human", f"{picture.name}\nwhole picture: {found.levels.caption or '-'}")]
    regions: list[Region] = []
    for name in LEVELS:
        lines = [f"{name}: {'-' if not getattr(found.levels, name) else ''}"]
        for one in getattr(found.levels, name):
            regions.append(Region("box", _inside(one.box), len(regions) + 1))
            score = "" if one.score is None else f" ({one.score:.3f})"
            lines.append(f"<Mark {len(regions)}> {one.caption}{score}")
        turns.append(Turn("human", "\n".join(lines)))
    turns.append(Turn("assistant", found.summary or "(no summary)"))
    return Sample(picture.key, "describe", "described", tuple(turns), (data,), tuple(regions))


def _published(results: Iterable[Result], lists: Sequence[_List]) -> Iterator[Result]:
    """Writes entries as the results pass."""
    for picture, data, found in results:
        lists[0].add(found.levels.merged(picture.name))
        if found.summary is not None:
            lists[1].add({"img_id": picture.name, "detailed_caption": found.summary})
        yield picture, data, found


class _List:
    """A JSON array that is written entry by entry."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._between = "[\n"

    def add(self, entry: dict[str, str]) -> None:
        self._file.write(self._between + json.dumps(entry, ensure_ascii=False))
        self._between = ",\n"

    def close(self) -> None:
        self._file.write("[]\n" if self._between.startswith("[") else "\n]\n")


@contextmanager
def _list_file(path: Path) -> Iterator[_List]:
    """The file appears whole when everything went well."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            found = _List(file)
            yield found
            found.close()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class _Chosen:
    """Some of many results: those with the largest hashes of their keys, so any, and always the same."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._heap: list[tuple[str, int, Result]] = []

    def through(self, results: Iterable[Result]) -> Iterator[Result]:
        for place, result in enumerate(results):
            if self._number and not result[2].levels.is_empty:
                heapq.heappush(self._heap, (sha256(result[0].key.encode()).hexdigest(), place, result))
            if len(self._heap) > self._number:
                heapq.heappop(self._heap)
            yield result

    def results(self) -> list[Result]:
        """In their order."""
        return [result for _, _, result in sorted(self._heap, key=lambda item: item[1])]


def _write_shards(output: Output, samples: Iterator[Sample], made_of: str) -> list[Shard]:
    shards: list[Shard] = []
    prepare_folder(output.shards, overwrite=True)
    for sample in samples:  # the first of a shard
        part = chain([sample], islice(samples, output.samples_per_shard - 1))
        shards.append(write_shard(shard_path(output.shards, len(shards)), part, source=output.source))
    if shards:
        finish_source(output.shards, shards, source=output.source, licence=output.licence, made_by={MADE_BY: made_of})
    return shards


def _last_report(output: Output) -> dict[str, Any]:
    """What an earlier run has left, as far as it can be read."""
    try:
        report = json.loads((output.folder / REPORT).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("written"), list) else {}


def _is_made(output: Output, made_of: str) -> bool:
    """Whether an earlier run has written all of it."""
    report = _last_report(output)
    return report.get("made_of") == made_of and all((output.folder / str(name)).is_file() for name in report["written"])


def _remove_stale(output: Output, names: Sequence[str]) -> None:
    """Remove what the last run wrote here and this one did not; never shards, never anything of other names."""
    for name in _last_report(output).get("written", []):
        if name in names or not isinstance(name, str) or not _OWN.fullmatch(name):
            continue
        path = output.folder / name
        if path.parent.resolve().is_relative_to(output.folder.resolve()):
            path.unlink(missing_ok=True)


def _check_own(output: Output) -> None:
    """Refuse to replace shards of others."""
    if (output.shards / SOURCE_FILE).exists() and MADE_BY not in read_source(output.shards).made_by:
        raise ValueError(f"{output.shards} holds a source that `describe` did not write; name another folder")


def _plain(one: Described) -> dict[str, Any]:
    return {"caption": one.caption, "box": list(one.box), "score": one.score}


def _inside(box: Sequence[float]) -> tuple[float, ...]:
    """Boxes of experts may stick out a little; the page draws what is inside."""
    return tuple(min(1.0, max(0.0, float(value))) for value in box)
