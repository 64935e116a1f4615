"""The writer in real processes: killed, starved of disk, given a large file; the bytes stay those of a quiet run."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.cli import main
from bestiary.schema import Sample
from data_modules.adapters import Record
from data_modules.adapters.plain import PlainAdapter
from data_modules.writing import Plan, WritingError, write_source

COMMAND = "from bestiary.cli import main; import sys; raise SystemExit(main(sys.argv[1:]))"
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + COMMAND
"""What a shell starts in the background begins with interrupts ignored, and so do these tests' processes there."""
MEASURED = """
import resource, sys
from bestiary.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
raise SystemExit(code)
"""
RECORDS, PER_SHARD = 600, 25


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 records over pictures of some 40 KB; every 50th is broken, every 20th repeats a key."""
    folder = tmp_path_factory.mktemp("annotated")
    generator = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(generator.integers(0, 256, (120, 160, 3), np.uint8)).save(folder / f"{number}.png")
    turns = [{"role": "human", "text": "what?"}, {"role": "assistant", "text": "noise"}]
    records = [
        {"id": f"k{n - 19 if n % 20 == 19 else n}", "images": [f"{n % 10}.png"], "turns": turns if n % 50 else []}
        for n in range(RECORDS)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def arguments(annotated: Path, out: Path, *more: str) -> list[str]:
    words = ["shards", "write", "plain", str(annotated / "records.json"), "--images", str(annotated), "--out", str(out)]
    words += [
        "--source",
        "noise",
        "--domain",
        "natural",
        "--samples-per-shard",
        str(PER_SHARD),
        "--max-rejected",
        "0.2",
    ]
    return [*words, "--option", "id_key=true", *more]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(annotated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(annotated, out, "--workers", "1")) == 0
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_number_of_processes_changes_no_byte(
    annotated: Path, whole: dict[str, str], tmp_path: Path, workers: str
) -> None:
    assert main(arguments(annotated, tmp_path / "out", "--workers", workers)) == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_any_instant_it_goes_on_to_equal_bytes(
    annotated: Path, whole: dict[str, str], tmp_path: Path, workers: str
) -> None:
    out, chance, kills = tmp_path / "out", random.Random(workers), 0
    for lines in (0, 1, 4, 9, 15, 21):
        writer = start(arguments(annotated, out, "--workers", workers))
        wait_for_lines(out / "journal.jsonl", lines, writer)
        time.sleep(chance.random() * 0.05)
        if writer.poll() is None:
            os.kill(writer.pid, signal.SIGKILL)
            kills += 1
        writer.wait()
        assert_group_ends(writer.pid)
        if (out / "source.json").exists():
            break
    assert kills >= 4, "the writer was faster than the test"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments(annotated, out, "--workers", workers)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, *words], start_new_session=True, stderr=subprocess.DEVNULL)


def wait_for_lines(path: Path, lines: int, writer: subprocess.Popen[bytes]) -> None:
    while writer.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)


def assert_group_ends(group: int) -> None:
    """No process of a killed writer lives on."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("workers outlived the writer")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_finished_shards_are_kept(
    annotated: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    size = max((annotated / f"{number}.png").stat().st_size for number in range(10))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 10, size * 10))

    command = [sys.executable, "-c", COMMAND, *arguments(annotated, out, "--workers", "1")]
    failed = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error:") and "run the same command again" in last and "too large" in last.lower()
    assert not (out / "source.json").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert contents(out) == whole


class DyingAdapter(PlainAdapter):
    """Ends its process at one record while a file is there, as the kernel does when memory runs out."""

    def to_sample(self, record: Record) -> Sample:
        if record.number == 310 and (self.annotations.parent / "deadly").exists():
            os._exit(9)
        return super().to_sample(record)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line_and_the_finished_shards_are_kept(
    annotated: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    adapter = DyingAdapter(annotated / "records.json", annotated, source="noise", domain="natural", id_key=True)
    plan = Plan(tmp_path / "out", "noise", samples_per_shard=PER_SHARD, workers=2, max_rejected=0.2)
    (annotated / "deadly").touch()
    with pytest.raises(WritingError, match="a worker process died"):
        write_source(adapter, plan)
    (annotated / "deadly").unlink()
    assert not (tmp_path / "out/source.json").exists()
    report = write_source(adapter, plan)
    assert report.resumed > 0 and contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_an_interrupt_stops_at_once_and_says_how_to_go_on(annotated: Path, tmp_path: Path) -> None:
    words = arguments(annotated, tmp_path / "out", "--workers", "2")
    writer = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *words], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_for_lines(tmp_path / "out/journal.jsonl", 3, writer)  # type: ignore[arg-type]
    os.killpg(writer.pid, signal.SIGINT)
    _, errors = writer.communicate(timeout=30)
    assert writer.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
    assert_group_ends(writer.pid)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_annotations(tmp_path: Path) -> None:
    peaks = []
    for records in (5_000, 30_000):
        path = tmp_path / f"{records}.json"
        turns = [{"role": "human", "text": "why? " * 100}, {"role": "assistant", "text": "because " * 400}]
        with path.open("w") as file:
            file.write("[" + json.dumps({"turns": turns}))
            for _ in range(records - 1):
                file.write("," + json.dumps({"turns": turns}))
            file.write("]")
        words = ["shards", "write", "plain", str(path), "--out", str(tmp_path / f"out{records}"), "--source", "long"]
        command = [sys.executable, "-c", MEASURED, *words, "--domain", "text", "--workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert path.stat().st_size > 100 * 2**20
    assert peaks[1] < peaks[0] + 12, f"{peaks} MB for 5,000 and 30,000 records"
