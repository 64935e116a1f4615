"""The index of one tar of somebody else: which of its files make a sample, and what is damaged.

Files of one key that stand side by side are a sample. What it needs depends on the format:

bestiary   .json (our own record) and its images, nothing else
caption    one image and a .txt with its caption, or a .json with `caption`
llava      .json with `conversations`, and at most one image

Beside those, files with an extension in COMPANIONS may be there; they are never opened. Any other extension (pickles,
numpy files, scripts ...) makes its sample damaged, as do links, devices, bad names, repeated files and keys. Each
damaged sample or lost stretch is one entry with the DAMAGED flag, so that a reader counts it when its turn comes.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

from data_modules.foreign_tar import Archive, MappedArchive, Stretch, Walk
from data_modules.index import DAMAGED, FOREIGN, IMAGES, LARGEST, MOST, SIMPLE, TEXTS, Entry, Place
from data_modules.records import IMAGE_EXTENSIONS, TEXT_LIMIT, DamagedSampleError, Reason, decode_record

log = logging.getLogger(__name__)

FORMATS = ("bestiary", "caption", "llava")
"""What the members of somebody else's tars mean."""
COMPANIONS = ("txt", "json", "cls", "text", "url")
"""Harmless extensions that other people's samples often have."""
VERSION = 1
"""Of everything that decides what an index says: raise it when an old one must be made again."""

_PIECE = 1 << 23
_PROBLEM_LIMIT = 300


@dataclass(slots=True)
class _Group:
    """Neighbouring files of one key, or a lost stretch (no key)."""

    key: str
    start: int
    stop: int
    parts: dict[str, Stretch] = field(default_factory=dict)
    problem: str = ""
    reason: Reason = Reason.STRUCTURE
    is_incomplete: bool = False
    is_repeated: bool = False
    texts: dict[str, bytes] = field(default_factory=dict)
    sha256: bytes = bytes(32)

    def blame(self, problem: str, reason: Reason = Reason.STRUCTURE) -> None:
        """The first thing that is wrong is what is reported."""
        if not self.problem:
            self.problem, self.reason = problem[:_PROBLEM_LIMIT], reason


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which files of a group are the sample; is_simple: the record of the index says all."""

    text: str
    image: str
    is_simple: bool


def index_tar(archive: Archive, stem: str, format: str) -> tuple[list[Entry], list[str]]:
    """(entries, domains) of an archive. stem: begins the keys of formats that are not ours, whose keys may repeat."""
    prefix = "" if format == "bestiary" else f"{stem}/"
    domains: dict[str, int] = {}
    entries = []
    for group in _merged(_groups(archive, format, stem)):
        domain = _domain_number(group, domains) if format == "bestiary" and not group.problem else 0
        if group.problem:
            entries.append(_damaged(group, prefix, stem))
            continue
        entries.append(Entry(f"{prefix}{group.key}", _place(group, _layout(group, format), domain), group.sha256))
    return entries, list(domains)


def members_of(data: memoryview) -> dict[str, memoryview]:
    """extension -> contents of one sample's stretch of a tar, checked as at indexing."""
    parts: dict[str, memoryview] = {}
    for found in Walk(MappedArchive(data)):
        if found.problem:
            raise DamagedSampleError(found.key, found.problem, found.reason)
        parts[found.extension] = data[found.data_at : found.data_at + found.size]
    return parts


def _groups(archive: Archive, format: str, stem: str) -> Iterator[_Group]:
    """The groups of an archive in order, with what is wrong in each."""
    walk = Walk(archive)
    seen: set[str] = set()
    group: _Group | None = None
    digest = sha256()
    for found in walk:
        if group is not None and found.key != group.key:
            yield _closed(group, format, digest.digest(), seen)
            group = None
        if not found.key:
            lost = _Group("", found.start, found.stop)
            lost.blame(found.problem, found.reason)
            yield lost
            continue
        if group is None:
            group, digest = _Group(found.key, found.start, found.stop), sha256()
        _add(group, found, archive, format)
        for at in range(found.start, found.stop, _PIECE):
            digest.update(archive.read(at, min(at + _PIECE, found.stop)))
        group.stop = found.stop
    if group is not None:
        closed = _closed(group, format, digest.digest(), seen)
        if closed.is_incomplete and not walk.is_ended:
            closed.reason = Reason.CUT
        yield closed
    if not walk.is_ended:
        log.warning("%s.tar has no end mark; if it was cut between two samples, nobody can count those behind", stem)


def _add(group: _Group, found: Stretch, archive: Archive, format: str) -> None:
    """One more file of a sample."""
    harmless = ("json",) if format == "bestiary" else COMPANIONS
    last = found.extension.rpartition(".")[2]
    name = f"{found.key}.{found.extension}"
    if found.problem:
        group.blame(found.problem, found.reason)
    elif last not in (*IMAGE_EXTENSIONS, *harmless):
        group.blame(f"member {name} is not on the list of what a sample may hold")
    elif found.extension in group.parts:
        group.blame(f"member {name} is there twice")
    else:
        group.parts[found.extension] = found
        if found.extension in TEXTS and found.size <= TEXT_LIMIT:  # kept until it is known which of them is needed
            group.texts[found.extension] = bytes(archive.read(found.data_at, found.data_at + found.size))


