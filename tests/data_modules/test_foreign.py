"""Somebody else's tars: whoever wrote them, complete samples are read and everything else is counted."""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from bestiary.schema import Sample, Turn
from data_modules.foreign_index import index_tar
from data_modules.foreign_tar import MappedArchive, Walk
from data_modules.index import DAMAGED
from data_modules.records import DamagedSampleError, Reason, to_members
from data_modules.shards import ShardSet, open_source
from data_modules.storage import Storage
from data_modules.ustar import END, header, member
from tests.data_modules.making import picture, sample

Member = tuple[str, bytes]


def captioned(number: int, *, key: str | None = None) -> list[Member]:
    key = key or f"{number:05d}"
    return [(f"{key}.png", picture(number)), (f"{key}.txt", f" a thing, {number}\n".encode())]


def llava(number: int, **changes: object) -> list[Member]:
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a thing {number}"}]
    record = {"id": number, "conversations": talk, **changes}
    return [(f"{number:05d}.json", json.dumps(record).encode()), (f"{number:05d}.png", picture(number))]


def many(count: int) -> list[Member]:
    return [made for number in range(count) for made in captioned(number)]


def tar_bytes(members: list[Member]) -> bytes:
    return b"".join(member(name, data) for name, data in members) + END


def write(path: Path, members: list[Member] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    return path


def read(path: Path | str, format: str = "caption", **options: str) -> ShardSet:
    return open_source(path, format=format, **{"name": "theirs", "domain": "natural", **options})  # type: ignore[arg-type]


def outcomes(shards: ShardSet) -> Iterator[tuple[str, str]]:
    """(key, "" or the reason and the problem) of every entry."""
    for number in range(len(shards)):
        try:
            yield shards.view(number).key, ""
        except DamagedSampleError as error:
            assert shards.shards[shards.locate(number)[0]].file in str(error)
            yield error.key, f"{error.reason.name}: {error.problem}"


def damage(path: Path, format: str = "caption") -> list[tuple[str, str]]:
    return [(key, problem) for key, problem in outcomes(read(path, format)) if problem]


def writers(folder: Path, members: list[Member]) -> Mapping[str, Path]:
    """The same members written by everybody."""
    webdataset = pytest.importorskip("webdataset")
    paths = {name: folder / name / "part-0.tar" for name in ("gnu", "pax", "tar", "webdataset")}
    for name, format in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        paths[name].parent.mkdir()
        with tarfile.open(paths[name], "w", format=format) as tar:
            for file, data in members:
                info = tarfile.TarInfo(file)
                info.size, info.mtime = len(data), 1700000000.25
                tar.addfile(info, io.BytesIO(data))
    loose = folder / "loose"
    for file, data in members:
        (loose / file).parent.mkdir(parents=True, exist_ok=True)
        (loose / file).write_bytes(data)
    paths["tar"].parent.mkdir()
    names = "".join(f"./{name}\n" for name, _ in members)
    subprocess.run(["tar", "-C", str(loose), "-cf", str(paths["tar"]), "-T", "-"], input=names.encode(), check=True)
    paths["webdataset"].parent.mkdir()
    with webdataset.TarWriter(str(paths["webdataset"])) as sink:
        for start in range(0, len(members), 2):
            key = members[start][0].rpartition(".")[0]
            sink.write({"__key__": key, **{n.rpartition(".")[2]: data for n, data in members[start : start + 2]}})
    return paths


def test_tars_of_every_writer_give_the_same_samples(tmp_path: Path) -> None:
    long = "folder/" + "x" * 150
    members = [*many(3), *captioned(3, key=long), *captioned(4, key="späte/größe")]
    for name, path in writers(tmp_path, members).items():
        shards = read(path.parent)
        assert [key for key, _ in outcomes(shards)] == [
            f"part-0/{key}" for key in ("00000", "00001", "00002", long, "späte/größe")
        ], name
        assert shards[1] == Sample(
            "part-0/00001",
            "theirs",
            "natural",
            (Turn("human", "<image>"), Turn("assistant", "a thing, 1")),
            (picture(1),),
        )
        assert shards[3].images == (picture(3),)
        assert shards.verify() == []
        assert pickle.loads(pickle.dumps(shards))[4] == shards[4]


def test_the_formats_mean_what_they_say(tmp_path: Path) -> None:
    shards = read(write(tmp_path / "talk.tar", [*llava(0), *llava(1)[:1], *llava(2, image="x.jpg")]), "llava")
    assert shards[0].turns == (Turn("human", "<image>\nwhat?"), Turn("assistant", "a thing 0"))
    assert shards[2].images == (picture(2),)
    with pytest.raises(DamagedSampleError, match="1 <image> tags, but no image") as caught:
        shards[1]
    assert caught.value.reason is Reason.RECORD
    both = [("a.json", b'{"caption": "of json"}'), ("a.cls", b"3"), ("a.png", picture(1))]
    assert read(write(tmp_path / "j.tar", both))[0].turns[1].text == "of json"
    assert read(write(tmp_path / "t.tar", [*both, ("a.txt", b"of txt")]))[0].turns[1].text == "of txt"


def test_our_own_records_are_read_without_our_index(tmp_path: Path) -> None:
    made = [sample("toys", number, domain=("natural", "ocr")[number % 2]) for number in range(6)]
    two = Sample("toys-two", "toys", "ocr", made[0].turns, (picture(1), picture(2)))
    members = [(f"{s.key}.{ext}", data) for s in (*made, two) for ext, data in to_members(s)]
    shards = open_source(write(tmp_path / "own.tar", members))
    assert list(shards) == [*made, two]
    assert shards.domains == ("natural", "ocr")
    assert read(tmp_path / "own.tar", "bestiary").domains == ("natural", "ocr")
    bad = [*members[:2], ("x.json", b"{}"), ("y.json", members[0][1]), ("y.txt", b"")]
    found = [problem for _, problem in outcomes(open_source(write(tmp_path / "bad.tar", bad)))]
    assert found[0] == ""
    assert "RECORD: " in found[1] and "missing required field" in found[1]
    assert "STRUCTURE: " in found[2] and "not on the list" in found[2]


def test_patterns_name_the_tars_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"p-{number}.tar", captioned(number))
    shards = read(f"{tmp_path}/p-{{1..3}}.tar")
    assert [shard.file for shard in shards.shards] == ["p-1.tar", "p-2.tar", "p-3.tar"]
    assert list(shards.keys()) == ["p-1/00001", "p-2/00002", "p-3/00003"]
    assert shards.index_hash != read(tmp_path).index_hash
    for location, message in (
        (f"{tmp_path}/p-{{1..9}}.tar", r"p-4\.tar does not exist"),
        (f"{tmp_path}/p-{{1..2}}.tgz", "unpack compressed"),
        (f"pipe:cat {tmp_path}/p-1.tar", "not an address"),
        (f"{tmp_path}/nothing", "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read(location)
    with pytest.raises(ValueError, match="choose from bestiary, caption, llava"):
        read(tmp_path, "captoin")
    with pytest.raises(ValueError, match="name no domain; give one"):
        read(tmp_path, domain="")
    (tmp_path / "p-9.tar").symlink_to(tmp_path / "p-1.tar")
    with pytest.raises(ValueError, match="is a link"):
        read(tmp_path)


def test_tars_that_could_be_our_own_unfinished_source_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "shard-00000.tar", [("a.json", b"{}")])
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "shard-00000.tar")) == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "is a link; only plain files"),
        (tarfile.LNKTYPE, "is a hard link"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a pipe"),
        (tarfile.GNUTYPE_SPARSE, "has type b'S'"),
        (b"Z", "has type b'Z'"),
    ],
)
def test_what_is_no_plain_file_damages_its_sample_alone(tmp_path: Path, kind: bytes, message: str) -> None:
    info = tarfile.TarInfo("00001.png")
    info.type, info.linkname = kind, "/etc/passwd"
    bad = info.tobuf(tarfile.USTAR_FORMAT)
    data = b"".join(member(*m) for m in captioned(0)) + bad + tar_bytes([captioned(1)[1], *captioned(2)])
    path = write(tmp_path / "x.tar", data)
    assert [key for key, _ in outcomes(read(path))] == ["x/00000", "x/00001", "x/00002"]
    [(key, problem)] = damage(path)
    assert key == "x/00001" and problem.startswith("STRUCTURE") and message in problem and "00001.png" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../00001.png", "leads out of the archive"),
        ("/etc/00001.png", "leads out of the archive"),
        ("a/../00001.png", "leads out of the archive"),
        ("a\\00001.png", "no name may have"),
        ("a\n00001.png", "no name may have"),
        ("a\t00001.png", "no name may have"),
        ("00001.pkl", "not on the list"),
        ("00001.pyd", "not on the list"),
        ("00001.pt", "not on the list"),
        ("00001.npy", "not on the list"),
        ("00001.mask.pth", "not on the list"),
        ("00001.txt", "there twice"),
    ],
)
def test_bad_names_and_unwanted_members_are_counted_damage(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path / "x.tar", [*captioned(0), *captioned(1), (name, b"x" * 700), *captioned(2)])
    found = damage(path)
    assert len(found) == 1 and message in found[0][1]
    assert len([key for key, problem in outcomes(read(path)) if not problem]) >= 2


