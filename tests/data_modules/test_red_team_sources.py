"""Hostile addresses, source files, skip lists and configurations: refused before anything is opened or run."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_modules.index import Entry, Shard, index_bytes, index_hash, shard_facts
from data_modules.records import DamagedSampleError
from data_modules.rules import Rules
from data_modules.shards import ShardSet, open_source, write_samples
from data_modules.skiplist import read_skip_list
from data_modules.sources import StreamError, parse_sources
from data_modules.storage import Storage
from data_modules.stream import Stream
from tests.data_modules.hostile import (
    Canary,
    entries_of,
    epoch_of,
    good,
    local_storage,
    pair,
    processor,
    spoilt_place,
    tar_of,
)
from tests.data_modules.servers import Deed, FileServer

RULES = Rules(seed=1, num_lanes=1, max_tokens=400)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write_samples(tmp_path / "set", [good(number) for number in range(6)], source="set", samples_per_shard=3)
    return tmp_path / "set"


def _stream(sources: dict[str, Any], **more: Any) -> Stream:
    return Stream(sources, processor(), RULES, **more)


ADDRESSES = (
    "pipe:touch CANARY",
    "pipe:touch CANARY |",
    "PIPE:touch CANARY",
    "  pipe:touch CANARY",
    "pipe://touch CANARY",
    "gs://bucket/../pipe:touch CANARY",
    "|touch CANARY",
    "$(touch CANARY)",
    "`touch CANARY`",
    "x; touch CANARY #",
    "file:///dev/stdin",
    "file://host/share",
    "ftp://127.0.0.1/set",
    "ssh://127.0.0.1/set",
    "data:application/x-tar;base64,AAAA",
    "zip://part.tar::pipe:touch CANARY",
    "filecache::pipe:touch CANARY",
    "simplecache::http://127.0.0.1:1/set",
    "python://os.system",
    "git://repo",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/fd/0",
    "../../../../etc",
    "set\0name",
    "{" * 40,
    "part-{0..999999999}.tar",
    "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}.tar",
    "../{..,../..}/x.tar",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("style", ["bestiary", "caption"])
def test_addresses_are_opened_or_refused_never_run(
    tmp_path: Path, canary: Canary, address: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = address.replace("CANARY", str(canary.path))
    started = time.process_time()
    for split in (None, "train"):
        with pytest.raises(ValueError) as info:
            _stream(
                {"set": {"path": address, "format": style, "domain": "natural", "split": split}},
                storage=local_storage(tmp_path),
            )
        assert "\n" not in str(info.value) and "set" in str(info.value), info.value
    assert time.process_time() - started < 5
    canary.assert_untouched()


@pytest.mark.parametrize("split", ["../..", "/etc", "pipe:touch CANARY", "a\0b", "..", "~"])
def test_splits_do_not_lead_anywhere_else(tmp_path: Path, sound: Path, canary: Canary, split: str) -> None:
    with pytest.raises(ValueError, match="set"):
        _stream({"set": {"path": str(sound), "split": split.replace("CANARY", str(canary.path))}})
    canary.assert_untouched()


def test_a_redirect_to_another_host_is_not_followed(tmp_path: Path, sound: Path) -> None:
    files = {f"set/{path.name}": path.read_bytes() for path in sound.iterdir()}
    with FileServer(files) as secret:

        def redirect(ask: Any) -> Deed:
            return Deed(status=302, headers={"Location": f"http://localhost:{secret.port}{ask.path}"})

        with FileServer(files, redirect) as server:
            with pytest.raises(ValueError, match="redirects to another server") as info:
                _stream({"set": {"path": f"{server.url}/set"}}, storage=local_storage(tmp_path))
            assert "\n" not in str(info.value) and "'set'" in str(info.value)
        targets = (
            "file:///etc/passwd",
            f"pipe:touch {tmp_path}/dead",
            "gopher://127.0.0.1/",
            "//169.254.169.254/x",
            "",
        )
        for target in targets:
            away = Deed(status=302, headers={"Location": target})
            with (
                FileServer(files, lambda ask, away=away: away) as server,
                pytest.raises(ValueError, match="redirect"),
            ):
                _stream({"set": {"path": f"{server.url}/set"}}, storage=local_storage(tmp_path))
        assert not secret.asks
    assert not (tmp_path / "dead").exists()


def test_hostile_bytes_of_a_server_are_damage_like_any_other(
    tmp_path: Path, sound: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"set/{path.name}": path.read_bytes() for path in sound.iterdir()}
    tar = bytearray(files["set/shard-00001.tar"])
    tar[600:620] = b"\0" * 20
    with FileServer(files | {"set/shard-00001.tar": bytes(tar)}) as server:
        seen = epoch_of(f"{server.url}/set", caplog, storage=local_storage(tmp_path))
    assert len(seen.keys) == 5 and seen.lines == ("set/shard-00001.tar: 1 record",)


def _facts(sound: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sound / "source.json").read_bytes())
    return found


def _shard(sound: Path, **changes: Any) -> bytes:
    """source.json with changes in its first shard, and the hash that fits."""
    facts = _facts(sound)
    facts["shards"][0] |= changes
    with suppress(TypeError):  # refused before the hash matters
        facts["index_hash"] = index_hash([Shard(**shard) for shard in facts["shards"]])
    return json.dumps(facts).encode()


SHARD_CHANGES: list[dict[str, Any]] = [
    {"file": "../outside.tar"},
    {"file": "/etc/passwd.tar"},
    {"file": "pipe:touch CANARY.tar"},
    {"file": "a/b.tar"},
    {"file": "a\\b.tar"},
    {"file": "shard-00000.tar\0.tar"},
    {"file": "..tar"},
    {"file": ".tar"},
    {"file": "shard-00000.zip"},
    {"file": 7},
    {"samples": -1},
    {"samples": 0},
    {"samples": 4},
    {"samples": 1 << 62},
    {"samples": 1.5},
    {"samples": "3"},
    {"bytes": -1},
    {"index_sha256": "0" * 64},
    {"index_sha256": ["a"]},
    {"domains": "natural"},
    {"domains": [7]},
]


@pytest.mark.parametrize("changes", SHARD_CHANGES, ids=str)
def test_a_source_file_that_lies_is_refused_or_harmless(sound: Path, canary: Canary, changes: dict[str, Any]) -> None:
    if "CANARY" in str(changes):
        changes = {"file": f"pipe:touch {canary.path}.tar"}
    (sound / "source.json").write_bytes(_shard(sound, **changes))
    try:
        stream = _stream({"set": {"path": str(sound)}})
        for number in range(len(stream.plan.sources[0])):
            stream.plan.sources[0][number]
        assert "bytes" in changes  # the size of the tar is checked against what is there, sample by sample
    except ValueError as error:
        assert str(sound) in str(error) and "\n" not in str(error)
    canary.assert_untouched()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "bestiary-shards-2"}',
        b'{"format": "bestiary-shards-1", "shards": []}',
        b'{"format": 2}',
        b"\x80\x04\x95.",
    ],
    ids=range(10),
)
def test_a_broken_source_file_is_named(sound: Path, data: bytes) -> None:
    (sound / "source.json").write_bytes(data)
    with pytest.raises(StreamError, match=r"source 'set': .*source\.json") as info:
        _stream({"set": {"path": str(sound)}})
    assert "\n" not in str(info.value) and len(str(info.value)) < 600


def test_a_source_file_of_many_shards_that_are_not_there_is_refused_in_seconds(sound: Path) -> None:
    facts = _facts(sound)
    facts["shards"] = [facts["shards"][0] | {"file": f"shard-{number:07d}.tar"} for number in range(20_000)]
    (sound / "source.json").write_text(json.dumps(facts))
    started = time.process_time()
    with pytest.raises(ValueError, match="write the source again"):
        ShardSet(sound)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in range(4)])
def test_flipped_bytes_of_a_source_file_never_surprise(sound: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = (sound / "source.json").read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (sound / "source.json").write_bytes(data)
        try:
            shards = ShardSet(sound)
            assert [shards[number].key for number in range(6)] == [f"good-{number:03d}" for number in range(6)]
        except ValueError as error:
            assert "\n" not in str(error) and str(sound) in str(error)


@pytest.mark.slow
def test_an_index_that_comes_with_foreign_tars_is_not_believed(
    tmp_path: Path, canary: Canary, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "part.tar").write_bytes(tar_of([*pair("a"), *pair("b"), *pair("c")]))
    assert epoch_of(folder, caplog, format="caption", domain="natural").keys == {"part/a", "part/b", "part/c"}
    outside = b'{"tars": [{"shard": {"file": "../../x.tar"}}]}'
    hostile = [b"", b"{", b"\xff" * 300, canary.pickled(), b"[" * 50_000, outside]
    for path in sorted((folder / ".bestiary").rglob("*")):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        for data in (*hostile, whole[:-3], whole + b"x", whole[::-1]):
            path.write_bytes(data)
            try:
                found = open_source(folder, format="caption", domain="natural")
                assert [found[number].key for number in range(len(found))] == ["part/a", "part/b", "part/c"]
            except ValueError as error:
                assert "\n" not in str(error) and str(folder) in str(error), error
            path.write_bytes(whole)
    canary.assert_untouched()


def _reindexed(folder: Path, entries: Sequence[Entry], **changes: Any) -> None:
    """Write the index of part.tar anew, as an attacker would who ships it with the tars: every hash fits."""
    index = folder / ".bestiary" / "caption"
    for path in index.glob("summary-*"):
        path.unlink()
    idx, keys = index_bytes(entries)
    facts = json.loads((index / "part.json").read_bytes())
    size = (folder / "part.tar").stat().st_size
    facts["shard"] = asdict(shard_facts("part.tar", size, ["natural"], entries, idx, keys)) | changes
    (index / "part.idx").write_bytes(idx)
    (index / "part.keys").write_bytes(keys)
    (index / "part.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in range(8)])
def test_an_index_of_foreign_tars_with_hashes_that_fit_never_surprises(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "part.tar").write_bytes(tar_of([each for number in range(20) for each in pair(f"k{number}")]))
    shards = open_source(folder, format="caption", domain="natural")
    sound = entries_of(shards)
    for _ in range(10):
        _reindexed(folder, [replace(entry, place=spoilt_place(entry.place, rng)) for entry in sound])
        try:
            found = open_source(folder, format="caption", domain="natural")
            for number in range(len(found)):
                with suppress(DamagedSampleError):
                    processor().lengths(found[number])
        except ValueError as error:
            assert "\n" not in str(error), error


@pytest.mark.parametrize("file", ["../outside.tar", "/etc/passwd", "a/../../x.tar", "", "part.tar\0"])
def test_an_index_of_foreign_tars_cannot_name_other_files(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    (tmp_path / "outside.tar").write_bytes(tar_of(pair("secret")))
    (folder / "part.tar").write_bytes(tar_of(pair("a")))
    _reindexed(folder, entries_of(open_source(folder, format="caption", domain="natural")), file=file)
    try:
        found = open_source(folder, format="caption", domain="natural")
        assert [sample.key for sample in found] == ["part/a"] and found.shards[0].file == "part.tar"
    except ValueError as error:
        assert "\n" not in str(error) and "secret" not in str(error)


SKIP_LISTS = {
    "no tab": b"set good-001\n",
    "unknown source": b"../../etc\tgood-001\n",
    "unknown key": b"set\t../../etc/passwd\n",
    "latin-1": b"set\tcaf\xe9\n",
    "utf-16": "set\tgood-001\n".encode("utf-16"),
    "bad json": b'{"source": "set", "key": \n',
    "json list": b'{"source": ["set"], "key": {"a": 1}}\n',
    "deep json": b'{"source": ' + b"[" * 100_000 + b"\n",
    "json number": b'{"source": 1, "key": 2}\n',
    "nul": b"set\tgood\0-001\n",
    "long": b"set\t" + b"x" * 1_000_000 + b"\n",
}


@pytest.mark.parametrize("what", SKIP_LISTS)
def test_hostile_skip_lists_are_refused_with_their_line(tmp_path: Path, sound: Path, what: str) -> None:
    path = tmp_path / "skip.txt"
    path.write_bytes(SKIP_LISTS[what])
    with pytest.raises(StreamError, match="skip list") as info:
        _stream({"set": {"path": str(sound)}}, skip=path)
    assert "\n" not in str(info.value) and len(str(info.value)) < 1500


@pytest.mark.parametrize("name", ["pipe:touch CANARY", "/dev/null/x", ".", "no\0name", "http://127.0.0.1:1/skip"])
def test_the_path_of_a_skip_list_is_a_path(tmp_path: Path, canary: Canary, name: str) -> None:
    with pytest.raises(StreamError, match="skip list"):
        read_skip_list(name.replace("CANARY", str(canary.path)))
    canary.assert_untouched()


def test_configurations_carry_values_never_code(tmp_path: Path, canary: Canary) -> None:
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        path = tmp_path / "mix.yaml"
        path.write_text(f"sources:\n  set:\n    path: {tag} ['{canary.command}']\n")
        with pytest.raises(Exception, match="python"):  # yaml's own error
            OmegaConf.load(path)
    for value in ([canary.command], {"_target_": "os.system", "command": canary.command}, 7, True, b"x"):
        with pytest.raises(StreamError, match=r"set"):
            _stream({"set": {"path": value}})
    numbers = ("weight", "count", "repeat", "max_epochs", "loss_weight", "chunk", "format", "schedule")
    wrong = ("pipe:x", float("nan"), float("inf"), -1, {"_target_": "os.system"}, [[1]], "9" * 400)
    for key in numbers:
        for value in wrong:
            with pytest.raises(StreamError, match=rf"data\.sources\.set\.{key}"):
                parse_sources({"set": {"path": "x", key: value}})
    canary.assert_untouched()


def test_names_of_sources_are_names(tmp_path: Path, sound: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for name in ("../../x", "a\tb", "", "a\nb"):
            try:
                stream = _stream({name: {"path": str(sound)}}, storage=Storage(tmp_path / "cache", 1 << 20))
                assert stream.plan.names == (name,)
            except StreamError as error:
                assert "\n" not in str(error)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", "canary")) == ["set"]
