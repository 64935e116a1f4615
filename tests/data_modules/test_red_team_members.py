"""Crafted archives and crafted indexes: nothing is executed, followed or believed."""

from __future__ import annotations

import random
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestiary.schema import Sample
from data_modules.index import Entry
from data_modules.records import DamagedSampleError
from data_modules.shards import ShardSet, open_source, write_samples
from data_modules.ustar import BLOCK, header, member
from tests.data_modules.hostile import (
    Canary,
    blames,
    crafted_source,
    encoded,
    entries_of,
    epoch_of,
    good,
    pair,
    processor,
    record,
    spoilt_place,
    spoilt_source,
    tar_of,
)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


def _info(name: str, kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


CODE = (
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "npy",
    "npz",
    "py",
    "sh",
    "ten",
    "mp",
    "cbor",
    "svg",
    "eps",
    "json.gz",
    "mp4",
)


@pytest.mark.parametrize("style", ["bestiary", "caption", "llava"])
def test_members_that_could_carry_code_are_never_opened(
    tmp_path: Path, canary: Canary, caplog: pytest.LogCaptureFixture, style: str
) -> None:
    text = {
        "bestiary": ("json", record(images=["jpg"])),
        "caption": ("txt", b"A picture."),
        "llava": ("json", b'{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}'),
    }[style]
    members = []
    for key in CODE:
        name = key.replace(".", "-")
        members += [(f"{name}.{text[0]}", text[1]), (f"{name}.jpg", encoded()), (f"{name}.{key}", canary.pickled())]
        members += [(f"{name}-sound.{text[0]}", text[1]), (f"{name}-sound.jpg", encoded())]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.tar").write_bytes(tar_of(members))
    path = tmp_path / "set" / "part.tar" if style == "bestiary" else tmp_path / "set"
    seen = epoch_of(path, caplog, format=style, domain="natural")
    prefix = "" if style == "bestiary" else "part/"
    assert seen.keys == {f"{prefix}{key.replace('.', '-')}-sound" for key in CODE}
    assert seen.lines == (f"set/part.tar: {len(CODE)} structure",)
    for key in CODE:
        assert blames(seen, "part.tar", f"{prefix}{key.replace('.', '-')}", f".{key} is not on the list")
    canary.assert_untouched()


CRAFTED: dict[str, Any] = {
    "a link": _info("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": _info("evil.jpg", tarfile.LNKTYPE, "k0.jpg"),
    "a device": _info("evil.jpg", tarfile.CHRTYPE),
    "a device ": _info("evil.jpg", tarfile.BLKTYPE),
    "a pipe": _info("evil.jpg", tarfile.FIFOTYPE),
    "type b'V'": _info("evil.jpg", b"V"),
    "leads out": ("../../evil.jpg", encoded()),
    "leads out ": ("/tmp/evil.jpg", encoded()),
    "leads out  ": ("a/../../evil.jpg", encoded()),
    "no name may have": ("evil\n.jpg", encoded()),
    "no name may have ": ("evil\\..\\x.jpg", encoded()),
    "no name may have  ": ("evil\u202e.jpg", encoded()),
    "400": ("x" * 9000 + ".jpg", encoded()),
}


@pytest.mark.parametrize("what", CRAFTED, ids=str.strip)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_links_devices_and_paths_that_lead_out_are_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, form: int
) -> None:
    (tmp_path / "set").mkdir()
    whole = tar_of([*pair("k0"), CRAFTED[what], ("evil.txt", b"words"), *pair("k1")], format=form)
    (tmp_path / "set" / "part.tar").write_bytes(whole)
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/k0", "part/k1"} and seen.counted
    assert blames(seen, "part.tar", what.strip()), seen.warned
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


@pytest.mark.parametrize(
    "pax", [{"GNU.sparse.major": "1", "GNU.sparse.name": "k.jpg"}, {"size": "-5"}, {"size": "9" * 30}]
)
def test_pax_overrides_that_lie_are_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pax: dict[str, str]
) -> None:
    info = _info("evil.txt", tarfile.REGTYPE, size=5)
    info.pax_headers = pax
    (tmp_path / "set").mkdir()
    whole = tar_of([*pair("k0"), ("evil.jpg", encoded()), info, *pair("k1")], format=tarfile.PAX_FORMAT)
    (tmp_path / "set" / "part.tar").write_bytes(whole)
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/k0", "part/k1"} and seen.counted == 1 and blames(seen, "part.tar", "evil")