def record(text: bytes) -> bytes:
    """One PAX record with its length in front."""
    return b"%d %s\n" % (len(text) + 4, text)


def pax(name: str, records: bytes, data: bytes = b"a thing") -> bytes:
    head = bytearray(header("PaxHeaders/x", len(records)))
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + records + bytes(-len(records) % 512) + member(name, data)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (record(b"path=../../etc/passwd"), "leads out of the archive"),
        (b"99999 path=a.txt\n", "PAX header is broken"),
        (b"-3 path=a.txt\n", "PAX header is broken"),
        (b"nonsense", "PAX header is broken"),
        (record(b"GNU.sparse.major=1"), "sparse file"),
        (b"12 size=-50\n", "holds the size"),
        (record(b"size=99999999999999999999"), "holds the size"),
        (record(b"size=999999999"), "more than the archive has"),
        (b"x" * (1 << 17), "more than 65536"),
    ],
)
def test_crafted_pax_headers_damage_their_sample_alone(tmp_path: Path, records: bytes, message: str) -> None:
    before = b"".join(member(*m) for m in [*captioned(0), captioned(1)[0]])
    path = write(tmp_path / "x.tar", before + pax("00001.txt", records) + tar_bytes(captioned(2)))
    found = dict(outcomes(read(path)))
    assert found["x/00000"] == found["x/00002"] == ""
    problems = [problem for problem in found.values() if problem]
    assert any(message in problem for problem in problems) and len(problems) <= 2


