"""The index beside a shard: where each sample lies, in fixed-width records that are mapped, never parsed.

`<shard>.idx`   40 bytes a sample (RECORD), then one sha256 for every block of BLOCK records. source.json holds the
                sha256 of those block hashes, so an index of any size is trusted after hashing a few of its blocks.
`<shard>.keys`  32 bytes of sha256 a sample (over its slice of the tar), then num + 1 end positions, then the names.
                A name is the sample's key; that of damage in a foreign tar goes on with a zero byte and what is wrong.

Readers touch the second file only to name or to verify samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data_modules.records import IMAGE_EXTENSIONS, Reason

FORMAT = "bestiary-shards-2"
SOURCE_FILE = "source.json"
"""Written last: a folder without it is unfinished."""

RECORD = Struct("<QIIIIIIHHBBBB")
"""One sample, the fields of `Place`; the four numbers after `size` count from the sample's first header."""
RECORD_SIZE = RECORD.size
WHERE = Struct("<QIIIIII4xBxBB")
"""The same without members, domain and text: what reading a sample needs."""
BLOCK = 128
"""Records that share a hash: 5 KB, microseconds to check."""
LARGEST = (1 << 32) - 1
"""Bytes of one sample that the record can say."""
MOST = (1 << 16) - 1
"""Members of a sample, and the last number of a domain, that the record can say."""

IMAGES = ("", *IMAGE_EXTENSIONS)
"""Extension of the one image by the number in the record; 0 = none or several."""
TEXTS = ("", "json", "txt")
"""Extension of the text by the number in the record."""
SIMPLE = 1
"""Flag: one text and at most one image, where the record says; no header needs to be parsed."""
FOREIGN = 2
"""Flag: somebody else's tar; the crc32 covers the text alone, and the key is only in the `.keys` file."""
DAMAGED = 4
"""Flag: a stretch of a foreign tar that holds no sample; `members` is the Reason, the name says what is wrong."""

_DIGEST = 32
_REMEDY = "write the source again (of other people's tars, remove the folder .bestiary beside them)"


class Place(NamedTuple):
    """Where one sample lies.

    offset: first header, in bytes of the tar; size: with headers and padding. text_at, image_at: contents, from
    `offset`; crc32: of the first header and the text (of the text alone where FOREIGN). image, text: places in IMAGES
    and TEXTS. key_size: characters of the key, which begins the first header.
    """

    offset: int
    size: int
    text_at: int
    text_size: int
    crc32: int
    image_at: int
    image_size: int
    members: int
    domain: int
    image: int
    text: int
    flags: int
    key_size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What the writer or the indexer knows of one sample; `name` as in the `.keys` file."""

    name: str
    place: Place
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a source, as source.json names it.

    bytes: size of the tar. domains: what the domain numbers of its records mean.
    """

    file: str
    samples: int
    bytes: int
    domains: tuple[str, ...]
    index_sha256: str
    keys_sha256: str


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """The contents of source.json. made_by: how the source was made, for people and for resuming."""

    format: str
    name: str
    licence: str
    domains: tuple[str, ...]
    samples: int
    shards: tuple[Shard, ...]
    index_hash: str
    made_by: dict[str, Any] = field(default_factory=dict)


class _Format(msgspec.Struct):
    format: str


def index_bytes(entries: Sequence[Entry]) -> tuple[bytes, bytes]:
    """The contents of the `.idx` and the `.keys` file."""
    records = b"".join([RECORD.pack(*entry.place) for entry in entries])
    step = BLOCK * RECORD.size
    hashes = [hashlib.sha256(records[at : at + step]).digest() for at in range(0, len(records), step)]
    names = [entry.name.encode() for entry in entries]
    ends = np.zeros(len(names) + 1, "<u4")
    np.cumsum([len(name) for name in names], out=ends[1:])
    digests = b"".join(entry.sha256 for entry in entries)
    return b"".join([records, *hashes]), digests + ends.tobytes() + b"".join(names)


def shard_facts(
    file: str, size: int, domains: Sequence[str], entries: Sequence[Entry], index: bytes, keys: bytes
) -> Shard:
    """What source.json will say of a shard with this index; `size` in bytes of the tar."""
    hashes = index[len(entries) * RECORD.size :]
    sums = hashlib.sha256(hashes).hexdigest(), hashlib.sha256(keys).hexdigest()
    return Shard(file, len(entries), size, tuple(domains), *sums)


