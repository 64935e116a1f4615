"""Reading: zero-copy views, sources behind a URL, a million samples at once, and other people's readers."""

from __future__ import annotations

import base64
import gc
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_modules.index import Entry, index_bytes, shard_facts
from data_modules.shards import ShardSet, open_source, write_samples
from data_modules.storage import Storage
from data_modules.writer import finish_source, prepare_folder, shard_path
from tests.data_modules.making import picture, sample, source
from tests.data_modules.servers import FileServer


def write(folder: Path, count: int = 12) -> ShardSet:
    return source(folder, "toys", count)


def test_a_view_is_equal_to_the_sample_and_copies_no_picture(tmp_path: Path) -> None:
    shards = write(tmp_path / "toys")
    views = [shards.view(number) for number in range(12)]
    assert views == list(shards)
    assert all(isinstance(image, memoryview) and image.readonly for view in views for image in view.images)
    assert all(isinstance(image, bytes) for kept in shards for image in kept.images)
    many = ShardSet(shards.folder, max_open=1)
    kept = [many.view(number) for number in (0, 6, 10)]
    assert kept == [shards[number] for number in (0, 6, 10)], "a view outlives the shard's place among the open ones"
    with pytest.raises(IndexError, match="sample 12 of"):
        shards.view(12)
    with pytest.raises(IndexError, match="sample -1 of"):
        shards.view(-1)


@pytest.mark.slow
def test_threads_may_open_and_close_the_same_shards_at_once(tmp_path: Path) -> None:
    shards = ShardSet(write(tmp_path / "toys").folder, max_open=1)
    expected = list(shards.keys())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: shards.view(number % 12).key, range(40_000)))
    finally:
        sys.setswitchinterval(interval)
    assert found == [expected[number % 12] for number in range(40_000)]


