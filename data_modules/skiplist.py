"""The skip list: samples that are never drawn.

A text file, one sample a line: `source<TAB>key`, or the JSON object {"source": ..., "key": ...} with any other fields.
Blank lines and lines that start with # are ignored. The source is the name the mix gives it. All that follows the tab
is the key, spaces at its ends included. Keys are resolved to sample numbers once, by one pass over the key files of the
sources that are named; samples are not read.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from heapq import nlargest
from pathlib import Path

import numpy as np

from data_modules.shards import ShardSet
from data_modules.sources import StreamError

Listed = dict[str, dict[str, int]]
"""Source -> key -> the line that names it."""
_CANDIDATES = 200
_LONGEST = 1000
"""Characters of a source and a key: no key of a shard has so many."""


def read_skip_list(path: Path | str) -> Listed:
    """What a skip list names; StreamError with file and line on anything that is neither form."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a key may hold what it takes for an end
    except (OSError, ValueError) as error:  # no UTF-8, or no path at all
        raise StreamError(f"skip list {path} cannot be read ({error}); data.skip names a text file") from error
    listed: Listed = {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            source, key = _parse(line, f"skip list {path}, line {number}")
            listed.setdefault(source, {}).setdefault(key, number)
    return listed


def skip_line(source: str, key: str) -> str:
    """The line of a skip list that names this sample, its end included; JSON where a tab between them is not enough."""
    if (source + key).isprintable() and source == source.strip() and source[:1] not in ("#", "{"):
        return f"{source}\t{key}\n"
    return json.dumps({"source": source, "key": key}) + "\n"


def resolve_skip_list(path: Path | str, names: Sequence[str], sources: Sequence[ShardSet]) -> dict[str, frozenset[int]]:
    """Name of a source -> numbers of its samples on the list.

    StreamError on a source or key that does not exist, with the nearest that do, and where nothing of a source is left.
    """
    found: dict[str, frozenset[int]] = {}
    for name, keys in read_skip_list(path).items():
        first = min(keys.values())
        if name not in names:
            raise StreamError(
                f"skip list {path}, line {first}: source {name!r} is not in the mix; did you mean {_near(name, names)}?"
            )
        shards = sources[names.index(name)]
        numbers = _numbers(shards, keys, name, path)
        if len(numbers) == len(shards):
            raise StreamError(f"skip list {path} leaves nothing of source {name!r}; drop the source from the mix")
        found[name] = numbers
    return found


def pack_numbers(numbers: frozenset[int]) -> str:
    """Sample numbers as short text: differences in order, compressed; equal sets give equal text."""
    steps = np.diff(np.array(sorted(numbers), "<i8"), prepend=0).astype("<u4")
    return base64.b85encode(zlib.compress(steps.tobytes(), 9)).decode()


def unpack_numbers(text: str) -> frozenset[int]:
    """The numbers again; ValueError where the text is none of `pack_numbers`."""
    try:
        steps = np.frombuffer(zlib.decompress(base64.b85decode(text)), "<u4")
    except zlib.error as error:
        raise ValueError(f"{text[:20]!r}... does not hold sample numbers") from error
    return frozenset(np.cumsum(steps, dtype=np.int64).tolist())


def added_only(saved: Mapping[str, str], now: Mapping[str, str]) -> dict[str, frozenset[int]] | None:
    """Samples that were added to a saved list, by source; None where one was taken off. Texts of `pack_numbers`."""
    added: dict[str, frozenset[int]] = {}
    for name in {**saved, **now}:
        if saved.get(name) == now.get(name):
            continue
        before = unpack_numbers(saved[name]) if name in saved else frozenset()
        after = unpack_numbers(now[name]) if name in now else frozenset()
        if not before <= after:
            return None
        added[name] = after - before
    return added


def _parse(line: str, where: str) -> tuple[str, str]:
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
            source, key = record["source"], record["key"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StreamError(f'{where}: {line[:80]!r} is not {{"source": ..., "key": ...}} ({error})') from error
    else:
        source, tab, key = line.partition("\t")
        if not tab:
            raise StreamError(f"{where}: {line[:80]!r} has no tab; write source<TAB>key")
        source = source.strip()
    if not (isinstance(source, str) and isinstance(key, str) and source and key):
        raise StreamError(f"{where}: source {source!r:.80} and key {key!r:.80} must be text and not empty")
    if len(source) + len(key) > _LONGEST:
        raise StreamError(f"{where}: its names have {len(source) + len(key)} characters, more than {_LONGEST}")
    return source, key


def _numbers(shards: ShardSet, keys: Mapping[str, int], name: str, path: Path | str) -> frozenset[int]:
    """Numbers of the samples with these keys."""
    found: dict[int, str] = {number: key for number, key in enumerate(shards.keys()) if key in keys}
    unknown = keys.keys() - set(found.values())
    if unknown:
        key = min(unknown, key=keys.__getitem__)
        near = nlargest(_CANDIDATES, shards.keys(), key=lambda other: _shared(key, other))
        raise StreamError(
            f"skip list {path}, line {keys[key]}: source {name!r} has no sample {key!r}; nearest: {_near(key, near)}"
            + (f" (and {len(unknown) - 1} more keys are unknown)" if len(unknown) > 1 else "")
        )
    return frozenset(found)


def _shared(one: str, other: str) -> int:
    """Characters at the beginning that are equal."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _near(name: str, names: Sequence[str]) -> str:
    return " or ".join(get_close_matches(name, list(names), n=3, cutoff=0.0))
