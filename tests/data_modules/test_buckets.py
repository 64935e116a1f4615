"""Folders in buckets: any fsspec store through the same cache, and S3 against a real server of its protocol."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_modules.storage import NotThereError, Storage, StorageError
from tests.data_modules.servers import Deed, FileServer

SIZE = 100_000
DATA = b"".join(number.to_bytes(4, "little") for number in range(SIZE // 4))
FILES = {"d/a.tar": DATA, "d/source.json": b"{}", "d/empty": b""}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def storage(tmp_path: Path, **changes: Any) -> Storage:
    return Storage(**{"cache_root": tmp_path / "cache", "cache_bytes": 10**6, "backoff_s": 0.001, **changes})


def test_any_fsspec_store_is_read_through_the_same_cache(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    name = uuid.uuid4().hex
    for file, data in FILES.items():
        memory.pipe(f"/{name}/{file}", data)
    store = storage(tmp_path)
    remote = store.folder(f"memory://{name}/d")
    for _ in range(2):
        assert remote.span("a.tar", 10, 50_000) == DATA[10:50_000]
    assert remote.read("source.json") == b"{}" and remote.read("empty") == b""
    assert remote.list() == ["a.tar", "empty", "source.json"]
    assert remote.exists("a.tar") and not remote.exists("b") and not store.folder(f"memory://{name}").exists("d")
    assert remote.span("a.tar", SIZE - 5, SIZE + 5) == DATA[-5:]
    assert (store.counters.hits, store.counters.misses) == (1, 3)
    memory.pipe(f"/{name}/d/a.tar", DATA[:-4])
    with pytest.raises(StorageError, match="changed while"):
        remote.span("a.tar", 0, 10)
    memory.rm(f"/{name}", recursive=True)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The endpoint of an S3 server on loopback with one bucket."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("through", ["environment", "options"])
def test_a_bucket_is_read_through_the_endpoint_of_environment_or_options(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    import s3fs

    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    writer = s3fs.S3FileSystem(endpoint_url=bucket, skip_instance_cache=True)
    writer.mkdir(through)
    for file, data in FILES.items():
        writer.pipe(f"{through}/{file}", data)
    options: dict[str, dict[str, Any]] = {}
    if through == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    else:
        options = {"s3": {"endpoint_url": bucket}}
    store = storage(tmp_path, options=options)
    remote = store.folder(f"s3://{through}/d")
    for _ in range(2):
        assert remote.span("a.tar", 10, 50_000) == DATA[10:50_000]
    assert remote.read("source.json") == b"{}" and remote.read("empty") == b""
    assert remote.list() == ["a.tar", "empty", "source.json"]
    assert remote.exists("a.tar") and not remote.exists("b.tar") and remote.size("a.tar") == SIZE
    assert remote.span("a.tar", SIZE - 5, SIZE + 5) == DATA[-5:]
    assert re.search(r"[0-9a-f]{32}.*-100000", remote.version("a.tar"))
    with pytest.raises(NotThereError, match=rf"s3://{through}/d/b\.tar is not there"):
        remote.read("b.tar")
    with pytest.raises(NotThereError):
        store.folder("s3://nobucket").read("x")
    writer.pipe(f"{through}/d/a.tar", DATA[::-1])
    with pytest.raises(StorageError, match="changed while"):
        remote.span("a.tar", 0, 10)


@pytest.mark.slow
def test_a_bucket_out_of_reach_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    with FileServer({}, lambda ask: Deed(status=503)) as server:
        options = {"s3": {"endpoint_url": server.url, "key": "k", "secret": "geheim"}}
        with pytest.raises(StorageError, match=r"s3://b/d/a\.tar: .*tried 2 times.*out of reach") as caught:
            storage(tmp_path, options=options, attempts=2).folder("s3://b/d").read("a.tar")
        assert "geheim" not in str(caught.value)
        assert len(server.asks) == 2