def _closed(group: _Group, format: str, digest: bytes, seen: set[str]) -> _Group:
    """A group to which nothing more is added."""
    group.sha256 = digest
    if group.key in seen:
        group.is_repeated = True
        group.blame("its key was there before; the files of a sample must stand side by side")
    seen.add(group.key)
    if group.stop - group.start > LARGEST:
        group.blame(f"it takes {group.stop - group.start} bytes, a sample may have {LARGEST}")
    if len(group.parts) > MOST:
        group.blame(f"it has {len(group.parts)} files, a sample may have {MOST}")
    if not group.problem:
        try:
            layout = _layout(group, format)
        except _IncompleteError as error:
            group.blame(str(error))
            group.is_incomplete = True
        else:
            if group.parts[layout.text].size > TEXT_LIMIT:
                group.blame(
                    f"its text has {group.parts[layout.text].size} bytes, more than {TEXT_LIMIT}", Reason.RECORD
                )
    return group


class _IncompleteError(ValueError):
    """A group lacks what its format needs."""


def _layout(group: _Group, format: str) -> _Layout:
    images = [name for name in group.parts if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    plain = [name for name in images if name in IMAGES]
    found = sorted(group.parts)
    if format == "bestiary":
        if "json" not in group.parts:
            raise _IncompleteError(f"member .json is missing, there are {found}")
        is_simple = len(found) == 1 or (len(found) == 2 and len(plain) == 1)
        return _Layout("json", plain[0] if is_simple and plain else "", is_simple)
    text = "txt" if format == "caption" and "txt" in group.parts else "json"
    if text not in group.parts:
        raise _IncompleteError(f"{'.txt or .json' if format == 'caption' else '.json'} is missing, there are {found}")
    if len(plain) > 1 or (images and not plain):
        raise _IncompleteError(f"it has the images {images}; format={format} means one")
    if format == "caption" and not plain:
        raise _IncompleteError(f"its image is missing, there are {found}")
    return _Layout(text, plain[0] if plain else "", True)


def _merged(groups: Iterable[_Group]) -> list[_Group]:
    """A lost stretch and the torn sample before, around or after it are one piece of damage."""
    out: list[_Group] = []
    for group in groups:
        last = out[-1] if out else None
        if last is None or not last.problem or not group.problem:
            out.append(group)
        elif not group.key and (last.is_incomplete or not last.key):
            _join(last, group, last.key, lost=group)
        elif group.key == last.key:
            _join(last, group, last.key, lost=last)
        elif not last.key and group.is_repeated and len(out) > 1 and out[-2].key == group.key:
            _join(last, group, "", lost=last)  # files that a sound sample could do without
        elif not last.key and group.is_incomplete:
            _join(last, group, group.key, lost=last)
        else:
            out.append(group)
    return out


def _join(last: _Group, group: _Group, key: str, *, lost: _Group) -> None:
    last.key, last.stop, last.is_incomplete = key, group.stop, True
    last.problem, last.reason = lost.problem, lost.reason


def _domain_number(group: _Group, domains: dict[str, int]) -> int:
    """Of the domain that a record of ours names; what is wrong with a broken record is found when it is read."""
    try:
        domain = decode_record(group.key, group.texts["json"]).domain
    except DamagedSampleError:
        return 0
    if domain not in domains and len(domains) > MOST:
        group.blame(f"its domain {domain[:80]!r} is one of more than {MOST + 1} in this tar", Reason.RECORD)
    return domains.setdefault(domain, len(domains)) if not group.problem else 0


def _place(group: _Group, layout: _Layout, domain: int) -> Place:
    text = group.parts[layout.text]
    image = group.parts.get(layout.image)
    return Place(
        offset=group.start,
        size=group.stop - group.start,
        text_at=text.data_at - group.start,
        text_size=text.size,
        crc32=zlib.crc32(group.texts[layout.text]),
        image_at=image.data_at - group.start if image else 0,
        image_size=image.size if image else 0,
        members=len(group.parts),
        domain=domain,
        image=IMAGES.index(layout.image),
        text=TEXTS.index(layout.text),
        flags=FOREIGN | (SIMPLE if layout.is_simple else 0),
        key_size=0,
    )


def _damaged(group: _Group, prefix: str, stem: str) -> Entry:
    """An entry that only says what is wrong; without a key it is named by its place."""
    key = f"{prefix}{group.key}" if group.key else f"{stem}@{group.start}"
    if group.is_repeated:
        key = f"{key}@{group.start}"
    size = min(group.stop - group.start, LARGEST)
    place = Place(group.start, size, 0, 0, 0, 0, 0, int(group.reason), 0, 0, 0, FOREIGN | DAMAGED, 0)
    return Entry(f"{key}\0{group.problem}", place, bytes(32))
