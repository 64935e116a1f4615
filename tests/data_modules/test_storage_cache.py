"""The cache of fetched ranges: bounded, shared by threads and processes, never believed without a check."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_modules.storage import Storage, StorageError
from data_modules.storage.cache import Cache, cache_key
from data_modules.storage.counters import Tally

FOOTER = 16


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1000, Tally())


def put(cache: Cache, name: str, data: bytes) -> memoryview:
    with cache.part(key(name), len(data), name, 0.2) as part:
        part.write(data)
        return part.commit()


def key(name: str) -> str:
    return cache_key(name, "", 0, 1)


@contextmanager
def _exiting() -> Iterator[None]:
    """The rest of a forked child: it must not go on with the tests of its parent."""
    code = 1
    try:
        yield
        code = 0
    finally:
        os._exit(code)


def held(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.root.iterdir() if path.name != "ledger")


def test_the_cache_keeps_what_was_used_last_within_its_bound(cache: Cache) -> None:
    for number in range(4):
        put(cache, f"{number}", bytes([number]) * 200)
    assert cache.find(key("0"), 200) == bytes(200)  # touched: 1 is the oldest now
    put(cache, "4", b"4" * 200)
    assert held(cache) <= 1000
    kept = [name for name in "01234" if cache.find(key(name), 200) is not None]
    assert kept == ["0", "2", "3", "4"]
    assert cache._tally.copy().evictions == 1


def test_a_map_outlives_the_eviction_of_its_file(cache: Cache) -> None:
    made = put(cache, "a", b"a" * 600)
    found = cache.find(key("a"), 600)
    put(cache, "b", b"b" * 600)
    assert cache.find(key("a"), 600) is None
    assert made == found == b"a" * 600
    assert found is not None and found.readonly


def test_what_the_cache_cannot_hold_is_one_clear_line(cache: Cache) -> None:
    with pytest.raises(StorageError, match=r"big: 1000 bytes are needed at once.*holds 1000; raise data.cache_gb"):
        cache.part(key("big"), 1000, "big", 0.1)
    with cache.part(key("a"), 800, "a", 0.1), pytest.raises(StorageError, match="full of unfinished files"):
        cache.part(key("b"), 800, "b", 0.1)
    assert put(cache, "c", b"c" * 984) == b"c" * 984


@pytest.mark.parametrize("harm", ["cut", "longer", "flip", "footer", "zeros"])
def test_a_cached_file_that_is_not_what_was_written_is_dropped(tmp_path: Path, harm: str) -> None:
    put(Cache(tmp_path, 1000, Tally()), "a", b"a" * 300)
    path = next(tmp_path.glob("*.span"))
    data = bytearray(path.read_bytes())
    match harm:
        case "cut":
            data = data[:-1]
        case "longer":
            data += b"x"
        case "flip":
            data[150] ^= 1
        case "footer":
            data[-1] ^= 1
        case "zeros":
            data = bytearray(len(data))
    path.write_bytes(data)
    tally = Tally()
    assert Cache(tmp_path, 1000, tally).find(key("a"), 300) is None
    assert tally.copy().corrupt == 1 and not path.exists()


@pytest.mark.parametrize("ledger", [b"", b"rubbish", b"-5", None])
def test_a_lost_ledger_is_counted_anew(cache: Cache, ledger: bytes | None) -> None:
    put(cache, "a", b"a" * 500)
    path = cache.root / "ledger"
    path.unlink() if ledger is None else path.write_bytes(ledger)
    put(cache, "b", b"b" * 500)
    assert held(cache) == 500 + FOOTER
    assert int(path.read_text()) == 500 + FOOTER


def test_a_writer_that_fails_or_is_killed_leaves_nothing_that_stays(cache: Cache) -> None:
    with pytest.raises(RuntimeError, match="lost"), cache.part(key("a"), 400, "a", 0.1) as part:
        part.write(b"a" * 200)
        raise RuntimeError("lost")
    assert held(cache) == 0 and (cache.root / "ledger").read_text() == "0"
    child = os.fork()
    if child == 0:
        with _exiting():
            part = cache.part(key("b"), 700, "b", 0.1)
            part.write(b"b" * 300)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.suffix for path in cache.root.iterdir() if path.name != "ledger"] == [".part"]
    put(cache, "c", b"c" * 700)
    assert [path.suffix for path in cache.root.iterdir() if path.name != "ledger"] == [".span"]
    assert held(cache) == 700 + FOOTER


def test_other_files_in_the_folder_are_left_alone(cache: Cache) -> None:
    cache.root.mkdir()
    precious = cache.root / "thesis.tex"
    precious.write_bytes(b"x" * 5000)
    for number in range(5):
        put(cache, f"{number}", bytes(400))
    assert precious.read_bytes() == b"x" * 5000


def test_the_bound_holds_while_threads_and_processes_fill_the_cache(cache: Cache) -> None:
    def fill(seed: int) -> None:
        for number in range(12):
            name, size = f"{(seed * 7 + number * 3) % 10}", 60 + seed * 11 % 50
            found = cache.find(key(f"{name}-{size}"), size)
            data = put(cache, f"{name}-{size}", name.encode() * size) if found is None else found
            assert data == name.encode() * size

    children = []
    for seed in range(2):
        child = os.fork()
        if child == 0:
            with _exiting():
                fill(seed)
        children.append(child)
    largest = 0
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(fill, seed) for seed in range(2, 5)]
        while not all(job.done() for job in jobs):
            with cache._ledger() as (_, total):  # nothing comes or goes meanwhile
                largest = max(largest, held(cache), total)
            time.sleep(0.002)
        for job in jobs:
            job.result()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert largest <= 1000 and held(cache) <= 1000


def test_a_cache_that_cannot_be_written_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot be used .*set data\.cache_root"):
        Cache(tmp_path / "file" / "cache", 1000, Tally()).part(key("a"), 1, "a", 0.1)
    full = Cache(tmp_path / "full", 1000, Tally())
    child = os.fork()
    if child == 0:  # a limit on the size of files stands for a full disk
        with _exiting():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
            with pytest.raises(StorageError, match="local disk with room"):
                full.part(key("a"), 400, "a", 0.1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held(full) == 0
    with pytest.raises(StorageError, match="cache_gb above 0"):
        Storage(tmp_path, 0)
