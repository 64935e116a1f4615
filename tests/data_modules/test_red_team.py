"""Hostile and damaged archives, through real shards and the real stream."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bestiary.schema import Sample, SampleError
from data_modules.records import DamagedSampleError, Reason
from data_modules.shards import ShardSet, open_source, write_samples
from data_modules.sources import StreamError
from tests.data_modules.hostile import blames, encoded, epoch_of, good, pair, processor, tar_of

COUNT = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two shards; one sample has several pictures."""
    folder = tmp_path_factory.mktemp("sound")
    samples = [good(number) for number in range(COUNT)]
    samples[7] = good(7, images=(encoded(), encoded("PNG"), encoded("WEBP")), regions=())
    write_samples(folder, samples, source="set", samples_per_shard=6)
    return folder


def _same(one: Sample, other: Sample) -> bool:
    return one == other and all(bytes(a) == bytes(b) for a, b in zip(one.images, other.images, strict=True))


def _outcomes(shards: ShardSet) -> list[Sample | DamagedSampleError]:
    found: list[Sample | DamagedSampleError] = []
    for number in range(len(shards)):
        try:
            found.append(shards[number])
        except DamagedSampleError as error:
            assert "\n" not in str(error) and shards.shards[shards.locate(number)[0]].file in str(error), str(error)
            found.append(error)
    return found


def _copy(sound: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


def _through_processor(found: list[Sample | DamagedSampleError]) -> None:
    """Nothing but a SampleError comes of the pictures and texts that got through."""
    made = processor()
    for sample in found:
        if isinstance(sample, Sample):
            try:
                made.lengths(sample)
                made(sample)
            except SampleError as error:
                assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(60)])
def test_flipped_bytes_of_a_tar_spoil_their_own_samples_only(sound: Path, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = _outcomes(ShardSet(sound))
    folder = _copy(sound, tmp_path / "copy")
    for _ in range(8):
        tar = bytearray((sound / "shard-00001.tar").read_bytes())
        # Half of the flips hit headers and texts, which are a small part of the bytes.
        places = [place for _, place in ShardSet(sound).places(1)]
        at = {int(rng.integers(0, len(tar)))}
        at |= {places[int(rng.integers(6))].offset + int(rng.integers(0, 1100)) for _ in range(int(rng.integers(0, 4)))}
        for byte in at:
            tar[min(byte, len(tar) - 1)] ^= 1 << int(rng.integers(0, 8)) if rng.random() < 0.5 else 0xFF
        (folder / "shard-00001.tar").write_bytes(tar)
        found = _outcomes(ShardSet(folder))
        for number, (before, after) in enumerate(zip(original, found, strict=True)):
            place = places[number - 6] if number >= 6 else None
            hit = place is not None and any(place.offset <= byte < place.offset + place.size for byte in at)
            assert hit or (isinstance(after, Sample) and _same(before, after)), (number, after)
            if hit and isinstance(after, Sample):
                assert after.turns == before.turns and after.regions == before.regions, "texts are checked"
        _through_processor(found)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in range(30)])
@pytest.mark.parametrize("style", ["caption", "llava"])
def test_flipped_bytes_of_a_foreign_tar_spoil_their_own_samples_only(tmp_path: Path, seed: int, style: str) -> None:
    rng = np.random.default_rng(seed)
    keys = [f"k{number:02d}" for number in range(10)]
    text = b'{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}'
    members = [
        (name, text if style == "llava" and name.endswith("txt") else data) for key in keys for name, data in pair(key)
    ]
    members = [(name.replace("txt", "json") if style == "llava" else name, data) for name, data in members]
    whole = tar_of(members, format=tarfile.PAX_FORMAT if seed % 2 else tarfile.GNU_FORMAT)
    size = len(whole) // 512 * 512
    for turn in range(6):
        tar = bytearray(whole)
        span = len(tar) // len(keys)
        start = int(rng.integers(0, len(keys))) * span
        for _ in range(int(rng.integers(1, 5))):
            tar[start + int(rng.integers(0, min(span, size - start)))] ^= 1 << int(rng.integers(0, 8))
        folder = tmp_path / f"{turn}"
        folder.mkdir()
        (folder / "part.tar").write_bytes(tar)
        shards = open_source(folder, format=style, domain="natural")
        found = _outcomes(shards)
        whole_keys = {sample.key for sample in found if isinstance(sample, Sample)}
        # The flips lie in one tenth of the file: at most three samples touch it.
        assert len(whole_keys & {f"part/{key}" for key in keys}) >= len(keys) - 3, whole_keys
        _through_processor(found)


