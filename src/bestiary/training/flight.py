"""The flight recorder: which samples went into which step, and what each of them cost.

`samples.jsonl.zst` is a chain of pairs: a skippable zstandard frame of 28 bytes that says which steps come next and how
many bytes they take, then one ordinary frame of JSON lines, a line a step. `zstdcat` prints the lines; this reader hops
from header to header and unpacks only the frames it was asked for. A header costs about 5 microseconds to pass: a run
of a million steps, flushed every 50, is searched in a tenth of a second.

A line holds one step, its samples in columns sorted by lane, and stands for itself:

    {"step": 120, "sources": ["a", "b"], "lanes": [0, 0, 1], "source": [0, 1, 0], "key": ["k1", "k7", "k3"],
     "tokens": [90, 71, 133], "targets": [12, 9, 30], "loss": [1.204, 0.8731, 2.5]}

`source` are numbers of `sources`; `loss` is the mean over the sample's own target tokens, 4 significant digits, null
where it has none. Numbers that the steps share (lanes, sources) cost next to nothing after compression.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

log = logging.getLogger(__name__)

_MAGIC = 0x184D2A5B  # one of the sixteen numbers the zstandard format (RFC 8878, 3.1.2) leaves to applications
_HEADER = struct.Struct("<II4sIIQ")
"""Magic, bytes of the payload that follows, tag, first step, last step, bytes of the frame of lines."""
_PAYLOAD = _HEADER.size - 8
_TAG = b"BFR1"
_LEVEL = 3  # a fifth of level 9's time; keys and losses hardly repeat, so no level makes them smaller


@dataclass(frozen=True, slots=True)
class SeenSample:
    """One sample of one step.

    tokens: positions it took in its row. loss: mean over its target tokens; None where it has none.
    """

    lane: int
    source: str
    key: str
    tokens: int
    targets: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class FlightStep:
    """The samples of one step over all ranks, sorted by lane and, within a lane, from left to right."""

    step: int
    samples: tuple[SeenSample, ...]

    @classmethod
    def of(cls, step: int, samples: Iterable[SeenSample]) -> FlightStep:
        """Samples of all ranks in the order they are kept in."""
        return cls(step, tuple(sorted(samples, key=lambda sample: sample.lane)))

    def to_line(self) -> str:
        """As a line of JSON."""
        sources = sorted({sample.source for sample in self.samples})
        number = {name: place for place, name in enumerate(sources)}
        record = {
            "step": self.step,
            "sources": sources,
            "lanes": [s.lane for s in self.samples],
            "source": [number[s.source] for s in self.samples],
            "key": [s.key for s in self.samples],
            "tokens": [s.tokens for s in self.samples],
            "targets": [s.targets for s in self.samples],
            "loss": [None if s.loss is None else float(f"{s.loss:.4g}") for s in self.samples],
        }
        return msgspec.json.encode(record).decode() + "\n"

    @classmethod
    def from_line(cls, line: str) -> FlightStep:
        """The inverse of `to_line`."""
        raw = msgspec.json.decode(line)
        names = raw["sources"]
        columns = (raw[name] for name in ("lanes", "source", "key", "tokens", "targets", "loss"))
        rows = zip(*columns, strict=True)
        return cls(raw["step"], tuple(SeenSample(a, names[b], c, d, e, f) for a, b, c, d, e, f in rows))


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the lines of some steps lie: bytes [start, stop) hold the header, bytes [body, stop) the lines."""

    first: int
    last: int
    start: int
    body: int
    stop: int