def test_files_of_a_sample_must_stand_side_by_side(tmp_path: Path) -> None:
    (a_image, a_text), (b_image, b_text) = captioned(0), captioned(1)
    found = damage(write(tmp_path / "x.tar", [a_image, b_image, a_text, b_text, *captioned(2)]))
    assert len(found) == 4
    assert ".txt or .json is missing" in found[0][1] and "side by side" in found[2][1]
    assert len({key for key, _ in found}) == 4
    two = damage(write(tmp_path / "y.tar", [*captioned(0), ("00000.jpg", picture(1))]))
    assert "format=caption means one" in two[0][1]


def test_directories_and_names_without_a_key_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("README", b"x"), ("._a.png", b"x"), ("__info.x__", b"x"), *captioned(1, key="folder/a")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert list(outcomes(read(tmp_path / "x.tar"))) == [("x/folder/a", "")]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1100, 1536, 1600, 2000])
def test_a_cut_tar_keeps_its_whole_samples_and_counts_the_rest_as_cut(tmp_path: Path, cut: int) -> None:
    whole = tar_bytes(many(3))
    path = write(tmp_path / "x.tar", whole[: 2 * (len(whole) - len(END)) // 3 + cut])
    found = list(outcomes(read(path)))
    assert [problem for _, problem in found[:2]] == ["", ""]
    assert len(found) == 3 and found[2][1].startswith("CUT"), found


def test_a_tar_cut_between_two_samples_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = tar_bytes(many(4))
    one = len(tar_bytes(many(1))) - len(END)
    assert len(read(write(tmp_path / "cut.tar", whole[: 2 * one]))) == 2
    assert "cut.tar has no end mark" in caplog.text
    caplog.clear()
    assert len(read(write(tmp_path / "whole.tar", whole))) == 4
    assert not caplog.records


def test_a_flipped_bit_in_a_header_costs_one_sample(tmp_path: Path) -> None:
    clean = tar_bytes(many(4))
    for at in range(0, len(clean) - len(END), 512):
        if clean[at + 257 : at + 262] != b"ustar":
            continue
        for place in (0, 3, 124, 148, 156, 257):
            data = bytearray(clean)
            data[at + place] ^= 4
            entries, _ = index_tar(MappedArchive(memoryview(data)), "x", "caption")
            damaged = [entry for entry in entries if entry.place.flags & DAMAGED]
            assert (len(entries), len(damaged)) == (4, 1), (at, place)
            assert damaged[0].place.members == Reason.STRUCTURE
    lost = bytearray(clean)
    lost[0:4] = b"zzzz"
    assert "no valid tar header at byte 0; lost up to byte 1024" in damage(write(tmp_path / "y.tar", bytes(lost)))[0][1]


def test_a_lost_file_that_a_sample_can_do_without_is_still_counted(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([*captioned(0), ("00000.cls", b"1"), *captioned(1)]))
    at = data.find(b"00000.cls")
    data[at] ^= 1
    assert damage(write(tmp_path / "x.tar", bytes(data)))[0][0] == f"x@{at}"
    assert len(read(tmp_path / "x.tar")) == 3


def test_zeroed_and_joined_archives_are_read_to_their_end(tmp_path: Path) -> None:
    first, second = tar_bytes(many(2)), tar_bytes([made for n in (5, 6) for made in captioned(n)])
    assert damage(write(tmp_path / "x.tar", first + bytes(9000 // 512 * 512) + second)) == []
    assert len(read(tmp_path / "x.tar")) == 4
    hole = bytearray(first)
    hole[1024:2048] = bytes(1024)
    assert [key for key, problem in outcomes(read(write(tmp_path / "y.tar", bytes(hole)))) if not problem] == [
        "y/00001"
    ]


def test_an_index_is_used_again_until_its_tar_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", many(2))
    first = read(path)
    index = tmp_path / ".bestiary" / "caption" / "x.idx"
    stamp = index.stat().st_mtime_ns
    assert read(path).index_hash == first.index_hash
    assert index.stat().st_mtime_ns == stamp
    write(path, many(3))
    with pytest.raises(ValueError, match="changed after it was indexed"):
        first[0]
    again = read(path)
    assert len(again) == 3 and again.index_hash != first.index_hash
    (index.parent / "x.json").write_bytes(b"{")
    for summary in index.parent.glob("summary-*"):
        summary.unlink()
    assert read(path).index_hash == again.index_hash
    assert not list(index.parent.glob("*.tmp"))


def test_a_folder_that_may_not_be_written_has_its_index_in_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "x.tar", many(2))
    (tmp_path / "data" / ".bestiary").write_bytes(b"in the way")
    shards = open_source(path, storage=Storage(tmp_path / "cache"), format="caption", domain="natural")
    assert len(shards) == 2
    assert list((tmp_path / "cache").rglob("x.idx"))


def test_many_may_index_the_same_tars_at_once(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"{number}.tar", captioned(number))
    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(lambda _: read(tmp_path).index_hash, range(8)))
    assert len(hashes) == 1


def test_pictures_need_a_known_start_and_texts_must_be_text(tmp_path: Path) -> None:
    members = [
        *captioned(0),
        ("1.jpg", picture(1)),  # a PNG in disguise, as other people's data has them
        ("1.txt", b"x"),
        ("2.png", b"GIF89a"),
        ("2.txt", b"x"),
        ("3.png", picture(3)),
        ("3.txt", b"\xff\xfe"),
        ("4.png", picture(4)),
        ("4.txt", b"  \n"),
        ("5.png", picture(4)),
        ("5.json", b'{"caption": NaN}'),
    ]
    found = [problem.partition(":")[0] for _, problem in outcomes(read(write(tmp_path / "x.tar", members)))]
    assert found == ["", "", "STRUCTURE", "RECORD", "RECORD", "RECORD"]


def test_no_bytes_whatever_make_the_walk_fail_or_turn_for_ever() -> None:
    rng = random.Random(5)
    clean = tar_bytes(many(4)) + pax("long.txt", b"18 path=other.txt\n") + END
    for _ in range(300):
        data = bytearray(clean)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))]
        spans = [(found.start, found.stop) for found in Walk(MappedArchive(memoryview(data)))]
        assert all(0 <= start < stop <= len(data) + 511 for start, stop in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