def test_a_truncated_tar_keeps_every_sample_before_the_cut(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = _outcomes(ShardSet(sound))
    whole = (sound / "shard-00000.tar").read_bytes()
    ends = [place.offset + place.size for _, place in ShardSet(sound).places(0)]
    for cut in [*range(0, len(whole), len(whole) // 25), *ends]:
        folder = _copy(sound, tmp_path / "copy")
        (folder / "shard-00000.tar").write_bytes(whole[:cut])
        for number, (before, after) in enumerate(zip(original, _outcomes(ShardSet(folder)), strict=True)):
            if number >= 6 or ends[number] <= cut:
                assert isinstance(after, Sample) and _same(before, after)
            else:
                assert isinstance(after, DamagedSampleError) and after.reason is Reason.CUT
    folder = _copy(sound, tmp_path / "copy")
    (folder / "shard-00000.tar").write_bytes(whole[: ends[3] + 700])
    seen = epoch_of(folder, caplog)
    assert seen.keys == {f"good-{number:03d}" for number in range(COUNT)} - {"good-004", "good-005", "good-007"}
    assert "set/shard-00000.tar: 2 cut" in seen.lines
    assert blames(seen, "shard-00000.tar", "good-004", "(cut)") and blames(seen, "shard-00000.tar", "good-005", "(cut)")


def test_a_truncated_foreign_tar_keeps_every_sample_before_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tar_of([each for number in range(8) for each in pair(f"k{number}")])
    for cut in range(600, len(whole) - 1024, len(whole) // 9):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "part.tar").write_bytes(whole[:cut])
        found = _outcomes(open_source(folder, format="caption", domain="natural"))
        assert [sample.key for sample in found[:-1] if isinstance(sample, Sample)] == [
            f"part/k{number}" for number in range(len(found) - 1)
        ]
    (folder / "part.tar").write_bytes(whole[: 15_360 + 700])
    seen = epoch_of(folder, caplog, format="caption", domain="natural")
    assert len(seen.keys) >= 3 and seen.lines == ("set/part.tar: 1 cut",)
    assert blames(seen, "part.tar", "(cut)", "part/k")


def test_a_compressed_tar_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.tar").write_bytes(gzip.compress(tar_of(pair("k"))))
    with pytest.raises(ValueError, match=r"set/part\.tar is compressed \(gzip\); unpack it"):
        open_source(tmp_path / "set", format="caption", domain="natural")


def test_beyond_the_budget_the_run_stops_and_names_the_shard(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _copy(sound, tmp_path / "copy")
    tar = bytearray((sound / "shard-00001.tar").read_bytes())
    tar[0] ^= 1
    (folder / "shard-00001.tar").write_bytes(tar)
    seen = epoch_of(folder, caplog, bad_budget=0.002)  # two of a thousand: this one, and the three pictures of another
    assert seen.lines == ("set/shard-00001.tar: 1 structure", "set/shard-00001.tar: 1 processor")
    assert blames(seen, "shard-00001.tar", "good-006", "(structure)")
    assert blames(seen, "shard-00001.tar", "good-007", "(processor)", "this model takes one")
    with pytest.raises(StreamError, match=r"data.bad_budget=0.0 allows; worst is .*shard-00001.tar \(1 x ") as info:
        epoch_of(folder, caplog, bad_budget=0.0)
    assert "\n" not in str(info.value)
    (folder / "shard-00000.tar").write_bytes(b"")
    (folder / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(StreamError, match="samples one after another were damaged"):  # no endless loop either
        epoch_of(folder, caplog, bad_budget=1.0)


def test_a_shard_that_is_gone_or_a_link_is_named(sound: Path, tmp_path: Path) -> None:
    for name in ("shard-00001.tar", "shard-00001.idx"):
        folder = _copy(sound, tmp_path / "copy")
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            ShardSet(folder)
        (folder / name).symlink_to(sound / name)
        with pytest.raises(ValueError, match=name):
            ShardSet(folder)
    folder = _copy(sound, tmp_path / "copy")
    (folder / "shard-00001.keys").unlink()
    shards = ShardSet(folder)
    assert shards[0].key == "good-000"
    with pytest.raises(ValueError, match=r"shard-00001.keys"):
        shards.key(7)