class FlightRecorder:
    """Appends steps and finds them again.

    Whole frames are appended, so a kill loses at most what was not flushed, and a resume trains those steps again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, steps: Sequence[FlightStep]) -> None:
        """Write one frame and flush it to the disk."""
        if steps:
            with self.path.open("ab") as file:
                file.write(_encode(steps))
                file.flush()
                os.fsync(file.fileno())

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[FlightStep]:
        """The recorded steps, `first` and `last` (None: the end) included; one frame is in memory at a time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for frame in self._frames(file):
                if last is not None and frame.first > last:
                    return
                if frame.last >= first:
                    for step in _decode(file, frame):
                        if first <= step.step and (last is None or step.step <= last):
                            yield step

    def read(self) -> list[FlightStep]:
        """All recorded steps."""
        return list(self.steps())

    def bounds(self) -> tuple[int, int] | None:
        """The first and the last recorded step; None where there are none."""
        first = last = None
        if self.path.exists():
            with self.path.open("rb") as file:
                for frame in self._frames(file):
                    first, last = frame.first if first is None else first, frame.last
        return None if first is None or last is None else (first, last)

    def cut_after(self, step: int) -> None:
        """Drop later steps and a half-written end.

        Checkpoints end a frame, so this only shortens the file; a cut inside a frame writes it anew beside itself. A
        file that can only be read up to an earlier step is damaged: it is kept whole under another name, with a warning
        of the steps that are missing now, and its readable beginning goes on.
        """
        if not self.path.exists():
            if step > 0:
                log.warning("%s is not there: it begins anew without steps 1 to %d", self.path, step)
            return
        with self.path.open("r+b") as file:
            size, aside = os.fstat(file.fileno()).st_size, None
            kept, rest, last = self._cut(file, step)
            is_damaged = last < step and kept < size
            if not rest and not is_damaged:
                file.truncate(kept)
                os.fsync(file.fileno())
            else:
                temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
                with temporary.open("wb") as target:
                    file.seek(0)
                    _copy(file, target, kept)
                    target.write(rest)
                    target.flush()
                    os.fsync(target.fileno())
                aside = self._move_aside() if is_damaged else None
                os.replace(temporary, self.path)
        if last < step:
            problem = f"is damaged after step {last} (its whole is kept as {aside.name})" if aside else "ends early"
            log.warning("%s %s: it goes on without steps %d to %d", self.path, problem, last + 1, step)

    def _cut(self, file: IO[bytes], step: int) -> tuple[int, bytes, int]:
        """(bytes of whole frames up to this step, a frame to follow them, the last step in both: 0 for none)."""
        frame, kept, last, before = None, 0, 0, 0
        steps: list[FlightStep] = []
        with contextlib.suppress(ValueError):  # a damaged frame ends what can be read
            for found in self._frames(file, warns=False):
                if found.last > step:
                    steps = _decode(file, found) if found.first <= step else []
                    break
                frame, kept, last, before = found, found.stop, found.last, last
        is_cut = kept < os.fstat(file.fileno()).st_size
        if frame is not None and is_cut and not steps and last < step:  # the damage may be in the last header
            kept, last = frame.start, before
            with contextlib.suppress(ValueError):
                steps = _decode(file, frame)
        steps = [one for one in steps if one.step <= step]
        return kept, _encode(steps), steps[-1].step if steps else last

    def _move_aside(self) -> Path:
        """Give the file the first free name of `.broken-1`, `.broken-2` and so on."""
        names = (self.path.with_name(f"{self.path.name}.broken-{number}") for number in itertools.count(1))
        free = next(name for name in names if not name.exists())
        os.rename(self.path, free)
        return free

    def _frames(self, file: IO[bytes], *, warns: bool = True) -> Iterator[_Frame]:
        """The complete frames in order; what follows the last of them is left out, with a warning if asked."""
        size = os.fstat(file.fileno()).st_size
        start = 0
        while start < size:
            file.seek(start)
            head = file.read(_HEADER.size)
            if len(head) == _HEADER.size:
                magic, payload, tag, first, last, length = _HEADER.unpack(head)
                if (magic, payload, tag) != (_MAGIC, _PAYLOAD, _TAG):
                    raise ValueError(
                        f"{self.path}: no frame of this version at byte {start} (an older program wrote it, or it is "
                        "damaged); move the file away to go on without it"
                    )
                body = start + _HEADER.size
                if body + length <= size:
                    yield _Frame(first, last, start, body, body + length)
                    start = body + length
                    continue
            if warns:
                log.warning("%s: the last frame is incomplete and left out", self.path)
            return


def _encode(steps: Sequence[FlightStep]) -> bytes:
    """Header and frame of these steps; nothing for no steps."""
    import zstandard

    if not steps:
        return b""
    text = "".join(step.to_line() for step in steps).encode()
    body = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(text)
    return _HEADER.pack(_MAGIC, _PAYLOAD, _TAG, steps[0].step, steps[-1].step, len(body)) + body


def _decode(file: IO[bytes], frame: _Frame) -> list[FlightStep]:
    """The steps of a frame; ValueError where its checksum does not hold."""
    import zstandard

    file.seek(frame.body)
    data = file.read(frame.stop - frame.body)
    try:
        text = zstandard.ZstdDecompressor().decompress(data).decode()
    except zstandard.ZstdError as error:
        raise ValueError(
            f"{getattr(file, 'name', 'recorder')}: steps {frame.first} to {frame.last} at byte {frame.start} are "
            f"damaged ({error}); the steps around them can still be read"
        ) from error
    return [FlightStep.from_line(line) for line in io.StringIO(text)]


def _copy(source: IO[bytes], target: IO[Any], length: int) -> None:
    """Bytes from where the source stands."""
    while length:
        chunk = source.read(min(length, 1 << 20))
        target.write(chunk)
        length -= len(chunk)