def test_open_shards_hold_no_descriptors_and_maps_end_with_their_last_slice(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc to count descriptors and maps in")
    shards = ShardSet(source(tmp_path / "toys", "toys", 60, per_shard=1).folder)

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    before = len(os.listdir("/proc/self/fd"))
    kept = [shards.view(number) for number in range(60)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert maps() >= 120
    shards._reset()
    gc.collect()
    assert 1 <= maps() <= 60, "only the tars that views still look at"
    assert kept[0].images[0][:4] == b"\x89PNG"
    kept.clear()
    gc.collect()
    assert maps() == 0


@pytest.mark.parametrize("lot", [0, 1, 3])
def test_a_source_behind_a_url_gives_the_same_samples(tmp_path: Path, lot: int) -> None:
    shards = write(tmp_path / "toys")
    with FileServer(tmp_path) as server:
        there = open_source(f"{server.url}/toys", storage=Storage(tmp_path / "cache"), lot=lot)
        assert there.index_hash == shards.index_hash
        assert list(there) == list(shards) == list(pickle.loads(pickle.dumps(there)))
        assert list(there.keys()) == list(shards.keys())
        assert there.where(1) == f"{server.url}/toys/shard-00001.tar"
        theirs = open_source(f"{server.url}/toys/shard-{{00000..00002}}.tar", storage=Storage(tmp_path / "cache"))
        assert list(theirs) == list(shards)
        assert list((tmp_path / "cache" / "indexes").rglob("*.idx"))
        with pytest.raises(FileNotFoundError, match=r"name them: .*name-\{00000\.\.00099\}\.tar"):
            open_source(f"{server.url}/nothing", storage=Storage(tmp_path / "cache"))


def test_samples_that_lie_across_remote_stretches_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path / "toys", 30)
    monkeypatch.setattr("data_modules.open_shard.LOT_BYTES", 1000)
    monkeypatch.setattr("data_modules.foreign.LOT_BYTES", 1000)
    with FileServer(tmp_path) as server:
        storage = Storage(tmp_path / "cache")
        assert list(open_source(f"{server.url}/toys", storage=storage)) == list(shards)
        assert list(open_source(f"{server.url}/toys/shard-{{00000..00005}}.tar", storage=storage)) == list(shards)


@pytest.mark.slow
@pytest.mark.parametrize(("num_shards", "per_shard"), [(1, 1_000_000), (1000, 1000)])
def test_the_first_sample_of_a_million_comes_at_once(tmp_path: Path, num_shards: int, per_shard: int) -> None:
    one = write_samples(tmp_path / "one", [sample("toys", 1)], source="toys")
    tar = (one.folder / "shard-00000.tar").read_bytes()
    place = next(one.places())[1]
    entries = [Entry(f"toys-{number:07d}", place, bytes(32)) for number in range(per_shard)]
    index, keys = index_bytes(entries)
    assert len(index) <= 41 * per_shard
    folder = tmp_path / "million"
    prepare_folder(folder)
    for number in range(num_shards):
        path = shard_path(folder, number)
        for suffix, data in ((".tar", tar), (".idx", index), (".keys", keys)):
            path.with_suffix(suffix).write_bytes(data)
    facts = [
        shard_facts(shard_path(folder, number).name, len(tar), ["natural"], entries, index, keys)
        for number in range(num_shards)
    ]
    finish_source(folder, facts, source="toys", check_keys=False)
    best = 1.0
    for number in (777_777, 5, 999_999):
        start = time.process_time()
        assert open_source(folder).view(number).turns
        best = min(best, time.process_time() - start)
    assert best < 0.1


def read_by_datasets(shards: ShardSet, columns: str, home: Path) -> list[dict[str, Any]]:
    """Every row that `datasets` makes of the tars, pictures as base64, in a process without a network.

    columns: Python that names them; "None" = datasets guesses.
    """
    pytest.importorskip("datasets")
    tars = [shards.where(number) for number in range(len(shards.shards))]
    script = f"""
import base64, json, datasets
from datasets import Features, Image, Json, Value
rows = datasets.load_dataset(
    "webdataset", data_files={{"train": {tars!r}}}, split="train", streaming=True, features={columns}
).decode(False)
for row in rows:
    for name, value in row.items():
        if isinstance(value, dict) and "bytes" in value:
            row[name] = base64.b64encode(value["bytes"]).decode()
    print(json.dumps(row))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_rows(rows: list[dict[str, Any]], shards: ShardSet) -> None:
    """Rows are the samples: keys, pictures in their order, turns, meta."""
    assert [row["__key__"] for row in rows] == list(shards.keys())
    for row, made in zip(rows, shards, strict=True):
        record = row["json"] if isinstance(row["json"], dict) else json.loads(row["json"])
        assert tuple(base64.b64decode(row[name]) for name in record["images"]) == made.images
        assert record["turns"] == [{"role": turn.role, "text": turn.text} for turn in made.turns]
        assert record["meta"] == made.meta


@pytest.mark.slow
def test_datasets_reads_our_shards_without_a_network(tmp_path: Path) -> None:
    made = [replace(sample("toys", 3 * number), regions=()) for number in range(12)]  # all with a picture
    shards = write_samples(tmp_path / "toys", made, source="toys", samples_per_shard=5)
    check_rows(read_by_datasets(shards, "None", tmp_path / "hf"), shards)


@pytest.mark.slow
def test_datasets_reads_samples_of_several_kinds_where_it_is_told_the_columns(tmp_path: Path) -> None:
    """As data_modules/README.md says: it guesses columns from the first five samples and refuses if they differ."""
    made = [sample("toys", number) for number in range(12)]
    made[4] = replace(made[4], images=(picture(1), picture(2)), regions=(), meta={"other": ["x"]})
    shards = write_samples(tmp_path / "toys", made, source="toys", samples_per_shard=5)
    columns = """Features({
    "json": Json(), **{name: Image() for name in ("png", "0.png", "1.png")},
    "__key__": Value("string"), "__url__": Value("string"),
})"""
    check_rows(read_by_datasets(shards, columns, tmp_path / "hf"), shards)