def test_pax_paths_that_lead_out_are_damage_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = _info("k5.jpg", tarfile.REGTYPE, size=5)
    info.pax_headers = {"path": "../../../outside.jpg", "linkpath": "/etc/passwd", "uname": "root"}
    (tmp_path / "set").mkdir()
    whole = tar_of([*pair("k0"), info, *pair("k1")], format=tarfile.PAX_FORMAT)
    (tmp_path / "set" / "part.tar").write_bytes(whole)
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/k0", "part/k1"} and blames(seen, "part.tar", "leads out of the archive")


def test_an_old_sparse_file_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = bytearray(header("evil.jpg", 512))
    head[156:157] = b"S"
    head[257:265] = b"ustar  \0"
    head[482] = 1  # more of the map follows
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    whole = tar_of(pair("k0"))[:-1024].rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + bytes(head) + bytes(1024) + tar_of(pair("k1"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.tar").write_bytes(whole)
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/k0", "part/k1"} and seen.counted and blames(seen, "part.tar")


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([*pair("a"), *pair("b"), *pair("a")], "side by side"),
        ([*pair("b"), ("a.jpg", encoded()), *pair("a")], "is there twice"),
        ([*pair("b"), ("a.jpg", encoded()), ("a.png", encoded("PNG")), ("a.txt", b"x")], "means one"),
        ([*pair("b"), ("a.txt", b"no picture")], "its image is missing"),
        ([*pair("b"), ("a.jpg", encoded())], ".txt or .json is missing"),
        ([*pair("b"), ("a.jpg", encoded()), ("a.txt", b" \n")], "the caption is empty"),
        ([*pair("b"), ("a.jpg", encoded()), ("a.txt", b"caf\xe9")], "UnicodeDecodeError"),
        ([*pair("b"), ("a.jpg", encoded("GIF")), ("a.txt", b"x")], "no JPEG, PNG or WebP"),
    ],
)
def test_missing_and_doubled_members_are_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, members: list[Any], what: str
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.tar").write_bytes(tar_of(members))
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert "part/b" in seen.keys and seen.counted == 1
    assert blames(seen, "part.tar", "part/a", what), seen.warned


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda head: head.replace(b"good-001.json", b"../d-001.json"), "is not <key>.<extension>"),
        (lambda head: head.replace(b"good-001.json", b"/ood-001.json"), "is not <key>.<extension>"),
        (lambda head: head.replace(b"good-001.json", b"good-001.pyd\0"), "not what was written"),
        (lambda head: head.replace(b"good-001.json", b"good-009.json"), "not one sample's members"),
        (lambda head: head[:156] + b"2" + b"/etc/passwd" + head[168:], "plain files only"),
        (lambda head: head[:156] + b"x" + head[157:], "plain files only"),
        (lambda head: head[:124] + b"77777777777\0" + head[136:], "announces"),
        (lambda head: head[:124] + b"\x80" + bytes(10) + b"\x09" + head[136:], "octal"),
        (lambda head: head[:345] + b"../../" + head[351:], "long-name prefix"),
        (lambda head: head[:257] + b"\0" * 5 + head[262:], "no tar header"),
    ],
)
def test_members_of_our_own_shards_are_held_to_the_same_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, what: str
) -> None:
    shards = write_samples(tmp_path / "set", [good(number) for number in range(4)], source="set")
    _, place = list(shards.places())[1]
    tar = bytearray((tmp_path / "set" / "shard-00000.tar").read_bytes())
    tar[place.offset : place.offset + BLOCK] = change(bytes(tar[place.offset : place.offset + BLOCK]))
    (tmp_path / "set" / "shard-00000.tar").write_bytes(tar)
    seen = epoch_of(tmp_path / "set", caplog)
    assert seen.keys == {"good-000", "good-002", "good-003"}
    assert blames(seen, "shard-00000.tar", "good-001", what), seen.warned


