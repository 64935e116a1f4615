"""The stream over a network: bit for bit the local one, through drops, a small cache, workers, resumes and damage."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_modules.rules import Rules
from data_modules.shards import open_source
from data_modules.sources import StreamError
from data_modules.storage import Storage, StorageError
from data_modules.stream import Stream
from tests.data_modules.making import LANES, CharProcessor, source
from tests.data_modules.servers import Ask, Deed, FileServer, every

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

Steps = list[list[tuple[Any, ...]]]
FOLDERS = {"big": "big/train", "bad": "bad", "tiny": "tiny"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above three sources, one of them with pictures that do not decode."""
    root = tmp_path_factory.mktemp("served")
    source(root / "big" / "train", "big", 40)
    source(root / "bad", "bad", 21, bad=(3, 4, 11), domain="chart")
    source(root / "tiny", "tiny", 5, domain="text")
    return root


def opened(root: Path | str, storage: Storage | None = None) -> Stream:
    mix = {name: {"path": f"{root}/{folder}", "weight": float(len(name))} for name, folder in FOLDERS.items()}
    rules = Rules(seed=3, num_lanes=LANES, max_tokens=96, max_views=8, bad_budget=0.5)
    return Stream(mix, CharProcessor(), rules, storage=storage)


def steps_of(made: Stream, count: int, *, workers: int = 0, states: Any = None) -> Steps:
    """Everything of the batches of some steps, in comparable form."""
    loader = made.loader(range(LANES), states=states, micro_batch=4, num_workers=workers)
    return [
        [
            (
                batch.step,
                batch.states,
                batch.segments,
                *(each.numpy().tobytes() for each in (batch.ids, batch.labels, batch.slots, batch.pixels)),
                None if batch.regions is None else batch.regions.coords.numpy().tobytes(),
            )
            for batch in batches
        ]
        for batches in itertools.islice(loader, count)
    ]


def states_after(steps: Steps) -> dict[int, bytes]:
    return dict(enumerate(state for batch in steps[-1] for state in batch[1]))


def storage(tmp_path: Path, root: Path, **changes: Any) -> Storage:
    """With a cache that holds a third of the data."""
    third = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 3
    return Storage(**{"cache_root": tmp_path, "cache_bytes": third, "attempts": 20, "backoff_s": 0.001, **changes})


@pytest.fixture
def dropping(root: Path) -> Iterator[FileServer]:
    """Serves the sources and drops every third request in mid-body."""
    with FileServer(root, every(3, Deed(drop_after=0.6))) as server:
        yield server


@pytest.mark.slow
def test_a_dropping_server_and_a_small_cache_give_the_local_stream(
    root: Path, dropping: FileServer, tmp_path: Path
) -> None:
    local, store = opened(root), storage(tmp_path, root)
    remote = opened(dropping.url, store)
    assert remote.fingerprint() == local.fingerprint()
    assert steps_of(remote, 5) == steps_of(local, 5)
    counters = store.counters
    assert counters.retries > 5 and counters.evictions > 5
    told = remote.loader(range(4)).fetched()
    assert told["retries"] == counters.retries and told["bytes_fetched"] == counters.bytes_fetched
    assert local.loader(range(4)).fetched() == {}
    held = sum(path.stat().st_size for path in (tmp_path / "spans").glob("*.span"))
    assert held <= store._remote.limit


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_and_a_resume_with_a_cold_cache_give_the_local_stream(
    root: Path, dropping: FileServer, tmp_path: Path, workers: int
) -> None:
    expected = steps_of(opened(root), 12)
    first = opened(dropping.url, storage(tmp_path / "first", root))
    assert steps_of(first, 12, workers=workers) == expected
    loader = first.loader(range(12), num_workers=workers)
    before = loader.fetched()["hits"]
    next(iter(loader))
    assert loader.fetched()["hits"] > before, "workers tell what they read"
    saved = first.fingerprint()
    states = states_after(expected[:6])
    again = opened(dropping.url, storage(tmp_path / "cold", root))
    assert again.fingerprint() == saved
    assert steps_of(again, 6, workers=workers, states=states) == expected[6:]
    assert steps_of(opened(root), 6, workers=workers, states=states) == expected[6:]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_outage_ends_the_run_and_is_not_counted_as_damage(root: Path, tmp_path: Path, workers: int) -> None:
    with FileServer(root) as server:
        remote = opened(server.url, storage(tmp_path, root, attempts=2))
        server.misbehave = lambda ask: Deed(status=503) if ask.number > 12 else None
        with pytest.raises(StorageError, match=r"http://.*503 Service Unavailable; tried 2 times") as caught:
            steps_of(remote, 20, workers=workers)
        assert "\n" not in str(caught.value)
        with pytest.raises(StreamError, match=r"source 'big': http://.*/big/train/source\.json: .*tried 2 times"):
            opened(server.url, storage(tmp_path, root, attempts=2))


@pytest.mark.parametrize(
    "wrong",
    [Deed(page=b"<html>log in</html>"), Deed(headers={"Content-Range": "bytes 0-0/700"})],
    ids=["page", "total"],
)
def test_an_answer_that_is_not_the_shard_is_asked_for_again_and_is_no_damage(
    root: Path, tmp_path: Path, wrong: Deed
) -> None:
    with FileServer(root) as server:
        remote = opened(server.url, storage(tmp_path, root))
        seen: set[str] = set()

        def first_of_each_tar(ask: Ask) -> Deed | None:
            is_new = ask.path.endswith(".tar") and ask.path not in seen
            seen.add(ask.path)
            return wrong if is_new else None

        server.misbehave = first_of_each_tar
        assert steps_of(remote, 2) == steps_of(opened(root), 2)
        server.misbehave = lambda ask: Deed(page=b"<html>") if ask.path.endswith(".tar") else None
        with pytest.raises(StorageError, match=r"shard-\d+\.tar: 6 bytes came for a file of \d+.*tried 2 times"):
            steps_of(opened(server.url, storage(tmp_path / "other", root, attempts=2)), 2)


def test_a_truncated_remote_shard_is_the_same_damage_as_a_local_one(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    tar = copy / "big" / "train" / "shard-00002.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with FileServer(copy) as server:
        remote, local = opened(server.url, Storage(tmp_path)), opened(copy)
        found = steps_of(remote, 12)
        assert found == steps_of(local, 12)
        losses = remote.losses(states_after(found).values())
        assert losses == local.losses(states_after(found).values())
        assert any("shard-00002.tar" in line and "cut" in line for line in losses)


def test_tars_of_others_are_read_over_a_pattern(root: Path, dropping: FileServer, tmp_path: Path) -> None:
    files = "bad/shard-{00000..00004}.tar"
    local = open_source(root / "bad")
    for query in ("?sig=one", "?sig=two"):
        found = open_source(f"{dropping.url}/{files}{query}", storage=storage(tmp_path, root), name="bad")
        assert list(found.keys()) == list(local.keys())
        assert [found[number] for number in range(len(found))] == [local[number] for number in range(len(local))]


@pytest.mark.slow
def test_a_bucket_gives_the_local_stream_to_workers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        writer = s3fs.S3FileSystem(skip_instance_cache=True)
        writer.mkdir("mix")
        writer.put(f"{root}/", "mix/set/", recursive=True)
        expected = steps_of(opened(root), 4)
        assert steps_of(opened("s3://mix/set", Storage(tmp_path / "first")), 4) == expected
        again = opened("s3://mix/set", Storage(tmp_path / "second"))
        assert steps_of(again, 4, workers=2) == expected, "workers forked after their parent has read"
    finally:
        server.stop()
