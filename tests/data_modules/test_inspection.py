"""Checking and counting sources: every damage is one line, every number is what was written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import Lengths, Region, Sample, SampleError, SampleTooLongError, Turn
from data_modules.index import RECORD
from data_modules.inspection.check import check_source, image_problem
from data_modules.inspection.choosing import choose
from data_modules.inspection.plots import draw
from data_modules.inspection.stats import Tally, gather, merged, refusals, spread, table
from data_modules.shards import ShardSet, open_source, read_source, write_samples
from data_modules.ustar import END, member
from tests.data_modules import making


def words(sample: Sample) -> Lengths:
    """A measure: one token a word."""
    counts = [len(turn.text.split()) for turn in sample.turns]
    return Lengths(tokens=sum(counts), views=len(sample.images), targets=counts[-1])


def picky(sample: Sample) -> Lengths:
    raise SampleError(sample.key, "too strange")


def encoded(width: int, height: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> ShardSet:
    return making.source(tmp_path / "toys", "toys", 23, per_shard=5, bad=[7])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_whole_source_has_no_problem_until_its_pictures_are_decoded(source: ShardSet) -> None:
    assert list(check_source(source)) == []
    [line] = check_source(source, decode=True)
    assert line.startswith(f"{source.where(1)}: sample toys-00007: image 0 cannot be decoded")


def test_each_damage_is_one_line_that_names_shard_and_sample(source: ShardSet) -> None:
    folder, opened = source.folder, read_source(source.folder)
    first, second = folder / "shard-00000.tar", folder / "shard-00001.tar"
    flip(first, 600)
    second.write_bytes(second.read_bytes()[:-2048])
    flip(folder / "shard-00002.idx", 3 * RECORD.size)
    flip(folder / "shard-00003.keys", -1)
    (folder / "shard-00004.tar").unlink()
    lines = list(check_source(opened))
    assert all("\n" not in line for line in lines)
    by_shard = [[line for line in lines if f"shard-0000{number}." in line] for number in range(5)]
    assert sum(map(len, by_shard)) == len(lines) and all(by_shard)
    assert "toys-00000" in by_shard[0][0] and len(by_shard[0]) == 1
    assert any("has " in line and "bytes" in line for line in by_shard[1])
    assert "keys" in by_shard[3][0]


def test_some_tars_of_our_own_are_compared_with_what_was_written(source: ShardSet) -> None:
    folder = source.folder
    part = open_source(f"{folder}/shard-{{00003,00002}}.tar")
    assert [sample.key for sample in part] == [source[number].key for number in (*range(15, 20), *range(10, 15))]
    assert part.index_hash != source.index_hash and not (folder / ".bestiary").exists()
    flip(folder / "shard-00002.tar", 600)
    [line] = check_source(open_source(folder / "shard-00002.tar"))
    assert "differs from what was written" in line
    with pytest.raises(ValueError, match=r"shard-00009\.tar is no shard of its source\.json, which has 5"):
        open_source(folder / "shard-00009.tar")
    with pytest.raises(ValueError, match="written by us: leave out format='caption'"):
        open_source(folder / "shard-00002.tar", format="caption", domain="natural")


def test_tars_of_others_that_mean_nothing_in_a_format_are_problems(tmp_path: Path) -> None:
    talk = json.dumps({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}).encode()
    (tmp_path / "part.tar").write_bytes(member("a.json", talk) + member("a.png", encoded(4, 4, "PNG")) + END)
    [line] = check_source(open_source(tmp_path, format="caption", domain="natural"))
    assert line.startswith(f"{tmp_path}/part.tar: sample part/a: member .json is no caption")
    assert line.count("part.tar") == 1
    assert not list(check_source(open_source(tmp_path, format="llava", domain="natural")))


def test_too_long_samples_count_with_the_positions_they_would_need(source: ShardSet) -> None:
    def short(sample: Sample) -> Lengths:
        if int(sample.key[-1]) % 2:
            raise SampleTooLongError(sample.key, "is too long", 900, 384)
        return Lengths(tokens=7, views=0, targets=1)

    tally = gather(source, measure=short)
    assert sorted(set(tally.columns["tokens"])) == [7, 900] and len(tally.columns["tokens"]) == len(source)
    assert tally.refused == list(tally.columns["tokens"]).count(900) and "is too long" in tally.first_refusal


@pytest.mark.slow
def test_processes_find_what_one_finds_in_the_same_order(source: ShardSet) -> None:
    for number in range(5):
        flip(source.folder / f"shard-0000{number}.tar", 600)
    again = read_source(source.folder)
    alone = list(check_source(again, decode=True))
    assert len(alone) >= 5 and list(check_source(again, decode=True, workers=2)) == alone
    assert gather(again, workers=2).summary() == gather(again).summary()


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", encoded(9, 9)[:-300], encoded(40, 40, "PNG")[:60], b"\xff\xd8\xff" * 9]
)
def test_a_picture_that_does_not_decode_says_so_in_one_line(data: bytes) -> None:
    problem = image_problem(data)
    assert problem is not None and "\n" not in problem


def test_a_bomb_is_reported_from_its_header() -> None:
    bomb = bytearray(encoded(4, 4, "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = __import__("zlib").crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    assert "pixels" in (image_problem(bytes(bomb)) or "")


def test_statistics_are_those_of_the_samples(tmp_path: Path) -> None:
    def sample(number: int) -> Sample:
        turns = (
            Turn("human", "one two"),
            Turn("assistant", "a b c"),
            Turn("human", "é"),
            Turn("assistant", "x" * number),
        )
        marks = (
            Region("point", (0.5, 0.5), 1),
            Region("stroke", (0, 0, 1, 1, 0, 1), 2),
            Region("box", (0, 0, 1, 1), 2),
        )
        images = (encoded(30 + number, 20), encoded(8, 9, "PNG"))[: number % 3]
        return Sample(f"k{number}", "s", "ocr" if number % 4 else "chart", turns, images, marks if images else (), {})

    samples = [sample(number) for number in range(12)]
    shards = write_samples(tmp_path / "s", samples, source="s", samples_per_shard=5)
    facts = gather(shards, measure=words).summary()
    assert (facts["samples"], facts["domains"], facts["damaged"]) == (12, {"ocr": 9, "chart": 3}, {})
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    assert facts["regions"] == {"point": 8, "stroke": 8, "box": 8} and facts["marks"]["sum"] == 16
    lengths = [sum(len(turn.text) for turn in found.turns) for found in samples]
    assert facts["characters"] == spread(lengths) and facts["characters"]["sum"] == sum(lengths)
    assert facts["answer_characters"]["sum"] == sum(5 + number for number in range(12))
    assert facts["turns"] == {**spread([4] * 12)} and facts["images"]["sum"] == 12
    assert facts["tokens"]["sum"] == 12 * 6 + 11 and facts["views"]["sum"] == 12 and facts["targets"]["sum"] == 11
    assert facts["width"]["max"] == 41 and facts["height"]["min"] == 9
    assert json.loads(json.dumps(facts)) == facts


def test_damage_and_refusals_are_counted_apart_from_samples(source: ShardSet) -> None:
    shard = source.folder / "shard-00000.tar"
    flip(shard, 600)
    tally = gather(read_source(source.folder), measure=picky)
    assert tally.samples == 22 and tally.damaged["record"] == 1
    assert tally.damaged == {"record": 1, "image": 1} and "tokens" not in tally.columns
    assert tally.summary()["refused"] == 22 and tally.summary()["first_refusal"] == "toys-00001: too strange"
    assert refusals({"toys": tally, "none": Tally()}) == [
        "toys: 22 of 22 refused by the processor, first toys-00001: too strange"
    ]


def test_percentiles_are_exact_and_nothing_stays_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 1000, 501).tolist()
    found, ordered = spread(values), sorted(values)
    assert (found["min"], found["p50"], found["max"], found["sum"]) == (
        ordered[0],
        ordered[250],
        ordered[-1],
        sum(values),
    )
    assert spread([]) == {}


def test_the_table_has_a_row_a_source_and_one_for_all(source: ShardSet) -> None:
    tally = gather(source)
    rows = table({"toys": tally, "none": Tally()})
    assert [row[0] for row in rows] == ["source", "toys", "none", "all"] and len({len(row) for row in rows}) == 1
    assert merged([tally, tally]).samples == 2 * tally.samples


@pytest.mark.slow
def test_plots_are_drawn_for_any_source(source: ShardSet, tmp_path: Path) -> None:
    tally = gather(source, measure=words)
    sources = {"toys $x_1$ <b>": tally, "none": Tally(), **{f"s{number}": tally for number in range(10)}}
    for name, tallies in (("all", sources), ("empty", {"none": Tally()})):
        draw(tallies, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000 and np.asarray(image).std() > 1


def test_a_choice_is_drawn_by_its_seed_without_repetition(source: ShardSet, tmp_path: Path) -> None:
    other = making.source(tmp_path / "other", "other", 7, per_shard=3)

    def keys(seed: int, num: int = 12) -> list[str]:
        return [shown.sample.key for shown in choose([source, other], num=num, seed=seed)]

    assert keys(1) == keys(1) and keys(1) != keys(2)
    assert len(set(keys(3))) == 12 and len(set(keys(3, 100))) == 30
    chosen = choose([source, other], keys=["other-00004", "toys-00003"])
    assert [(shown.sample.key, shown.where) for shown in chosen] == [
        ("other-00004", other.location),
        ("toys-00003", source.location),
    ]
    with pytest.raises(ValueError, match="no sample of toys, other has the key 'toys-0003'; one is 'toys-000"):
        choose([source, other], keys=["toys-0003"])