SPOILT = {
    "beyond the end": {"offset": 1 << 40},
    "negative as signed": {"offset": (1 << 64) - 512},
    "larger than the file": {"size": (1 << 32) - 1},
    "nothing": {"size": 0},
    "text beyond": {"text_at": (1 << 32) - 1},
    "text too large": {"text_size": (1 << 32) - 1},
    "text empty": {"text_size": 0},
    "image beyond": {"image_at": 1 << 31, "image_size": 1 << 31},
    "image of no kind": {"image": 200},
    "image of another kind": {"image": 4},
    "text of no kind": {"text": 255},
    "members": {"members": 65_535},
    "domain": {"domain": 65_535},
    "key": {"key_size": 255},
    "no key": {"key_size": 0},
    "foreign": {"flags": 3},
    "foreign, damaged": {"flags": 6, "members": 99},
    "foreign, not simple": {"flags": 2},
    "unknown flags": {"flags": 248},
    "overlap": {"offset": 0},
    "unaligned": {"offset": 7},
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_index_that_lies_with_hashes_that_fit_is_damage_or_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = spoilt_source(tmp_path / "set", [good(number) for number in range(4)], {"good-001": SPOILT[what]})
    try:
        seen = epoch_of(folder, caplog)
    except ValueError as error:  # refused as a whole, with a line
        assert "\n" not in str(error) and "set" in str(error)
        return
    assert seen.keys >= {"good-000", "good-002", "good-003"}
    assert seen.counted or len(seen.keys) <= 4
    assert all("\n" not in line for line in seen.warned)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in range(20)])
def test_random_records_with_hashes_that_fit_never_surprise(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shards = write_samples(tmp_path / "set", [good(number) for number in range(30)], source="set")
    tar = (tmp_path / "set" / "shard-00000.tar").read_bytes()
    entries = []
    for entry in entries_of(shards):
        made = spoilt_place(entry.place, rng)
        if rng.random() < 0.7:  # the attacker knows the checksum
            made = made._replace(
                crc32=zlib.crc32(tar[made.offset : made.offset + made.size][: made.text_at + made.text_size])
            )
        entries.append(Entry(entry.name, made, entry.sha256))
    spoilt = ShardSet(crafted_source(tmp_path / "set", tar, entries))
    reader = processor()
    for number in range(len(spoilt)):
        for read in (spoilt.__getitem__, spoilt.view):
            try:
                sample = read(number)
            except DamagedSampleError as error:
                assert "shard-00000.tar" in str(error)
                continue
            assert isinstance(sample, Sample)
            try:
                reader(sample)
            except ValueError as error:
                assert "\n" not in str(error)


@pytest.mark.slow
def test_hashes_of_an_index_are_compared(tmp_path: Path) -> None:
    shards = write_samples(tmp_path / "set", [good(number) for number in range(300)], source="set")
    index = tmp_path / "set" / "shard-00000.idx"
    whole = bytearray(index.read_bytes())
    rng = np.random.default_rng(0)
    originals = [shards[number] for number in range(300)]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[int(rng.integers(0, len(whole)))] ^= 1 << int(rng.integers(0, 8))
        index.write_bytes(flipped)
        try:
            spoilt = ShardSet(tmp_path / "set")
            outcomes = []
            for number in range(300):
                try:
                    outcomes.append(spoilt[number] == originals[number])
                except DamagedSampleError:
                    outcomes.append(None)
            assert False not in outcomes and outcomes.count(None) <= 128
        except ValueError as error:
            assert "shard-00000.idx" in str(error) and "write the source again" in str(error)


@pytest.mark.parametrize("suffix", [".idx", ".keys", ".tar"])
def test_files_of_the_wrong_size_are_named(tmp_path: Path, suffix: str) -> None:
    write_samples(tmp_path / "set", [good(number) for number in range(9)], source="set")
    path = tmp_path / "set" / f"shard-00000{suffix}"
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", b"\0" * len(whole), b"\xff" * len(whole)):
        path.write_bytes(data)
        try:
            shards = ShardSet(tmp_path / "set")
            for number in range(9):
                try:
                    shards.key(number)
                    shards[number]
                except DamagedSampleError as error:
                    assert "\n" not in str(error)
            shards.verify()
        except ValueError as error:
            assert f"shard-00000{suffix}" in str(error) and "\n" not in str(error)


@pytest.mark.slow
def test_a_tar_of_many_empty_files_is_walked_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    many = b"".join(member(f"k{number % 7}.txt", b"") for number in range(20_000))
    (tmp_path / "set" / "part.tar").write_bytes(many + tar_of(pair("last")))
    started = time.process_time()
    shards = open_source(tmp_path / "set", format="caption", domain="natural")
    assert shards[len(shards) - 1].key == "part/last"
    assert time.process_time() - started < 20