def index_hash(shards: Sequence[Shard]) -> str:
    """One hash over everything a source holds: the keys files carry the sha256 of every sample."""
    lines = [f"{s.file} {s.samples} {s.bytes} {s.index_sha256} {s.keys_sha256}\n" for s in shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def part_of(facts: SourceFacts, files: Sequence[str], where: str) -> SourceFacts:
    """A source of some shards of another one; ValueError for a file that is none of them."""
    by_name = {shard.file: shard for shard in facts.shards}
    if unknown := [file for file in files if file not in by_name]:
        raise ValueError(f"{where}: {unknown[0]} is no shard of its source.json, which has {len(by_name)}")
    shards = tuple(by_name[file] for file in files)
    samples = sum(shard.samples for shard in shards)
    domains = tuple(dict.fromkeys(each for shard in shards for each in shard.domains))
    return replace(facts, samples=samples, shards=shards, domains=domains, index_hash=index_hash(shards))


def parse_facts(data: bytes | memoryview, where: str) -> SourceFacts:
    """A source.json, checked; ValueError of one line that says what to do."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, this version reads {FORMAT!r}")
        facts = msgspec.json.decode(data, type=SourceFacts)
        for shard in facts.shards:
            if "/" in shard.file or "\\" in shard.file or not shard.file.endswith(".tar"):
                raise ValueError(f"shard {shard.file!r} is not a plain .tar file name")
            if shard.samples < 1:
                raise ValueError(f"shard {shard.file!r} has {shard.samples} samples")
        if facts.index_hash != index_hash(facts.shards):
            raise ValueError("index_hash does not match its shards")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read ({error}); write the source again") from error
    return facts


def key_hash(key: str) -> int:
    """64 bits of a key: a million keys collide with a chance of 3 in a hundred million."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class Records:
    """The mapped records of one shard; a block is compared with its hash when it is first needed."""

    def __init__(self, data: memoryview, shard: Shard, where: str, *, is_foreign: bool = False) -> None:
        self._is_foreign = is_foreign
        end = shard.samples * RECORD.size
        num_blocks = -(-shard.samples // BLOCK)
        if len(data) != end + num_blocks * _DIGEST:
            raise ValueError(
                f"{where} holds {len(data)} bytes, {shard.samples} samples need {end + num_blocks * _DIGEST}; {_REMEDY}"
            )
        self._hashes = data[end:]
        if hashlib.sha256(self._hashes).hexdigest() != shard.index_sha256:
            raise ValueError(f"{where} is not the index that {SOURCE_FILE} names; {_REMEDY}")
        self.data = data[:end]
        self.checked = bytearray(num_blocks)
        """One byte a block: 1 once it was found whole."""

    def check(self, block: int) -> bool:
        """Whether the records of a block are those that were written."""
        step = BLOCK * RECORD.size
        data = self.data[block * step : (block + 1) * step]
        digest = hashlib.sha256(data).digest()
        is_whole = digest == self._hashes[block * _DIGEST : (block + 1) * _DIGEST]
        self.checked[block] = is_whole and self._makes_sense(np.frombuffer(data, _DTYPE))
        return bool(self.checked[block])

    def _makes_sense(self, records: np.ndarray) -> bool:
        """Whether no record says what a reader cannot look up: hashes prove nothing where somebody made them up."""
        flags = records["flags"]
        allowed = SIMPLE | FOREIGN | DAMAGED if self._is_foreign else SIMPLE
        damaged = records["members"][(flags & DAMAGED) != 0]
        return bool(
            (records["image"] < len(IMAGES)).all()
            and (records["text"] < len(TEXTS)).all()
            and ((flags & ~np.uint8(allowed)) == 0).all()
            and (((flags & FOREIGN) != 0) == self._is_foreign).all()
            and np.isin(damaged, _INDEXED_REASONS).all()
        )

    def place(self, local: int) -> Place:
        """The record of one sample, unchecked."""
        return Place._make(RECORD.unpack_from(self.data, local * RECORD.size))


class Keys:
    """The mapped names and hashes of one shard's samples."""

    def __init__(self, data: memoryview, num_samples: int, where: str) -> None:
        self._data = data
        self._ends_at = num_samples * _DIGEST
        self._names_at = self._ends_at + 4 * (num_samples + 1)
        self._num_samples = num_samples
        ends = self._span(num_samples) if len(data) >= self._names_at else (0, -1)
        if len(data) != self._names_at + ends[0]:
            raise ValueError(f"{where} does not hold {num_samples} keys; {_REMEDY}")

    def name(self, local: int) -> str:
        """Key of one sample, with the note after a zero byte where there is one."""
        start = self._span(local)[0]
        stop = self._span(local + 1)[0]
        return bytes(self._data[self._names_at + start : self._names_at + stop]).decode(errors="replace")

    def key(self, local: int) -> str:
        """Key of one sample."""
        return self.name(local).partition("\0")[0]

    def sha256(self) -> str:
        """Hash of the whole file, as source.json names it."""
        return hashlib.sha256(self._data).hexdigest()

    def digest(self, local: int) -> bytes:
        """sha256 of a sample's slice of the tar."""
        return bytes(self._data[local * _DIGEST : (local + 1) * _DIGEST])

    def __iter__(self) -> Iterator[str]:
        return (self.key(local) for local in range(self._num_samples))

    def _span(self, local: int) -> tuple[int, ...]:
        return _END.unpack_from(self._data, self._ends_at + 4 * local)


_END = Struct("<I")
_INDEXED_REASONS = (Reason.CUT, Reason.STRUCTURE, Reason.RECORD)
"""What an indexer can find; the others are none of an index, and TOO_LONG would pass the budget of damage."""
_DTYPE = np.dtype(list(zip(Place._fields, ["<u8", *["<u4"] * 6, *["<u2"] * 2, *["u1"] * 4], strict=True)))
