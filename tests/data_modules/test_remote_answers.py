"""Web servers: addresses that are none, answers that make no sense, tries that bring something, held-out sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_modules.heldout import Samples
from data_modules.storage import Storage, StorageError
from data_modules.storage.patience import retry_after_s
from tests.data_modules.making import source
from tests.data_modules.servers import Deed, FileServer

pytest.importorskip("aiohttp")

DATA = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def big() -> Iterator[FileServer]:
    with FileServer({"d/a.tar": DATA}) as server:
        yield server


def storage(tmp_path: Path, **changes: Any) -> Storage:
    return Storage(**{"cache_root": tmp_path / "cache", "cache_bytes": 10**8, "backoff_s": 0.001, **changes})


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://127.0.0.1:port/x", "http://127.0.0.1:port/x/a.tar"),
        ("http://127.0.0.1:99999/x", "http://127.0.0.1:99999/x/a.tar"),
        ("http://a..b/x?sig=SECRET", "http://a..b/x/a.tar?***"),
        ("http://:80/x", "http://:80/x/a.tar"),
        ("https://u:SEC/RET@127.0.0.1/x", "https://***@127.0.0.1/x/a.tar"),
        ("https://u:p/SECRET@127.0.0.1/x?sig=SECRET", "https://***@127.0.0.1/x/a.tar"),
        ("https://u:p?SECRET@127.0.0.1/x", "https://***@***"),
    ],
)
def test_an_address_that_is_none_is_named_without_its_password(tmp_path: Path, address: str, shown: str) -> None:
    with pytest.raises(StorageError) as caught:
        storage(tmp_path).folder(address).size("a.tar")
    text = str(caught.value)
    assert text.startswith(f"{shown} is no address of a web server; write it as https://host:port/folder")
    assert not {"SEC", "RET"} & {text[place : place + 3] for place in range(len(text))} and "\n" not in text


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        (
            Deed(status=302, headers={"Location": "http://["}),
            r"a\.tar redirects to http://\[, which is no address",
        ),
        (Deed(status=302, headers={"Location": "http://127.0.0.1:x/"}), "which is no address"),
        (Deed(headers={"Content-Range": f"bytes 0-0/{'9' * 5000}"}), "without a usable Content-Range; tried 1 times"),
    ],
)
def test_senseless_answers_are_errors_of_the_store_that_name_the_file(
    tmp_path: Path, big: FileServer, deed: Deed, problem: str
) -> None:
    big.misbehave = lambda ask: deed
    with pytest.raises(StorageError, match=problem) as caught:
        storage(tmp_path, attempts=1).folder(f"{big.url}/d").size("a.tar")
    assert str(caught.value).startswith(f"{big.url}/d/a.tar") and len(str(caught.value)) < 400


def test_a_senseless_wait_is_none() -> None:
    assert retry_after_s("Mon, 01 Jan 2020 00:00:00 +9999999999999") == 0.0


def test_tries_that_bring_much_are_not_counted(tmp_path: Path, big: FileServer) -> None:
    big.misbehave = lambda ask: Deed(drop_after=0.3) if ask.number in (1, 2) else None
    store = storage(tmp_path, attempts=1)
    remote = store.folder(f"{big.url}/d")
    assert remote.span("a.tar", 0, len(DATA)) == DATA
    assert len(big.asks) == 4 and store.counters.retries == 2
    big.misbehave = lambda ask: Deed(drop_after=0.3)
    with pytest.raises(StorageError, match="tried 1 times"):
        remote.span("a.tar", 1, len(DATA))
    assert 5 < len(big.asks) < 12, "30 % of what is left is little soon"


def test_held_out_sources_behind_a_url_use_the_cache_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = source(tmp_path / "toys", "toys", 9)
    with FileServer(tmp_path) as server:
        samples = Samples({"toys": {"path": f"{server.url}/toys"}}, cache_root=tmp_path / "cache", cache_gb=0.5)
        assert list(samples.of(["toys"])) == list(local)
    assert list((tmp_path / "cache" / "spans").glob("*.span")) and not (tmp_path / "home").exists()
