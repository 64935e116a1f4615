"""The flight recorder: small, exact, cut and searched without reading all of it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from bestiary.training.flight import FlightRecorder, FlightStep, SeenSample
from bestiary.training.run_dir import JsonLines


def flight(step: int, lanes: int = 4, per_lane: int = 2) -> FlightStep:
    """A step of samples with keys and losses as real ones have them, a pure function of its number."""
    rng = random.Random(step)
    kinds = (
        lambda: f"{rng.randrange(581929):012d}",  # COCO
        lambda: f"VG_100K_2-{rng.randrange(2417997)}-{rng.randrange(30):03d}",
        lambda: f"{rng.getrandbits(128):032x}",  # a hash
        lambda: f"natural-{rng.randrange(500000):06d}",
    )
    samples = [
        SeenSample(
            lane=lane,
            source=rng.choice(["natural", "document", "screenshot"]),
            key=kinds[rng.randrange(len(kinds))](),
            tokens=rng.randrange(60, 700),
            targets=rng.randrange(5, 200),
            loss=float(f"{rng.lognormvariate(0, 0.8):.4g}"),
        )
        for lane in range(lanes)
        for _ in range(per_lane)
    ]
    return FlightStep.of(step, samples)


def recorder_of(path: Path, *frames: range) -> FlightRecorder:
    recorder = FlightRecorder(path / "samples.jsonl.zst")
    for frame in frames:
        recorder.append([flight(step) for step in frame])
    return recorder


def test_what_was_flushed_is_read_back_and_cut_exactly(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, range(1, 5), range(5, 7))
    assert recorder.read() == [flight(step) for step in range(1, 7)] and recorder.bounds() == (1, 6)
    whole = recorder.path.read_bytes()
    recorder.cut_after(4)
    assert whole.startswith(recorder.path.read_bytes()) and recorder.bounds() == (1, 4)
    recorder.cut_after(2)
    assert recorder.read() == [flight(1), flight(2)]
    recorder.cut_after(0)
    assert recorder.read() == [] and recorder.bounds() is None


@pytest.mark.parametrize("torn", [1, 10, 27, 28, 60, -1])
def test_a_frame_that_a_kill_cut_short_is_left_out_and_then_removed(tmp_path: Path, torn: int) -> None:
    recorder = recorder_of(tmp_path, range(1, 5))
    whole = recorder.path.read_bytes()
    recorder.append([flight(5)])
    recorder.path.write_bytes(whole + recorder.path.read_bytes()[len(whole) :][:torn])
    assert [step.step for step in recorder.read()] == [1, 2, 3, 4]
    recorder.cut_after(5)
    assert recorder.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("place", "bit", "left"),
    [
        (20, 1, 4),  # the length of the first frame: shorter, so that no header follows it
        (22, 64, 0),  # the same: beyond the end of the file
        (16, 64, 4),  # its last step: later than it is, and than the checkpoint
        (0, 1, 0),  # what it is
    ],
)
def test_a_damaged_record_is_kept_whole_and_the_missing_steps_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int, bit: int, left: int
) -> None:
    recorder = recorder_of(tmp_path, range(1, 5), range(5, 9), range(9, 13))
    damaged = bytearray(recorder.path.read_bytes())
    damaged[place] ^= bit
    recorder.path.write_bytes(damaged)
    recorder.cut_after(8)
    aside = tmp_path / "samples.jsonl.zst.broken-1"
    assert aside.read_bytes() == damaged
    assert [step.step for step in recorder.read()] == list(range(1, left + 1))
    (line,) = caplog.messages
    assert f"is damaged after step {left} (its whole is kept as {aside.name})" in line
    assert line.endswith(f"it goes on without steps {left + 1} to 8")
    recorder.append([flight(9)])
    recorder.cut_after(9)
    assert recorder.bounds() == (1 if left else 9, 9) and len(caplog.messages) == 1


@pytest.mark.parametrize("place", [12, 60])  # in the header, in the lines
def test_damage_that_does_not_hide_the_end_moves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    recorder = recorder_of(tmp_path, range(1, 5), range(5, 9), range(9, 13))
    damaged = bytearray(recorder.path.read_bytes())
    damaged[place] ^= 64
    recorder.path.write_bytes(damaged)
    recorder.cut_after(8)
    assert not caplog.messages and [*tmp_path.iterdir()] == [recorder.path]
    assert damaged.startswith(recorder.path.read_bytes())
    assert [step.step for step in recorder.steps(5)] == [5, 6, 7, 8]


def test_nothing_that_was_kept_is_overwritten(tmp_path: Path) -> None:
    for number in (1, 2):
        recorder = FlightRecorder(tmp_path / "samples.jsonl.zst")
        recorder.path.write_bytes(bytes([number]) * 50)
        recorder.cut_after(3)
        assert recorder.path.with_name(f"samples.jsonl.zst.broken-{number}").read_bytes() == bytes([number]) * 50


def test_a_damaged_frame_that_the_cut_goes_through_is_kept(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, range(1, 5), range(5, 9))
    damaged = bytearray(recorder.path.read_bytes())
    damaged[-9] ^= 1
    recorder.path.write_bytes(damaged)
    recorder.cut_after(6)
    assert recorder.read() == [flight(step) for step in range(1, 5)]
    assert recorder.path.with_name("samples.jsonl.zst.broken-1").read_bytes() == damaged


@pytest.mark.parametrize(("frames", "said"), [([], "steps 1 to 9"), ([range(1, 5)], "steps 5 to 9")])
def test_a_record_that_was_emptied_shortened_or_removed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, frames: list[range], said: str
) -> None:
    recorder = recorder_of(tmp_path, *frames)
    recorder.path.touch()
    whole = recorder.path.read_bytes()
    recorder.cut_after(9)
    assert recorder.path.read_bytes() == whole and [*tmp_path.iterdir()] == [recorder.path]
    recorder.path.unlink()
    recorder.cut_after(9)
    recorder.cut_after(0)
    early, gone = caplog.messages
    assert "ends early" in early and early.endswith(said)
    assert "is not there" in gone and gone.endswith("steps 1 to 9")


def test_samples_of_all_ranks_stand_in_the_order_of_lanes(tmp_path: Path) -> None:
    mine, other = (
        [SeenSample(lane, "s", f"k{lane}", 3, 2, 0.5) for lane in (2, 3, 3)],
        SeenSample(0, "t", "x", 1, 0, None),
    )
    step = FlightStep.of(7, [*mine, other])
    assert [s.lane for s in step.samples] == [0, 2, 3, 3]
    assert FlightStep.from_line(step.to_line()) == step


def test_losses_keep_four_digits() -> None:
    losses = (0.000123456, 1.23456, 12345.6, 0.0)
    step = FlightStep.of(1, [SeenSample(0, "s", "k", 2, 1, loss) for loss in losses])
    assert [s.loss for s in FlightStep.from_line(step.to_line()).samples] == [0.0001235, 1.235, 12350.0, 0.0]


def test_steps_are_found_without_unpacking_the_others(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, range(1, 5), range(5, 9), range(9, 13))
    data = bytearray(recorder.path.read_bytes())
    data[80] ^= 255  # inside the first frame
    recorder.path.write_bytes(data)
    assert [step.step for step in recorder.steps(6, 10)] == [6, 7, 8, 9, 10]
    with pytest.raises(ValueError, match=r"samples.jsonl.zst: steps 1 to 4 at byte 0 are damaged"):
        recorder.read()


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "samples.jsonl.zst")
    recorder.path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(ValueError, match="no frame of this version at byte 0"):
        recorder.bounds()


def test_plain_zstandard_prints_the_lines(tmp_path: Path) -> None:
    import zstandard

    recorder = recorder_of(tmp_path, range(1, 3), range(3, 4))
    with zstandard.ZstdDecompressor().stream_reader(recorder.path.open("rb"), read_across_frames=True) as stream:
        lines = stream.read().decode().splitlines(keepends=True)
    assert lines == [flight(step).to_line() for step in range(1, 4)]


@pytest.mark.parametrize(("lanes", "per_lane"), [(4, 2), (64, 1), (64, 6)])
def test_a_sample_takes_at_most_40_bytes(tmp_path: Path, lanes: int, per_lane: int) -> None:
    recorder = FlightRecorder(tmp_path / "samples.jsonl.zst")
    recorder.append([flight(step, lanes, per_lane) for step in range(1, 51)])
    assert recorder.path.stat().st_size <= 40 * 50 * lanes * per_lane


@pytest.mark.slow
def test_a_million_steps_are_searched_in_a_second(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, range(1, 51))
    frame = recorder.path.read_bytes()
    with recorder.path.open("wb") as file:
        for first in range(1, 1_000_001, 50):
            file.write(frame[:12] + first.to_bytes(4, "little") + (first + 49).to_bytes(4, "little") + frame[20:])
    begun = time.process_time()
    assert recorder.bounds() == (1, 1_000_000)
    assert list(recorder.steps(700_000, 700_000)) == []  # the copied lines speak of steps 1 to 50
    assert time.process_time() - begun < 1.0


def test_lines_are_found_by_bisection_and_cut(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    assert list(log.steps(1, 2)) == []
    steps = [1, 2, 2, 5, 6, 9, 10, 11]
    for step in steps:
        log.append({"step": step, "text": "x" * (step * 37 % 101)})
    for first in range(13):
        for last in range(first, 13):
            assert [r["step"] for r in log.steps(first, last)] == [s for s in steps if first <= s <= last]
    for cut in (11, 8, 2, 1, 0):
        log.cut_after(cut)
        assert [r["step"] for r in log.read()] == [s for s in steps if s <= cut]
