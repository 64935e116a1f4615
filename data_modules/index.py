"""The index beside a shard: where each sample lies, in fixed-width records that are mapped, never parsed.

`<shard>.idx`   24 bytes a sample: offset, size, crc32 of the JSON member, number of members, domain.
`<shard>.keys`  32 bytes of sha256 a sample (over its slice of the tar), then num + 1 end positions, then the keys.

Readers touch the second file only to name or to verify samples.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_modules.ustar import file_size

RECORD = struct.Struct("<QIIHHI")
"""One sample: offset, size with headers and padding, crc32 of the JSON member, members, domain number, spare."""

FORMAT = "bestiary-shards-1"
SOURCE_FILE = "source.json"
"""Written last: a folder without it is unfinished."""

_DIGEST = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a source, as source.json names it. `bytes` is the size of the tar."""

    file: str
    samples: int
    bytes: int
    index_sha256: str
    keys_sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What the writer knows of one sample."""

    key: str
    offset: int
    size: int
    json_crc32: int
    members: int
    domain: int
    sha256: bytes


def index_bytes(entries: Sequence[Entry]) -> tuple[bytes, bytes]:
    """The contents of the `.idx` and the `.keys` file."""
    records = [RECORD.pack(e.offset, e.size, e.json_crc32, e.members, e.domain, 0) for e in entries]
    keys = [entry.key.encode() for entry in entries]
    ends = np.zeros(len(keys) + 1, "<u4")
    np.cumsum([len(key) for key in keys], out=ends[1:])
    digests = b"".join(entry.sha256 for entry in entries)
    return b"".join(records), digests + ends.tobytes() + b"".join(keys)


def map_file(path: Path) -> memoryview:
    """A regular file's bytes, read-only, without reading them."""
    if not file_size(path):
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def map_records(path: Path, num_samples: int) -> memoryview:
    """The `.idx` file, to be unpacked with RECORD."""
    data = map_file(path)
    if len(data) != num_samples * RECORD.size:
        raise ValueError(
            f"{path} holds {len(data)} bytes, {num_samples} samples need {num_samples * RECORD.size}; "
            "write the source again"
        )
    return data


def read_keys(path: Path, num_samples: int) -> Iterator[tuple[str, bytes]]:
    """(key, sha256) of every sample of a `.keys` file, in order."""
    data = map_file(path)
    ends_at = num_samples * _DIGEST
    names_at = ends_at + 4 * (num_samples + 1)
    ends = np.frombuffer(data[ends_at:names_at], "<u4")
    if len(ends) != num_samples + 1 or len(data) != names_at + int(ends[-1]):
        raise ValueError(f"{path} does not hold {num_samples} keys; write the source again")
    for number in range(num_samples):
        start, stop = names_at + int(ends[number]), names_at + int(ends[number + 1])
        yield bytes(data[start:stop]).decode(), bytes(data[number * _DIGEST : (number + 1) * _DIGEST])


def key_at(path: Path, num_samples: int, number: int) -> str:
    """The key of one sample, for messages."""
    data = map_file(path)
    ends_at = num_samples * _DIGEST
    names_at = ends_at + 4 * (num_samples + 1)
    start, stop = np.frombuffer(data[ends_at + 4 * number : ends_at + 4 * number + 8], "<u4")
    return bytes(data[names_at + int(start) : names_at + int(stop)]).decode()


def index_hash(shards: Sequence[Shard]) -> str:
    """One hash over everything a source holds: the keys files carry the sha256 of every sample."""
    lines = [f"{s.file} {s.samples} {s.bytes} {s.index_sha256} {s.keys_sha256}\n" for s in shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
