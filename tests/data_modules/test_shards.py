"""Shards: what is written is what is read, by us and by webdataset, and nothing else is ever accepted."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import msgspec
import pytest

from bestiary.schema import Region, Sample, SampleError, Turn
from data_modules.index import BLOCK, RECORD, Entry, Shard, index_bytes, shard_facts
from data_modules.records import DamagedSampleError, Reason
from data_modules.shards import ShardSet, ShardWriter, open_source, read_source, write_samples
from data_modules.storage import Storage, StorageError
from data_modules.ustar import TarError, member, parse_members
from data_modules.writer import (
    ShardFile,
    finish_source,
    is_whole,
    prepare_folder,
    shard_path,
    write_atomically,
    write_shard,
)
from tests.data_modules.making import picture, sample, source


def write(folder: Path, count: int = 12) -> ShardSet:
    return source(folder, "toys", count)


def test_samples_come_back_equal_in_any_order(tmp_path: Path) -> None:
    shards = write(tmp_path / "toys")
    assert [shard.samples for shard in shards.shards] == [5, 5, 2]
    for number in (11, 0, 5, 4, 7):
        assert shards[number] == sample("toys", number)
    assert list(shards) == [sample("toys", number) for number in range(12)]
    assert list(shards.keys()) == [s.key for s in shards] == [shards.key(number) for number in range(12)]
    assert shards.verify() == []


def test_several_images_keep_their_order(tmp_path: Path) -> None:
    many = Sample("many", "toys", "natural", (Turn("human", "ä?"),), tuple(picture(n) for n in range(12)))
    assert write_samples(tmp_path / "s", [many], source="toys")[0] == many


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.index_hash == second.index_hash
    for path in sorted(first.folder.iterdir()):
        assert path.read_bytes() == (second.folder / path.name).read_bytes()


def test_plain_webdataset_and_tarfile_read_our_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = write(tmp_path / "toys")
    tars = [shards.where(number) for number in range(len(shards.shards))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [record["__key__"] for record in read] == list(shards.keys())
    for record, made in zip(read, shards, strict=True):
        assert {name for name in record if name[0] != "_"} == ({"json", "png"} if made.images else {"json"})
        assert record.get("png", b"") == b"".join(made.images)
        assert json.loads(record["json"])["turns"] == [{"role": t.role, "text": t.text} for t in made.turns]
    with tarfile.open(tars[0]) as tar:
        members = tar.getmembers()
    assert all(m.isreg() and m.mtime == 0 and not m.pax_headers for m in members)


def test_shards_written_apart_and_in_any_order_are_the_source_of_one_writer(tmp_path: Path) -> None:
    def domain(number: int) -> str:
        return "ocr" if 4 < number < 8 else "natural"

    made = [sample("toys", number, domain=domain(number)) for number in range(12)]
    whole = write_samples(tmp_path / "whole", made, source="toys", samples_per_shard=5)
    prepare_folder(tmp_path / "parts")
    facts = {}
    for number in (2, 0, 1):
        path = shard_path(tmp_path / "parts", number)
        facts[number] = write_shard(path, made[5 * number : 5 * number + 5], source="toys")
    kept = [msgspec.json.decode(msgspec.json.encode(facts[number]), type=Shard) for number in range(3)]
    assert all(is_whole(tmp_path / "parts", shard) for shard in kept)
    finish_source(tmp_path / "parts", kept, source="toys")
    assert open_source(tmp_path / "parts").domains == whole.domains == ("natural", "ocr")
    for path in sorted(whole.folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    (tmp_path / "parts" / "shard-00001.idx").write_bytes(b"")
    assert not is_whole(tmp_path / "parts", kept[1])
    prepare_folder(tmp_path / "parts", overwrite=True, keep=kept[:1])
    assert sorted(path.suffix for path in (tmp_path / "parts").iterdir()) == [".idx", ".keys", ".tar"]


def test_a_refused_sample_leaves_its_shard_as_it_was_and_equal_keys_are_refused(tmp_path: Path) -> None:
    with ShardFile(tmp_path / "a.tar", source="toys") as shard:
        shard.add(sample("toys", 0))
        size = shard.size
        with pytest.raises(SampleError):
            shard.add(replace(sample("toys", 1), turns=()))
        with pytest.raises(SampleError, match="unique"):
            shard.add(sample("toys", 0))
        assert (shard.size, len(shard)) == (size, 1)
        shard.add(sample("toys", 1))
    other = write_shard(tmp_path / "b.tar", [sample("toys", 2), sample("toys", 1)], source="toys")
    assert shard.facts is not None
    with pytest.raises(ValueError, match=r"key 'toys-00001' is in a\.tar and in b\.tar"):
        finish_source(tmp_path, [shard.facts, other], source="toys")
    with pytest.raises(ValueError, match="at least one"), ShardFile(tmp_path / "c.tar", source="toys"):
        pass
    assert sorted(path.name for path in tmp_path.glob("c.*")) == []


def test_an_open_source_can_be_pickled_and_keeps_few_shards_open(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path / "toys", 30).folder, max_open=2)
    assert [shards[number].key for number in range(30)] == list(shards.keys())
    assert len(shards._open) == 2
    assert pickle.loads(pickle.dumps(shards))[29] == shards[29]


def test_an_interrupted_writer_leaves_no_source(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="power"),
        ShardWriter(tmp_path, source="toys", samples_per_shard=2) as writer,
    ):
        for number in range(5):
            writer.write(sample("toys", number))
        raise RuntimeError("power cut")
    with pytest.raises(FileNotFoundError, match="not finished"):
        read_source(tmp_path)
    again = write_samples(tmp_path, [sample("toys", 0)], source="toys")
    assert len(again) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00000.idx",
        "shard-00000.keys",
        "shard-00000.tar",
        "source.json",
    ]


def test_a_finished_source_is_only_replaced_on_demand(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(tmp_path)
    assert len(write_samples(tmp_path, [sample("toys", 0)], source="toys", overwrite=True)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "key must match"),
        ({"key": "../a"}, "key must match"),
        ({"key": "x" * 200}, "key must match"),
        ({"source": "other"}, "does not belong"),
        ({"domain": ""}, "domain is empty"),
        ({"turns": ()}, "conversation is empty"),
        ({"turns": (Turn("system", "x"),)}, "neither human nor assistant"),  # type: ignore[arg-type]
        ({"images": (b"GIF89a",)}, "encode it as"),
        ({"images": ()}, "no image"),
        ({"meta": {"x": float("nan")}}, "not plain JSON"),
        ({"regions": (Region("point", (0.5, 1.5), 1),)}, r"must lie in \[0, 1\]"),
        ({"regions": (Region("point", (0.5, float("nan")), 1),)}, r"must lie in \[0, 1\]"),
        ({"regions": (Region("box", (0.5, 0.5, 0.5, 0.6), 1),)}, "x0 < x1"),
        ({"regions": (Region("box", (0.5, 0.5), 1),)}, "do not make a box"),
        ({"regions": (Region("stroke", (0.5, 0.5, 0.1), 1),)}, "do not make a stroke"),
        ({"regions": (Region("point", (0.5, 0.5), 0),)}, "whole number from 1"),
    ],
)
def test_the_writer_refuses_what_no_reader_accepts(tmp_path: Path, change: dict[str, object], message: str) -> None:
    good = sample("toys", 1)
    facts = {name: getattr(good, name) for name in Sample.__slots__}
    with pytest.raises(SampleError, match=message), ShardWriter(tmp_path, source="toys") as writer:
        writer.write(Sample(**{**facts, **change}))  # type: ignore[arg-type]
    with pytest.raises(SampleError, match="unique"), ShardWriter(tmp_path, source="toys") as writer:
        writer.write(good)
        writer.write(good)
    with pytest.raises(ValueError, match="at least one"), ShardWriter(tmp_path, source="toys"):
        pass


def test_damage_is_named_with_key_and_shard_and_stays_with_its_sample(tmp_path: Path) -> None:
    shards = write(tmp_path)
    tar = tmp_path / shards.shards[1].file
    data = bytearray(tar.read_bytes())
    place = data.find(b"what 6?")
    data[place] ^= 1
    cut = data.find(b"toys-00009.json")
    tar.write_bytes(data[: cut + 700])
    shards = ShardSet(tmp_path)
    for number, reason in ((6, Reason.RECORD), (9, Reason.CUT)):
        with pytest.raises(DamagedSampleError, match=rf"sample toys-0000{number}: .*shard-00001.tar") as caught:
            shards[number]
        assert caught.value.reason is reason
        assert pickle.loads(pickle.dumps(caught.value)).reason is reason
    assert [shards[number].key for number in (5, 7, 8, 10)]
    assert len(shards.verify()) == 2


def test_an_index_that_changed_later_is_damage_of_its_stretch_alone(tmp_path: Path) -> None:
    shards = source(tmp_path, "toys", BLOCK + 40, per_shard=1000)
    path = tmp_path / "shard-00000.idx"
    data = bytearray(path.read_bytes())
    data[3 * RECORD.size + 1] ^= 1
    path.write_bytes(data)
    again = ShardSet(tmp_path)
    for number in (3, 4, BLOCK - 1):
        with pytest.raises(DamagedSampleError, match=r"shard-00000\.tar: the index") as caught:
            again[number]
        assert caught.value.reason is Reason.STRUCTURE
    assert again[BLOCK] == shards[BLOCK]
    assert len(again.verify()) == BLOCK


@pytest.mark.parametrize(
    "lie", [{"image": 9}, {"text": 9}, {"flags": 2}, {"flags": 4, "members": 99}, {"flags": 255}, {"key_size": 255}]
)
def test_an_index_that_was_made_up_is_damage_and_no_crash(tmp_path: Path, lie: dict[str, int]) -> None:
    shards = write(tmp_path)
    places = [place for _, place in shards.places(0)]
    places[1] = places[1]._replace(**lie)
    entries = [Entry(key, place, bytes(32)) for key, place in zip(shards.keys(), places, strict=False)]
    index, keys = index_bytes(entries)
    (tmp_path / "shard-00000.idx").write_bytes(index)
    (tmp_path / "shard-00000.keys").write_bytes(keys)
    false = shard_facts("shard-00000.tar", shards.shards[0].bytes, ["natural"], entries, index, keys)
    finish_source(tmp_path, [false, *shards.shards[1:]], source="toys")
    made_up = ShardSet(tmp_path)
    try:
        assert made_up[1].turns == shards[1].turns
    except DamagedSampleError as error:
        assert "shard-00000.tar" in str(error)
    assert made_up[5] == shards[5]


def test_a_source_of_the_first_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "source.json"
    facts = json.loads(path.read_text())
    assert facts["format"] == "bestiary-shards-2"
    path.write_text(json.dumps({**facts, "format": "bestiary-shards-1", "shards": [{"file": "x"}]}))
    with pytest.raises(ValueError, match=r"source\.json .*'bestiary-shards-1'.*write the source again") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps({**facts, "index_hash": "0"}))
    with pytest.raises(ValueError, match="does not match its shards"):
        ShardSet(tmp_path)


def test_a_source_that_lost_or_changed_files_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path)
    index = tmp_path / "shard-00000.idx"
    good = index.read_bytes()
    index.write_bytes(bytes(len(good)))
    with pytest.raises(ValueError, match="not the index"):
        ShardSet(tmp_path)[0]
    index.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="samples need"):
        ShardSet(tmp_path)[0]
    index.write_bytes(good)
    facts = json.loads((tmp_path / "source.json").read_text())
    facts["shards"][0]["file"] = "../elsewhere.tar"
    (tmp_path / "source.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"plain \.tar file name"):
        ShardSet(tmp_path)
    (tmp_path / "source.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ShardSet(tmp_path)
    (tmp_path / "source.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        ShardSet(tmp_path)
    assert len(shards) == 12


def test_a_missing_shard_and_a_linked_shard_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    tar = tmp_path / "shard-00001.tar"
    moved = tar.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="missing"):
        ShardSet(tmp_path)
    tar.symlink_to(moved)
    with pytest.raises(ValueError, match="not a regular file"):
        ShardSet(tmp_path)[5]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.json", tarfile.SYMTYPE, "plain files only"),
        ("a.json", tarfile.LNKTYPE, "plain files only"),
        ("a.json", tarfile.CHRTYPE, "plain files only"),
        ("a.json", tarfile.DIRTYPE, "plain files only"),
        ("a.json", tarfile.XHDTYPE, "plain files only"),
        ("a.json", tarfile.GNUTYPE_LONGNAME, "plain files only"),
        ("a.json", tarfile.GNUTYPE_SPARSE, "plain files only"),
        ("../a.json", tarfile.REGTYPE, "not <key>.<extension>"),
        ("/etc/a.json", tarfile.REGTYPE, "not <key>.<extension>"),
        (".a.json", tarfile.REGTYPE, "not <key>.<extension>"),
        ("a", tarfile.REGTYPE, "not <key>.<extension>"),
    ],
)
def test_crafted_members_are_refused(name: str, kind: bytes, message: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    data = info.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(TarError, match=message):
        list(parse_members(memoryview(data), 0, len(data)))


def test_members_that_announce_more_than_they_have_are_refused() -> None:
    data = member("a.json", b"{}" * 400)
    with pytest.raises(TarError, match="announces 800 bytes"):
        list(parse_members(memoryview(data), 0, 1024))
    with pytest.raises(TarError, match="no tar header"):
        list(parse_members(memoryview(bytes(512)), 0, 512))
    parsed = list(parse_members(memoryview(data), 0, len(data)))
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        assert [(m.name, m.size, m.offset_data) for m in tar] == [("a.json", 800, parsed[0].start)]


def test_a_lot_whose_index_is_partly_damaged_gives_every_sound_sample(tmp_path: Path) -> None:
    written = source(tmp_path / "set", "toys", 2 * BLOCK, per_shard=2 * BLOCK)
    path = tmp_path / "set" / "shard-00000.idx"
    index = bytearray(path.read_bytes())
    index[(BLOCK + 2) * RECORD.size] ^= 0xFF
    memory = fsspec.filesystem("memory")
    for file in written.folder.iterdir():
        memory.pipe(f"/{tmp_path.name}/{file.name}", bytes(index) if file == path else file.read_bytes())
    shards = open_source(f"memory://{tmp_path.name}", storage=Storage(tmp_path / "cache"), lot=2 * BLOCK)
    assert [shards[number].key for number in (0, 2, 1)] == ["toys-00000", "toys-00002", "toys-00001"]
    with pytest.raises(DamagedSampleError, match="index of its stretch"):
        shards[BLOCK]


def test_an_index_of_another_source_stops_a_run_and_is_no_damage(tmp_path: Path) -> None:
    shards = source(tmp_path / "toys", "toys", 10)
    source(tmp_path / "others", "others", 10)
    (tmp_path / "toys" / "shard-00001.idx").write_bytes((tmp_path / "others" / "shard-00001.idx").read_bytes())
    with pytest.raises(StorageError, match=r"shard-00001\.idx is not the index that source.json names"):
        shards.view(5)


def test_what_cannot_be_put_under_its_name_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.tar" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"shard-00000\.tar"):
        write_shard(shard_path(tmp_path, 0), [sample("toys", 0)], source="toys")
    with pytest.raises(OSError, match=r"shard-00000\.tar"):
        write_atomically(tmp_path / "shard-00000.tar", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.tar"]
