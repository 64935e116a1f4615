"""Storage without a network: addresses, local folders, and the bounded cache."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.storage import (
    NotThereError,
    Storage,
    StorageError,
    expand_braces,
    is_remote,
    printable,
    split_pattern,
)
from data_modules.storage.patience import LONGEST_WAIT_S, HiccupError, Patience, retry_after_s
from data_modules.storage.urls import check_redirect, identity, joined, local_path, scrubbed

# addresses


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{09..11}", ["09", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{,y}", ["x", "xy"]),
    ],
)
def test_braces_expand_in_order_as_they_are_written(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..100000}", "more than 100000"),
        ("{0..999}{0..999}", "more than 100000"),
        ("{0..999999999999999999}", "more than 100000"),
        ("{3..1}", "counts down"),
        ("{a..c}", "neither"),
        ("{a}", "neither"),
        ("{0..3..2}", "neither"),
        ("{a,{b,c}}", "do not match"),
        ("a{0..3", "do not match"),
        ("a}", "do not match"),
    ],
)
def test_a_pattern_that_names_too_much_or_nothing_sensible_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        expand_braces(pattern)
    assert len(expand_braces("{0..99999}")) == 100_000


def test_a_pattern_is_split_into_a_folder_and_names_and_keeps_its_query() -> None:
    assert split_pattern("https://h/d/s-{0..1}.tar?sig=a/b") == ("https://h/d/?sig=a/b", ["s-0.tar", "s-1.tar"])
    assert split_pattern("/data/{a,b}/s.tar") == ("/data/", ["a/s.tar", "b/s.tar"])
    assert split_pattern("s.tar") == ("./", ["s.tar"])
    assert split_pattern("/data/a%20b.tar") == ("/data/", ["a%20b.tar"])
    with pytest.raises(StorageError, match="inside a folder"):
        split_pattern("https://h/d/%2E%2E%2Fc.tar")
    with pytest.raises(StorageError, match="inside a folder"):
        split_pattern("https://h/d/{a,b}/../c.tar")
    with pytest.raises(StorageError, match="twice"):
        split_pattern("https://h/d/{a,a}.tar")


@pytest.mark.parametrize("written", ["a b", "a%20b"])
def test_names_on_a_web_server_are_encoded_once_however_they_are_written(written: str) -> None:
    folder, names = split_pattern(f"HTTP://h/c%20d/{{{written},100%}}.tar")
    assert [joined(folder, name).partition("//")[2] for name in names] == ["h/c%20d/a%20b.tar", "h/c%20d/100%25.tar"]


@pytest.mark.parametrize(
    "location",
    [
        "pipe:curl http://h/x",
        "pipe://cat /etc/passwd",
        "ssh://h/x",
        "ftp://h/x",
        "javascript:x",
        "simplecache::s3://b/x",
        "http:relative",
        "github://org:repo@main/",
        "data:text/plain,x",
        "ZIP://a.tar",
    ],
)
def test_unknown_schemes_are_refused_in_one_line_that_names_the_allowed(location: str) -> None:
    with pytest.raises(StorageError, match=r"allowed are http://, https://, s3://.*file://") as caught:
        Storage().folder(location)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["s3://b/x::http://h", "https://h/a.zip::zip://x", "http://u@[::1]/::x"])
def test_chained_addresses_are_refused(location: str) -> None:
    with pytest.raises(StorageError, match="chained"):
        Storage().folder(location)
    assert is_remote("http://u:p@[::1]:80/x") and not is_remote("./a::b") and not is_remote("C:/x")


def test_file_urls_are_local_paths_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"1")
    folder = Storage().folder(f"file://{tmp_path}/a%20b")
    assert folder.is_local and bytes(folder.read("x")) == b"1"
    with pytest.raises(StorageError, match="this machine only"):
        local_path("file://elsewhere/x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a\\b", "a\0b", "a\nb"])
def test_names_that_could_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    for folder in (Storage().folder(tmp_path), Storage(tmp_path).folder("http://127.0.0.1:9/d")):
        for ask in (folder.read, folder.size, folder.exists, folder.version, folder.map):
            with pytest.raises(StorageError, match="not a name inside"):
                ask(name)
        with pytest.raises(StorageError, match="not a name inside"):
            folder.span(name, 0, 1)


def test_secrets_of_an_address_are_neither_printed_nor_part_of_its_identity() -> None:
    url = "https://user:secret@h/d/?X-Amz-Signature=secret&file=3&sig=secret"
    assert "secret" not in printable(url) + identity(url) + repr(Storage().folder(url)) + Storage().folder(url).location
    assert identity(url) == "https://h/d/?file=3" == identity("https://h/d/?file=3&Expires=1")
    assert joined(url, "a b/c?.tar") == url.replace("/?", "/a%20b/c%3F.tar?")
    assert "secret" not in scrubbed("cannot reach 'https://user:secret@h/x?sig=secret'\nnow")
    with pytest.raises(StorageError, match=r"\*\*\*@bucket.*environment") as caught:
        Storage().folder("s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "is_allowed"),
    [
        ("http://h/a", "http://h/b", True),
        ("http://h/a", "https://h/b", True),
        ("http://H/a", "http://h:80/b", True),
        ("https://h/a", "http://h/b", False),
        ("http://h/a", "http://h:8080/b", False),
        ("http://h/a", "http://g/b", False),
        ("http://h/a", "http://h@g/b", False),
        ("http://h/a", "file:///etc/passwd", False),
        ("http://h/a", "https://h:8443/b", False),
    ],
)
def test_redirects_stay_on_their_server(before: str, after: str, is_allowed: bool) -> None:
    if is_allowed:
        assert check_redirect(before, after) == after
        return
    with pytest.raises(StorageError, match="another server"):
        check_redirect(before, after)


# local folders


def test_a_local_folder_reads_maps_and_lists(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "sub" / "b").write_bytes(b"")
    folder = pickle.loads(pickle.dumps(Storage())).folder(tmp_path)
    assert folder.is_local and folder.location == str(tmp_path)
    assert folder.read("a.tar") == folder.map("a.tar") == data
    assert folder.span("a.tar", 10, 20) == data[10:20]
    assert folder.span("a.tar", len(data) - 3, len(data) + 99) == data[-3:]
    assert folder.span("a.tar", len(data) + 5, len(data) + 9) == folder.read("sub/b") == b""
    assert folder.size("a.tar") == len(data) and folder.size("sub/b") == 0
    assert folder.exists("a.tar") and not folder.exists("sub") and not folder.exists("x")
    assert folder.list() == ["a.tar"]
    assert pickle.loads(pickle.dumps(folder)).span("a.tar", 1, 2) == data[1:2]
    before = folder.version("a.tar")
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    assert folder.version("a.tar") != before
    with pytest.raises(StorageError, match=r"no range 5\.\.3"):
        folder.span("a.tar", 5, 3)


def test_missing_files_links_and_devices_are_refused_by_name(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    (inside / "link").symlink_to(outside / "x")
    (inside / "sub").symlink_to(outside)
    os.mkfifo(inside / "fifo")
    folder = Storage().folder(inside)
    for name in ("link", "fifo", "sub"):
        with pytest.raises(StorageError, match=f"{name} is not a regular file"):
            folder.read(name)
        assert not folder.exists(name) and name not in folder.list()
    with pytest.raises(StorageError, match=r"leaves .* through a link"):
        folder.read("sub/x")
    with pytest.raises(NotThereError, match="x does not exist"):
        folder.size("x")
    with pytest.raises(NotThereError, match="does not exist"):
        Storage().folder(tmp_path / "none").list()


# patience


def test_trying_again_ends_with_what_happened_and_how_often() -> None:
    tries: list[int] = []

    def attempt() -> None:
        tries.append(1)
        raise HiccupError("the line is dead")

    with pytest.raises(StorageError, match=r"http://h/x bytes 0-9: the line is dead; tried 3 times.*resume"):
        Patience(attempts=3, backoff_s=0.0).persist("http://h/x bytes 0-9", attempt, lambda: None)
    assert len(tries) == 3


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.integers(1, 12), st.floats(0, 1e6))
def test_waits_double_differ_by_name_and_are_bounded(what: str, tried: int, asked_s: float) -> None:
    patience = Patience()
    wait_s = patience.wait_s(what, tried, asked_s)
    assert wait_s == patience.wait_s(what, tried, asked_s) <= LONGEST_WAIT_S
    assert wait_s >= min(0.25 * 2 ** (tried - 1), LONGEST_WAIT_S)
    assert wait_s >= min(asked_s, LONGEST_WAIT_S)
    assert patience.wait_s("a", tried) != patience.wait_s("b", tried) or tried > 7


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert retry_after_s("7") == 7 and retry_after_s(None) == retry_after_s("soon") == retry_after_s("-3") == 0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT") > LONGEST_WAIT_S


def test_a_local_path_that_cannot_be_looked_at_is_one_line_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    folder = Storage(tmp_path).folder(tmp_path / "file")
    assert not folder.exists("a")
    with pytest.raises(NotThereError, match="file/a does not exist"):
        folder.map("a")
    with pytest.raises(StorageError, match=r"cannot be read \(File name too long\); check the path"):
        Storage(tmp_path).folder(tmp_path).map("x" * 300)


def test_a_redirect_to_no_address_and_a_senseless_wait_are_no_crash() -> None:
    with pytest.raises(StorageError, match="which is no address"):
        check_redirect("http://host/a", "http://host:x/b")
    assert retry_after_s("\u00b2") == 0.0
