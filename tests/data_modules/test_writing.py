"""The engine behind `bestiary shards write`: equal bytes however it ran, rejections told, nothing half believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.adapters import Adapter, make_adapter
from data_modules.shards import read_source
from data_modules.writing import Plan, Progress, WritingError, write_source
from data_modules.writing.journal import JOURNAL_FILE, Journal
from data_modules.writing.keys import KnownKeys
from data_modules.writing.progress import line
from tests.data_modules.making import picture


class StoppedError(Exception):
    """Ends a writer from outside, as an exception may at any batch."""


def record(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"role": "human", "text": f"what {number}?"}, {"role": "assistant", "text": "ab" * (number % 7 + 1)}]
    region = {"kind": "box", "coords": [0.1, 0.2, 0.5, 0.9], "mark": 1}
    found = {"id": f"r{number}", "images": [f"{number % 5}.png"], "turns": turns, "regions": [region]}
    return {**found, **changes}


@pytest.fixture
def annotated(tmp_path: Path) -> Callable[..., Adapter]:
    """Annotations of 40 records, number 7 changed, and their pictures."""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / f"pictures/{number}.png").write_bytes(picture(number))

    def make(records: list[Any] | None = None, **options: str) -> Adapter:
        found = [record(number) for number in range(40)] if records is None else records
        (tmp_path / "records.json").write_text(json.dumps(found))
        return make_adapter(
            "plain", tmp_path / "records.json", tmp_path / "pictures", source="toys", domain="natural", options=options
        )

    return make


def plan(folder: Path, **changes: Any) -> Plan:
    return replace(Plan(folder, "toys", samples_per_shard=6, workers=1, max_rejected=0.5), **changes)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stop_after(batches: int) -> Callable[[Progress], None]:
    left = batches + 1

    def watch(progress: Progress) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise StoppedError

    return watch


def rejections(folder: Path) -> list[dict[str, str]]:
    return [json.loads(text) for text in (folder / "rejected.jsonl").read_text().splitlines()]


def test_what_was_annotated_is_what_is_read(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    report = write_source(annotated(), plan(tmp_path / "out", licence="CC0"))
    shards = read_source(tmp_path / "out")
    assert (report.samples, report.shards, report.rejected, len(shards)) == (40, 7, 0, 40)
    assert (shards.name, shards.licence, shards.domains) == ("toys", "CC0", ("natural",))
    sample = shards[13]
    assert sample.key == "toys-00000013" and sample.meta == {"id": "r13"}
    assert bytes(sample.images[0]) == picture(3) and sample.turns[0].text == "what 13?"
    assert sample.regions[0].coords == (0.1, 0.2, 0.5, 0.9)
    assert shards.verify() == []
    assert not (tmp_path / "out" / JOURNAL_FILE).exists() and not (tmp_path / "out/rejected.jsonl").exists()


def test_every_rejected_record_is_one_line_with_place_class_and_problem(
    tmp_path: Path, annotated: Callable[..., Adapter]
) -> None:
    (tmp_path / "pictures/text.png").write_text("no picture")
    (tmp_path / "pictures/folder.png").mkdir()
    bad = {
        3: (record(3, images=["none.png"]), "missing-image", "none.png"),
        4: (record(4, images=["../records.json"]), "missing-image", "leaves the image folder"),
        5: (record(5, images=["/etc/passwd"]), "missing-image", "leaves the image folder"),
        6: (record(6, images=["folder.png"]), "missing-image", "regular file"),
        7: (record(7, images=["text.png"]), "not-an-image", "text.png"),
        8: ({"a": 1}, "record", "turns"),
        9: (record(9, turns=[]), "sample", "at least one turn"),
        10: ("text", "record", "plain"),
        11: (record(11, turns=[{"role": "narrator", "text": "x"}]), "sample", "narrator"),
        12: (record(12, regions=[{"kind": "box", "coords": [0, 0, 2, 1], "mark": 1}]), "sample", "[0, 1]"),
        13: (record(13, meta={"a": float("nan")}), "record", "JSON"),
    }
    records = [bad[number][0] if number in bad else record(number) for number in range(40)]
    report = write_source(annotated(records), plan(tmp_path / "out"))
    lines = rejections(tmp_path / "out")
    assert [found["where"] for found in lines] == [f"records.json record {number}" for number in bad]
    for found, (_, kind, problem) in zip(lines, bad.values(), strict=True):
        assert found["kind"] == kind and problem in found["problem"] and "\n" not in found["problem"]
    assert report.kinds == {"missing-image": 4, "not-an-image": 1, "record": 3, "sample": 3}
    assert [key for key in read_source(tmp_path / "out").keys()][3] == "toys-00000014"  # noqa: SIM118


def test_a_batch_without_any_sample_leaves_the_numbers_of_the_others(
    tmp_path: Path, annotated: Callable[..., Adapter]
) -> None:
    records = [record(n) if not 6 <= n < 12 else {} for n in range(18)]
    report = write_source(annotated(records), plan(tmp_path / "out"))
    names = [shard.file for shard in read_source(tmp_path / "out").shards]
    assert names == ["shard-00000.tar", "shard-00002.tar"] and (report.samples, report.rejected) == (12, 6)


def test_of_equal_keys_the_first_in_the_file_stays(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    records = [record(n, id=f"k{n % 15}") for n in range(40)]
    report = write_source(annotated(records, id_key="true"), plan(tmp_path / "out", max_rejected=1.0))
    assert report.kinds == {"duplicate-key": 25}
    assert [sample.turns[0].text for sample in read_source(tmp_path / "out")] == [f"what {n}?" for n in range(15)]


@given(st.lists(st.lists(st.integers(0, 60), max_size=12), max_size=25))
def test_known_keys_are_a_set(batches: list[list[int]]) -> None:
    known, truth = KnownKeys(), set[int]()
    for batch in batches:
        hashes = np.array(sorted(set(batch)), np.uint64) + np.uint64(2**63)
        assert {value - 2**63 for value in known.among(hashes)} == truth & set(batch)
        known.add(np.array([value for value in hashes if int(value) - 2**63 not in truth], np.uint64))
        truth |= set(batch)
        assert len(known) == len(truth)


def test_a_finished_source_is_left_alone(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    adapter, out = annotated([record(n) if n else {} for n in range(40)]), tmp_path / "out"
    first = write_source(adapter, plan(out))
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = write_source(annotated([record(n) if n else {} for n in range(40)]), plan(out, workers=3))
    assert again == replace(first, state="unchanged")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples_per_shard": 7}, "samples_per_shard"), ({"limit": 9}, "limit"), ({"licence": "x"}, "licence")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_by_name_and_may_overwrite(
    tmp_path: Path, annotated: Callable[..., Adapter], change: dict[str, Any], named: str, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        write_source(annotated(), plan(out))
    else:
        with pytest.raises(StoppedError):
            write_source(annotated(), plan(out), watch=stop_after(3))
    before = contents(out)
    with pytest.raises(WritingError, match=rf"of another kind \({named} differ\); give --overwrite"):
        write_source(annotated(), plan(out, **change))
    assert contents(out) == before
    write_source(annotated(), plan(out, **change, overwrite=True))
    write_source(annotated(), plan(tmp_path / "fresh", **change))
    assert contents(out) == contents(tmp_path / "fresh")


def test_changed_annotations_are_another_source(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    write_source(annotated(), plan(tmp_path / "out"))
    with pytest.raises(WritingError, match=r"\(annotations differ\)"):
        write_source(annotated([record(n + 1) for n in range(40)]), plan(tmp_path / "out"))


@pytest.mark.parametrize("batches", range(8))
def test_a_writer_that_stopped_goes_on_to_equal_bytes(
    tmp_path: Path, annotated: Callable[..., Adapter], batches: int
) -> None:
    records = [record(n) if n % 5 else {} for n in range(40)]
    write_source(annotated(records), plan(tmp_path / "whole"))
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_source(annotated(records), plan(out), watch=stop_after(batches))
    assert not (out / "source.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert len(kept) == batches
    report = write_source(annotated(records), plan(out))
    assert report.resumed == min(40, 6 * batches)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(out) == contents(tmp_path / "whole")


def test_a_journal_cut_anywhere_gives_equal_bytes(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    records = [record(n) if n % 5 else {} for n in range(20)]
    write_source(annotated(records), plan(tmp_path / "whole"))
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_source(annotated(records), plan(tmp_path / "stopped"), watch=stop_after(3))
    journal = (tmp_path / "stopped" / JOURNAL_FILE).read_bytes()
    for size in [0, 1, *range(100, len(journal), 271), len(journal)]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "stopped", out)
        (out / JOURNAL_FILE).write_bytes(journal[:size])
        (out / "shard-00003.tar.tmp").write_bytes(b"half")
        write_source(annotated(records), plan(out))
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damaged", ["shard-00001.tar", "shard-00001.idx", "shard-00001.keys", "rejected.jsonl"])
def test_what_was_damaged_since_is_written_again(
    tmp_path: Path, annotated: Callable[..., Adapter], damaged: str
) -> None:
    records = [record(n) if n % 5 else {} for n in range(40)]
    write_source(annotated(records), plan(tmp_path / "whole"))
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_source(annotated(records), plan(out), watch=stop_after(4))
    (out / damaged).write_bytes((out / damaged).read_bytes()[:-9])
    write_source(annotated(records), plan(out))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_source_that_lost_a_shard_is_not_called_finished(
    tmp_path: Path, annotated: Callable[..., Adapter]
) -> None:
    records, out = [record(n) for n in range(40)], tmp_path / "out"
    shards = write_source(annotated(records), plan(out)).shards
    whole = contents(out)
    (out / "shard-00001.tar").unlink()
    told = rf"is finished, but shard-00001\.tar or its index is missing or changed \(1 of {shards} shards\); give"
    with pytest.raises(WritingError, match=told):
        write_source(annotated(records), plan(out))
    write_source(annotated(records), plan(out, overwrite=True))
    assert contents(out) == whole


def test_annotations_without_one_good_record_name_the_first(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    with pytest.raises(WritingError, match=r"^not one of 3 records became a sample, first: .*record 0"):
        write_source(annotated([{}, {}, {}]), plan(tmp_path / "out", max_rejected=1.0))


def test_too_many_rejections_leave_no_source_and_may_be_allowed_later(
    tmp_path: Path, annotated: Callable[..., Adapter]
) -> None:
    records, out = [record(n) if n % 5 else {} for n in range(40)], tmp_path / "out"
    with pytest.raises(
        WritingError,
        match=r"^8 of 40 records were rejected, 20\.0% where 1\.0% .* \(8 record; first: .*--overwrite",
    ):
        write_source(annotated(records), plan(out, max_rejected=0.01))
    assert not (out / "source.json").exists()
    report = write_source(annotated(records), plan(out, max_rejected=0.2))
    assert (report.resumed, report.samples, report.rejected) == (40, 32, 8)


def test_a_hopeless_run_stops_early(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    with pytest.raises(WritingError, match=r"^1000 of 1000 records were rejected"):
        write_source(annotated([{}] * 3000), plan(tmp_path / "out", samples_per_shard=100))


def test_a_second_writer_is_refused(tmp_path: Path, annotated: Callable[..., Adapter]) -> None:
    with Journal(tmp_path / "out"), pytest.raises(WritingError, match="another process is writing into"):
        write_source(annotated(), plan(tmp_path / "out"))
    write_source(annotated(), plan(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[", "ends inside its array"),
        ('[{"a": 1}', "ends inside its array"),
        ('{"a": 1} {"b"', "rejected"),
        ("[1] 2", "something follows the array"),
        ("[1,,2]", "an array element is missing"),
        ("[]", "hold no record"),
        ("", "hold no record"),
    ],
)
def test_broken_files_are_one_line(
    tmp_path: Path, annotated: Callable[..., Adapter], content: str, problem: str
) -> None:
    adapter = annotated()
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(ValueError, match=problem) as caught:
        write_source(adapter, plan(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out/source.json").exists()


def test_a_plan_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for change in ({"samples_per_shard": 0}, {"workers": 0}, {"limit": 0}, {"max_rejected": 1.5}, {"source": ""}):
        with pytest.raises(WritingError):
            plan(tmp_path, **change)


def test_progress_tells_share_counts_speed_and_time_left() -> None:
    before = Progress(records=100, share=0.1, bytes=10**6)
    now = Progress(records=300, rejected=2, bytes=21 * 10**6, share=0.5)
    assert line(now, 10.0, before) == " 50%  300 records  2 rejected  2.0 MB/s  0:12 left"
    assert line(replace(now, share=None), 10.0, before) == "300 records  2 rejected  2.0 MB/s"
