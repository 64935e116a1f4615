"""Parts of the red-team tests: hostile files, canaries, and one epoch of a stream over them."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import Region, Sample, Turn
from bestiary.variants.sphinx_v.processor import SphinxVProcessor
from data_modules.index import Entry, Place, index_bytes, shard_facts
from data_modules.lanes import LaneState
from data_modules.rules import Rules
from data_modules.shards import ShardSet, write_samples
from data_modules.storage import Storage
from data_modules.stream import Stream
from data_modules.ustar import END, member
from data_modules.writer import finish_source

TOKENIZER = str(Path(__file__).parents[1] / "goldens" / "sphinx" / "tiny_tokenizer.model")
RGB = np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)
FIELDS = {"source": "set", "domain": "natural", "images": [], "regions": [], "meta": {}}


def encoded(form: str = "JPEG", mode: str = "RGB", **more: Any) -> bytes:
    """A small picture as a file."""
    file = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(file, form, **more)
    return file.getvalue()


def good(number: int, **changes: Any) -> Sample:
    """A sound sample; every third is text only, every second picture has prompts."""
    images = () if number % 3 == 2 else (encoded("PNG" if number % 2 else "JPEG"),)
    regions = (Region("point", (0.25, 0.5), 1), Region("box", (0.1, 0.2, 0.3, 0.4), 2)) if images and number % 2 else ()
    turns = (Turn("human", f"What is {number}?"), Turn("assistant", f"It is the number {number}."))
    return replace(
        Sample(f"good-{number:03d}", "set", "natural", turns, images, regions, {"number": number}), **changes
    )


def processor(**changes: Any) -> SphinxVProcessor:
    """The real processor of a real variant, small."""
    settings: dict[str, Any] = {"canvas_px": 16, "image_rows": 5, "num_views": 1, "max_tokens": 400, "num_slots": 3}
    return SphinxVProcessor(tokenizer=TOKENIZER, too_long="skip", **settings | changes)


@dataclass(frozen=True)
class Epoch:
    """What a stream gave until every sample of its only source had its turn.

    keys: of the examples that came. lines: what was counted, one line for each shard and reason. warned: the log.
    """

    keys: frozenset[str]
    lines: tuple[str, ...]
    warned: tuple[str, ...]
    counted: int


def epoch_of(path: Path | str, caplog: pytest.LogCaptureFixture, **changes: Any) -> Epoch:
    """Stream one source, unpacked, one lane, through exactly one epoch.

    Rows draw until they have a sample, so an epoch that ends with damage runs into the next: then another seed's order.
    """
    names = ("format", "domain", "name", "storage")
    options = {name: changes.pop(name) for name in names if name in changes}
    storage, name = options.pop("storage", None), options.pop("name", "set")
    rules = {"num_lanes": 1, "max_tokens": 400, "packing": False, "too_long": "skip", "bad_budget": 0.5}
    for seed in range(60):
        stream = Stream(
            {name: {"path": str(path), **options}}, processor(), Rules(seed=seed, **rules | changes), storage=storage
        )
        found = _epoch(stream, caplog)
        if found is not None:
            return found
    raise AssertionError("no order of 60 ends with a sound sample; mix more of them in")


def _epoch(stream: Stream, caplog: pytest.LogCaptureFixture) -> Epoch | None:
    total = len(stream.plan.sources[0])
    keys: set[str] = set()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for batches in stream.loader(range(1)):
            keys |= {segment.key for segment in batches[0].segments}
            state = LaneState.from_bytes(batches[0].states[0])
            drawn = state.places[0].taken + state.places[0].left_out
            if drawn >= total:
                break
    if drawn > total:
        return None
    lines = tuple(stream.losses(batches[0].states))
    return Epoch(frozenset(keys), lines, tuple(caplog.messages), sum(state.losses.values()))


def blames(epoch: Epoch, *words: str) -> bool:
    """Whether one line of the log holds all words and is a single line."""
    assert not [line for line in epoch.warned if "\n" in line], "every report is one line"
    return any(all(word in line for word in words) for line in epoch.warned)


def crafted_source(folder: Path, tar: bytes, entries: Sequence[Entry], *, file: str = "shard-00000.tar") -> Path:
    """A source of ours as an attacker writes it: any bytes, any records, and hashes that fit."""
    folder.mkdir(parents=True, exist_ok=True)
    index, keys = index_bytes(entries)
    (folder / file).write_bytes(tar)
    (folder / file).with_suffix(".idx").write_bytes(index)
    (folder / file).with_suffix(".keys").write_bytes(keys)
    finish_source(folder, [shard_facts(file, len(tar), ["natural"], entries, index, keys)], source="set")
    return folder


def entries_of(shards: ShardSet) -> list[Entry]:
    """The index of a written source, to be spoilt."""
    keys = list(shards.keys())
    return [Entry(key, place, bytes(32)) for key, (_, place) in zip(keys, shards.places(), strict=True)]


def spoilt_source(folder: Path, samples: Iterable[Sample], spoil: Mapping[str, Mapping[str, Any]]) -> Path:
    """A source whose index says other things (fields of Place) of some samples, with hashes that fit."""
    shards = write_samples(folder, samples, source="set")
    tar = (folder / "shard-00000.tar").read_bytes()
    entries = [replace(entry, place=entry.place._replace(**spoil.get(entry.name, {}))) for entry in entries_of(shards)]
    return crafted_source(folder, tar, entries)


def spoilt_place(place: Place, rng: random.Random) -> Place:
    """A record of the index with one to three wrong fields, each within what its bits can say."""
    bits = Place(64, *[32] * 6, *[16] * 2, *[8] * 4)
    made = place._asdict()
    for name in rng.sample(Place._fields, rng.randint(1, 3)):
        limit = 1 << getattr(bits, name)
        near = (made[name] + rng.randint(-3, 3)) % limit
        made[name] = rng.choice([near, rng.randint(0, 9), limit - 1, rng.randrange(limit)])
    return Place(**made)


def record(**changes: Any) -> bytes:
    """The JSON of a text-only sample of ours with some fields changed."""
    turns = [{"role": "human", "text": "What?"}, {"role": "assistant", "text": "That."}]
    return json.dumps({**FIELDS, "turns": turns, **changes}).encode()


def raw_source(folder: Path, records: Mapping[str, bytes]) -> Path:
    """A source of ours whose samples are these JSON texts, whatever they hold; index and hashes fit."""
    tar, entries = b"", []
    for key, text in records.items():
        data = member(f"{key}.json", text)
        crc32 = zlib.crc32(data[: 512 + len(text)])
        place = Place(len(tar), len(data), 512, len(text), crc32, 0, 0, 1, 0, 0, 1, 1, len(key))
        entries.append(Entry(key, place, sha256(data).digest()))
        tar += data
    return crafted_source(folder, tar + END, entries)


def tar_of(members: Sequence[tuple[str, bytes] | tarfile.TarInfo], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of plain files and of whatever TarInfo says."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for each in members:
            if isinstance(each, tarfile.TarInfo):
                tar.addfile(each, io.BytesIO(bytes(each.size)) if each.isreg() else None)
            else:
                info = tarfile.TarInfo(each[0])
                info.size = len(each[1])
                tar.addfile(info, io.BytesIO(each[1]))
    return file.getvalue()


def pair(key: str) -> list[tuple[str, bytes]]:
    """A sound caption sample."""
    return [(f"{key}.jpg", encoded()), (f"{key}.txt", f"The picture {key}.".encode())]


class Canary:
    """Files that exist only if something was executed; `assert_untouched` at the end of every test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.path = folder / "dead"

    @property
    def command(self) -> str:
        """A shell command that leaves a trace."""
        return f"touch {self.path}"

    def pickled(self) -> bytes:
        """A pickle that leaves a trace when loaded."""
        data = pickle.dumps(_Bomb(self.command))
        assert b"system" in data
        return data

    def assert_untouched(self) -> None:
        """Nothing was executed."""
        assert not list(self.folder.iterdir()), "something was executed"


class _Bomb:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def local_storage(folder: Path) -> Storage:
    """Storage whose cache lies in a test's folder."""
    return Storage(folder / "cache", 1 << 26)
