"""A folder on a web server or in a bucket: ranges come through the cache on disk, each fetched whole and once."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from data_modules.storage.bucket import BucketStore
from data_modules.storage.cache import Cache, Part, cache_key
from data_modules.storage.counters import Counters, Tally
from data_modules.storage.errors import NotThereError, StorageError
from data_modules.storage.patience import HiccupError, Patience
from data_modules.storage.store import Facts, RangesIgnoredError, Store
from data_modules.storage.urls import identity, joined, printable, scheme_of
from data_modules.storage.web import WebStore

log = logging.getLogger(__name__)
T = TypeVar("T")

PEEK = 64 * 1024
"""A small file of up to so many bytes costs one request instead of two."""

LARGEST_READ = 1 << 30
"""What a server may call a small file: those are parsed in memory."""

_STRIPES = 64


@dataclass
class _State:
    """What belongs to one process: locks, caches and counters. A forked child makes its own with the same facts."""

    cache: Cache
    tally: Tally
    facts: dict[str, Facts]
    stripes: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(_STRIPES)])


class Remote:
    """The remote side of a Storage: what its folders share. Picklable; safe over threads and forks."""

    def __init__(
        self, root: Path, limit: int, patience: Patience, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.root, self.limit, self.patience = root, limit, patience
        self.options = {scheme: dict(given) for scheme, given in (options or {}).items()}
        self._states: dict[int, _State] = {}
        self._told: set[tuple[str, str]] = set()
        self._run = uuid.uuid4().hex  # workers inherit it, however they are started

    def __getstate__(self) -> dict[str, Any]:
        facts = dict(self._state.facts)
        return {**self.__dict__, "_states": {}, "_facts": facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        facts = state.pop("_facts")
        self.__dict__.update(state)
        self._states = {os.getpid(): self._new_state(facts)}

    @property
    def counters(self) -> Counters:
        """What this process has fetched so far."""
        return self._state.tally.copy()

    def look(self, url: str, peek: int = 0) -> tuple[Facts, bytes]:
        """What is known of a file, asked for once a run; with its first bytes when it is asked now."""
        state = self._state
        known = state.facts.get(url)
        if known is not None:
            return known, b""
        store = self._store(url)
        facts, head = self._persist(printable(url), lambda: store.look(url, peek))
        state.tally.add("bytes_fetched", len(head))
        return state.facts.setdefault(url, facts), head

    def expect(self, url: str, size: int) -> None:
        """Ask again for a file that another one vouches to be of `size` bytes, where the store told otherwise.

        A file that is really shorter stays so (damage, counted where it is read). StorageError where something comes
        whole that is not it: pages of proxies and logins say 200, too.
        """
        if self.look(url)[0].size == size:
            return

        def attempt() -> None:
            self._state.facts.pop(url, None)
            found = self.look(url)[0]
            if found.size != size and not found.has_ranges:
                raise HiccupError(f"{found.size} bytes came for a file of {size}: another page, or not all of it")

        self._persist(printable(url), attempt)

    def range(self, url: str, start: int, stop: int) -> memoryview:
        """The bytes of a range that lies inside the file."""
        facts, _ = self.look(url)
        if facts.has_ranges:
            try:
                return self._cached(url, facts, start, stop)
            except RangesIgnoredError:
                facts = self._state.facts[url] = replace(facts, has_ranges=False)
        if stop - start < facts.size:
            self._tell(url, "its server sends no ranges, so every file that is read comes whole")
        return self._cached(url, facts, 0, facts.size)[start:stop]

    def keep(self, url: str, facts: Facts, data: bytes) -> memoryview:
        """Put a whole file that has come already into the cache."""
        state = self._state
        key = self._key(url, facts, 0, facts.size)
        found = state.cache.find(key, facts.size)
        state.tally.add("misses" if found is None else "hits")
        if found is not None:
            return found
        with state.cache.part(key, len(data), printable(url), self.patience.timeout_s) as part:
            part.write(data)
            return part.commit()

    def list(self, url: str) -> list[str]:
        """The names of the files of a folder."""
        store = self._store(url)
        return self._persist(printable(url), lambda: store.list(url))

    def _tell(self, url: str, what: str) -> None:
        """One line for each folder of files."""
        place = printable(url).partition("?")[0].rpartition("/")[0]
        if (place, what) not in self._told:
            self._told.add((place, what))
            log.warning("%s: %s", place, what)

    def _key(self, url: str, facts: Facts, start: int, stop: int) -> str:
        """Where a range is kept. Without a version nobody can say later that a file is the same: this run alone."""
        if not facts.version:
            self._tell(
                url, "its server tells no version (ETag or Last-Modified), its shards are cached for this run only"
            )
        return cache_key(identity(url), facts.version or f"run {self._run}", start, stop)

    def _cached(self, url: str, facts: Facts, start: int, stop: int) -> memoryview:
        state = self._state
        key = self._key(url, facts, start, stop)
        with state.stripes[int(key[:8], 16) % _STRIPES]:  # two threads that want one range fetch it once
            found = state.cache.find(key, stop - start)
            if found is not None:
                state.tally.add("hits")
                return found
            state.tally.add("misses")
            what = f"{printable(url)} bytes {start}-{stop - 1}"
            with state.cache.part(key, stop - start, what, self.patience.timeout_s) as part:
                self._fill(url, start, part, facts, what)
                return part.commit()

    def _fill(self, url: str, start: int, part: Part, facts: Facts, what: str) -> None:
        store, tally = self._store(url), self._state.tally

        def attempt() -> None:
            before = part.written if facts.has_ranges else 0
            try:
                store.fetch(url, start, part, facts)
            finally:
                tally.add("bytes_fetched", part.written - before)

        self._persist(what, attempt)

    def _persist(self, what: str, attempt: Callable[[], T]) -> T:
        return self.patience.persist(what, attempt, lambda: self._state.tally.add("retries"))

    def _store(self, url: str) -> Store:
        scheme = scheme_of(url)
        assert scheme is not None, "a remote folder has a scheme"
        if scheme in ("http", "https"):
            return WebStore(self.patience, self.options.get(scheme, self.options.get("http", {})))
        return BucketStore(scheme, self.patience, self.options.get(scheme, {}))

    @property
    def _state(self) -> _State:
        pid = os.getpid()
        state = self._states.get(pid)
        if state is None:
            inherited = next(iter(self._states.values()), None)
            state = self._states.setdefault(pid, self._new_state(inherited.facts if inherited else {}))
        return state

    def _new_state(self, facts: Mapping[str, Facts]) -> _State:
        tally = Tally()
        return _State(Cache(self.root, self.limit, tally), tally, dict(facts))


class RemoteFolder:
    """Files below one URL; `location` is that URL without its secrets and its query."""

    is_local = False

    def __init__(self, url: str, remote: Remote) -> None:
        self._url = url
        self._remote = remote
        self.location = printable(url.partition("?")[0])

    def __repr__(self) -> str:
        return f"RemoteFolder({self.location!r})"

    def read(self, name: str) -> memoryview:
        """A whole small file, through the cache."""
        url = joined(self._url, name)
        facts, head = self._remote.look(url, PEEK)
        if facts.size > LARGEST_READ:
            raise StorageError(f"{printable(url)} has {facts.size} bytes; no file that is read whole is so large")
        if not facts.size:
            return memoryview(b"")
        if len(head) == facts.size:
            return self._remote.keep(url, facts, head)
        return self._remote.range(url, 0, facts.size)

    def map(self, name: str) -> memoryview:
        """Not offered."""
        raise StorageError(f"{printable(joined(self._url, name))} cannot be mapped; ask for spans of it")

    def span(self, name: str, start: int, stop: int) -> memoryview:
        """The bytes from `start` up to `stop`, fewer where the file ends before; fetched whole into the cache."""
        url = joined(self._url, name)
        if not 0 <= start <= stop:
            raise StorageError(f"{printable(url)}: there is no range {start}..{stop}")
        stop = min(stop, self._remote.look(url)[0].size)
        return self._remote.range(url, start, stop) if start < stop else memoryview(b"")

    def expect(self, name: str, size: int) -> None:
        """Make sure of a file's size, see `Remote.expect`."""
        self._remote.expect(joined(self._url, name), size)

    def exists(self, name: str) -> bool:
        """Whether the file is there; an outage is an error, not False."""
        try:
            self._remote.look(joined(self._url, name))
        except NotThereError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._remote.look(joined(self._url, name))[0].size

    def version(self, name: str) -> str:
        """ETag (or Last-Modified) and size, as the store tells them."""
        facts = self._remote.look(joined(self._url, name))[0]
        return f"{facts.version}-{facts.size}"

    def list(self) -> list[str]:
        """Names of the files directly in the folder, sorted; a web server cannot tell."""
        return self._remote.list(self._url)
