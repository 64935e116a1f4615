"""Remote folders against a real web server on loopback that drops, lies, redirects and changes its files."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from data_modules.storage import Folder, NotThereError, Storage, StorageError
from data_modules.storage.patience import Patience
from tests.data_modules.servers import Deed, FileServer, every, first

pytest.importorskip("aiohttp")

SIZE = 100_000
DATA = b"".join(number.to_bytes(4, "little") for number in range(SIZE // 4))
FILES = {"d/a.tar": DATA, "d/source.json": b"{}", "d/empty": b""}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer(dict(FILES)) as server:
        yield server


def storage(tmp_path: Path, **changes: Any) -> Storage:
    return Storage(**{"cache_root": tmp_path / "cache", "cache_bytes": 10**6, "backoff_s": 0.001, **changes})


def folder(server: FileServer, tmp_path: Path, **changes: Any) -> Folder:
    return storage(tmp_path, **changes).folder(f"{server.url}/d")


def ranges(server: FileServer) -> list[str | None]:
    return [ask.range for ask in server.asks]


# reading


def test_a_range_is_fetched_whole_and_once(server: FileServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    remote = store.folder(f"{server.url}/d/")
    assert not remote.is_local and remote.location == f"{server.url}/d/"
    for _ in range(3):
        assert remote.span("a.tar", 1000, 51_000) == DATA[1000:51_000]
    assert remote.size("a.tar") == SIZE and str(SIZE) in remote.version("a.tar")
    assert ranges(server) == ["bytes=0-0", "bytes=1000-50999"]
    counters = store.counters
    assert (counters.hits, counters.misses, counters.retries, counters.bytes_fetched) == (2, 1, 0, 50_001)
    again = storage(tmp_path)
    assert again.folder(f"{server.url}/d").span("a.tar", 1000, 51_000) == DATA[1000:51_000]
    assert again.counters.hits == 1 and len(server.asks) == 3, "a new process asks for the version alone"


def test_small_files_cost_one_request(server: FileServer, tmp_path: Path) -> None:
    remote = folder(server, tmp_path)
    assert remote.read("source.json") == b"{}" and remote.read("empty") == b""
    assert len(server.asks) == 2
    assert remote.read("source.json") == b"{}" and len(server.asks) == 2
    assert remote.read("a.tar") == DATA
    assert remote.span("empty", 0, 10) == b""


def test_what_is_there_is_told_and_what_cannot_be_told_is_an_error(server: FileServer, tmp_path: Path) -> None:
    remote = folder(server, tmp_path)
    assert remote.exists("a.tar") and not remote.exists("b.tar")
    with pytest.raises(NotThereError, match=rf"{server.url}/d/b\.tar is not there \(404"):
        remote.size("b.tar")
    with pytest.raises(StorageError, match="cannot list"):
        remote.list()
    with pytest.raises(StorageError, match="ask for spans"):
        remote.map("a.tar")
    with pytest.raises(StorageError, match=r"no range 5\.\.3"):
        remote.span("a.tar", 5, 3)
    with FileServer({}, first(1, Deed(status=404))) as later, pytest.raises(NotThereError):
        later.files = dict(FILES)
        late = folder(later, tmp_path)
        assert not late.exists("a.tar") and late.exists("a.tar"), "what is missing may be written later"
        late.read("b")


def test_a_file_that_ends_early_gives_what_exists(server: FileServer, tmp_path: Path) -> None:
    remote = folder(server, tmp_path)
    assert remote.span("a.tar", SIZE - 10, SIZE + 500) == DATA[-10:]
    assert remote.span("a.tar", SIZE, SIZE + 500) == remote.span("a.tar", SIZE + 5, SIZE + 9) == b""
    assert remote.size("a.tar") == SIZE


# trying again


@pytest.mark.parametrize(
    "deed",
    [
        Deed(drop_after=0.5),
        Deed(drop_after=0.0),
        Deed(status=500),
        Deed(status=503),
        Deed(status=429, headers={"Retry-After": "0"}),
        Deed(shift=3),
        Deed(extra=b"more"),
        Deed(headers={"Content-Range": "rubbish"}),
    ],
)
def test_a_server_that_fails_every_third_time_gives_the_same_bytes(tmp_path: Path, deed: Deed) -> None:
    with FileServer(FILES, every(3, deed)) as server:
        store = storage(tmp_path)
        remote = store.folder(f"{server.url}/d")
        for start in range(0, SIZE, 12_500):
            assert remote.span("a.tar", start, start + 12_500) == DATA[start : start + 12_500]
        assert store.counters.retries == 4


def test_a_dropped_body_goes_on_where_it_broke(tmp_path: Path) -> None:
    with FileServer(FILES, lambda ask: Deed(drop_after=0.5) if ask.number in (1, 2) else None) as server:
        store = storage(tmp_path)
        assert store.folder(f"{server.url}/d").span("a.tar", 0, 80_000) == DATA[:80_000]
        assert ranges(server) == ["bytes=0-0", "bytes=0-79999", "bytes=40000-79999", "bytes=60000-79999"]
        assert store.counters.bytes_fetched == 80_001


def test_retry_after_is_honoured_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("data_modules.storage.patience.time.sleep", lambda s: waits.append(s) if s >= 1 else None)
    answers = {0: Deed(status=429, headers={"Retry-After": "7"}), 1: Deed(status=503, headers={"Retry-After": "9999"})}
    with FileServer(FILES, lambda ask: answers.get(ask.number)) as server:
        assert folder(server, tmp_path).read("source.json") == b"{}"
    assert waits == [7.0, 60.0]


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        (Deed(status=500), "500 Internal Server Error"),
        (Deed(drop_after=0.0), "not completed|disconnected|ended"),
        (Deed(delay_s=0.3), "Timeout"),
        (Deed(drip_s=0.004), "Timeout"),
    ],
)
def test_an_outage_stops_the_run_and_names_url_range_problem_and_tries(
    tmp_path: Path, deed: Deed, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FileServer(FILES) as server, caplog.at_level(logging.WARNING):
        store = storage(tmp_path)
        remote = store.folder(f"{server.url.replace('//', '//user:secret@')}/d?sig=secret")
        assert remote.exists("a.tar")
        server.misbehave = lambda ask: deed
        store._remote.patience = Patience(attempts=2, timeout_s=0.1 if "Timeout" in problem else 10.0, backoff_s=0.0)
        with pytest.raises(StorageError, match=problem) as caught:
            remote.span("a.tar", 10, 200)
    text = str(caught.value)
    assert not isinstance(caught.value, NotThereError)
    assert f"//***@127.0.0.1:{server.port}/d/a.tar?*** bytes 10-199: " in text and "tried 2 times" in text
    assert "\n" not in text and "secret" not in text + caplog.text
    assert list((tmp_path / "cache" / "spans").glob("*.part")) == []


def test_a_dead_server_is_an_outage_and_not_a_missing_file(tmp_path: Path) -> None:
    with FileServer(FILES) as server:
        pass
    remote = folder(server, tmp_path, attempts=2)
    for ask in (remote.exists, remote.read, remote.size):
        with pytest.raises(StorageError, match="out of reach") as caught:
            ask("a.tar")
        assert not isinstance(caught.value, NotThereError)


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        (Deed(status=403), "403 Forbidden; check the address and who may read it"),
        (Deed(status=401), "401 Unauthorized"),
        (Deed(status=400), "400 Bad Request"),
        (Deed(headers={"Content-Encoding": "gzip"}), "compresses"),
        (Deed(ignore_range=True, without_length=True), "does not tell the size"),
    ],
)
def test_what_another_try_does_not_mend_fails_at_once(tmp_path: Path, deed: Deed, problem: str) -> None:
    with FileServer(FILES, lambda ask: deed) as server, pytest.raises(StorageError, match=problem) as caught:
        storage(tmp_path).folder(f"{server.url}/d?sig=secret").size("a.tar")
    assert len(server.asks) == 1
    assert "secret" not in str(caught.value) and f"{server.url}/d/a.tar?***" in str(caught.value)


# servers that ignore ranges, and files that change


@pytest.mark.parametrize("from_request", [0, 1])
def test_a_server_without_ranges_is_read_whole_into_the_cache(
    tmp_path: Path, from_request: int, caplog: pytest.LogCaptureFixture
) -> None:
    def misbehave(ask: Any) -> Deed | None:
        if ask.number < from_request:
            return None
        return Deed(ignore_range=True, drop_after=0.7 if ask.number == from_request + 1 else None)

    with FileServer(FILES, misbehave) as server:
        store = storage(tmp_path)
        remote = store.folder(f"{server.url}/d")
        for start in (0, 40_000, 90_000):
            assert remote.span("a.tar", start, start + 5000) == DATA[start : start + 5000]
        assert caplog.text.count("its server sends no ranges, so every file that is read comes whole") == 1
        assert store.counters.retries == 1
        assert server.asks[-1].range is None and len(server.asks) <= 4
        assert remote.read("source.json") == b"{}"
        small = folder(server, tmp_path / "small", cache_bytes=50_000)
        with pytest.raises(StorageError, match=r"a\.tar bytes 0-99999: 100000 bytes are needed at once.*holds 50000"):
            small.span("a.tar", 0, 5000)


@pytest.mark.parametrize("change", ["etag", "length"])
def test_a_file_that_changes_under_the_run_is_an_error(tmp_path: Path, change: str) -> None:
    with FileServer(dict(FILES)) as server:
        remote = folder(server, tmp_path)
        assert remote.span("a.tar", 0, 100) == DATA[:100]
        assert isinstance(server.files, dict)
        server.files["d/a.tar"] = DATA[::-1] if change == "etag" else DATA + b"more"
        with pytest.raises(StorageError, match=r"a\.tar changed while the run read it \(100000 bytes, version .*now"):
            remote.span("a.tar", 100, 200)
        travelled = pickle.loads(pickle.dumps(remote))
        with pytest.raises(StorageError, match="changed"):
            travelled.span("a.tar", 100, 200)
        assert folder(server, tmp_path).span("a.tar", 0, 100) == server.files["d/a.tar"][:100], "a new run reads anew"


def test_without_a_version_the_cache_serves_this_run_and_its_workers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(remote: Folder) -> tuple[bytes, bytes]:
        return bytes(remote.read("source.json")), bytes(remote.span("a.tar", 10, 200))

    with FileServer(dict(FILES), lambda ask: Deed(etag="")) as server:
        remote = folder(server, tmp_path)
        assert read(remote) == (b"{}", DATA[10:200])
        num_asks = len(server.asks)
        server.files = {"d/a.tar": DATA[::-1], "d/source.json": b"[]"}
        assert read(pickle.loads(pickle.dumps(remote))) == read(remote) == (b"{}", DATA[10:200])
        assert len(server.asks) == num_asks, "the run asks once, its workers not at all"
        assert caplog.text.count("d: its server tells no version") == 1
        assert read(folder(server, tmp_path)) == (b"[]", DATA[::-1][10:200]), "a new run reads anew"
        last = folder(server, tmp_path, cache_bytes=500)
        assert last.span("a.tar", 0, 400) == DATA[::-1][:400]
        assert len(list((tmp_path / "cache" / "spans").glob("*.span"))) == 1, "files of other runs are evicted"


def test_a_cached_range_that_was_harmed_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    assert folder(server, tmp_path).span("a.tar", 0, 5000) == DATA[:5000]
    path = next((tmp_path / "cache" / "spans").glob("*.span"))
    path.write_bytes(path.read_bytes()[:-100])
    store = storage(tmp_path)
    assert store.folder(f"{server.url}/d").span("a.tar", 0, 5000) == DATA[:5000]
    assert (store.counters.corrupt, store.counters.misses) == (1, 1)


# redirects


def test_redirects_are_followed_on_the_same_server_only(tmp_path: Path) -> None:
    asked: list[str] = []

    def elsewhere(ask: Any) -> Deed | None:
        if ask.path.startswith("/moved/d/"):
            return Deed(status=302, headers={"Location": ask.path.removeprefix("/moved")})
        if ask.path.startswith("/loop"):
            return Deed(status=307, headers={"Location": ask.path})
        if ask.path.startswith("/to/"):
            return Deed(status=301, headers={"Location": asked[-1]})
        return None

    with FileServer(FILES, elsewhere) as server, FileServer(FILES) as other:
        store = storage(tmp_path)
        with_password = server.url.replace("//", "//user:secret@")
        assert store.folder(f"{with_password}/moved/d").span("a.tar", 5, 9) == DATA[5:9]
        assert all("Authorization" in ask.headers for ask in server.asks)
        with pytest.raises(StorageError, match="more than 5 times"):
            store.folder(f"{server.url}/loop").read("a.tar")
        assert sum(ask.path.startswith("/loop") for ask in server.asks) == 6
        local = server.url.replace("127.0.0.1", "localhost")
        for target in (f"{other.url}/d/a.tar?sig=secret", f"{local}/d/a.tar", "file:///etc/passwd", "pipe:id", "//h/x"):
            asked.append(target)
            with pytest.raises(StorageError, match="redirects to another server") as caught:
                store.folder(f"{with_password}/to").read(f"{len(asked)}.tar")
            assert "secret" not in str(caught.value)
        assert other.asks == []


# threads and processes


def test_threads_that_want_one_range_fetch_it_once(tmp_path: Path) -> None:
    with FileServer(FILES, lambda ask: Deed(delay_s=0.02)) as server, ThreadPoolExecutor(4) as threads:
        remote = folder(server, tmp_path)
        assert remote.size("a.tar") == SIZE
        spans = [(start, start + 10_000) for start in (0, 10_000) for _ in range(4)]
        found = list(threads.map(lambda span: bytes(remote.span("a.tar", *span)), spans))
        assert found == [DATA[start:stop] for start, stop in spans]
        assert sorted(filter(None, ranges(server))) == ["bytes=0-0", "bytes=0-9999", "bytes=10000-19999"]


def _read_in_child(remote: Folder, start: int, answers: Any) -> None:
    answers.put(bytes(remote.span("a.tar", start, start + 100)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_child_processes_read_after_their_parent_and_beside_it(server: FileServer, tmp_path: Path, method: str) -> None:
    context = get_context(method)
    remote = folder(server, tmp_path)
    assert remote.span("a.tar", 0, 100) == DATA[:100]
    busy = threading.Event()

    def keep_reading() -> None:
        start = 200
        while not busy.is_set():
            start += 4
            assert remote.span("a.tar", start, start + 4) == DATA[start : start + 4]

    thread = threading.Thread(target=keep_reading)
    thread.start()
    answers = context.Queue()
    children = [context.Process(target=_read_in_child, args=(remote, start, answers)) for start in (0, 10_000, 20_000)]
    for child in children:
        child.start()
    found = {answers.get(timeout=30) for _ in children}
    for child in children:
        child.join(30)
    busy.set()
    thread.join(30)
    assert found == {DATA[start : start + 100] for start in (0, 10_000, 20_000)}
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert remote.span("a.tar", 500, 90_000) == DATA[500:90_000]


def test_a_reader_killed_in_mid_body_leaves_a_cache_that_works(tmp_path: Path) -> None:
    with FileServer(FILES, lambda ask: Deed(drip_s=0.01) if ask.number == 1 else None) as server:
        remote = folder(server, tmp_path, cache_bytes=60_000)
        child = os.fork()
        if child == 0:
            try:
                remote.span("a.tar", 0, 50_000)
            finally:
                os._exit(1)
        while not list((tmp_path / "cache" / "spans").glob("*.part")):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert remote.span("a.tar", 10_000, 60_000) == DATA[10_000:60_000]
        assert [path.suffix for path in (tmp_path / "cache" / "spans").iterdir() if path.name != "ledger"] == [".span"]


# what is not installed


_BARE = """
import sys
from data_modules.storage import Storage, StorageError
assert not {"fsspec", "aiohttp", "s3fs"} & set(sys.modules), "imported before it is needed"
sys.modules.update(aiohttp=None, s3fs=None, gcsfs=None)
for scheme in ("http", "s3", "gs"):
    try:
        Storage("unused").folder(f"{scheme}://h/x").read("a")
    except StorageError as error:
        sys.stdout.write(f"{error}\\n")
"""


def test_a_missing_extra_is_one_line_that_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["http://", "s3://", "gs://"]
    assert all("pip install bestiary[remote]" in line for line in lines[:2]) and "pip install gcsfs" in lines[2]
