"""Time to the first batch of a source with a million samples, and the cost of a resume far into a stream."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bestiary.schema import Sample, Turn
from data_modules.lanes import LaneState
from data_modules.shards import write_samples
from data_modules.stream import Stream
from experiments.throughput.ours import NumberProcessor, rules, stream_over

LANES = 64


def make(folder: Path, num: int) -> None:
    """A source of `num` short texts, a thousand in a shard, and the same as one JSON list."""

    def texts() -> Iterator[Sample]:
        for number in range(num):
            turns = (Turn("human", f"what is {number}?"), Turn("assistant", f"a number, {number}"))
            yield Sample(f"text-{number:08d}", "texts", "text", turns)

    write_samples(folder / "texts", texts(), source="texts")
    table = [{"id": s.key, "turns": [turn.text for turn in s.turns]} for s in texts()]
    (folder / "texts.json").write_text(json.dumps(table), encoding="utf-8")


def first_batch(folder: Path) -> dict[str, float]:
    """Seconds from nothing (but imports) to the first batch, and the memory it took in bytes."""
    before, start = _resident(), time.perf_counter()
    stream = stream_over(folder / "texts", num_lanes=16)
    batches = next(iter(stream.loader(range(16))))
    seconds = time.perf_counter() - start
    assert len(batches[0].segments) == 16
    return {"seconds": seconds, "bytes": float(_resident() - before)}


def first_record(folder: Path) -> dict[str, float]:
    """The same for a map-style loader: the whole list is parsed before the first record."""
    before, start = _resident(), time.perf_counter()
    table = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    assert table[0]
    return {"seconds": time.perf_counter() - start, "bytes": float(_resident() - before)}


def run(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over fresh processes, interleaved."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "json.load": []}
    for _ in range(rounds):
        for name, function in (("ours", "first_batch"), ("json.load", "first_record")):
            program = (
                "import json, sys; from pathlib import Path; from experiments.throughput import start; "
                f"print(json.dumps(start.{function}(Path(sys.argv[1]))))"
            )
            done = subprocess.run(
                [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(done.stdout))
    return {name: {key: median(m[key] for m in all_) for key in all_[0]} for name, all_ in found.items()}


def resume_costs(folder: Path, rounds: int) -> list[dict[str, float]]:
    """Milliseconds from saved states of 64 lanes to the first rows, near the start and millions of samples later."""
    stream = Stream({"texts": {"path": str(folder / "texts")}}, NumberProcessor(), rules(LANES))
    saved = stream.fingerprint()
    table = []
    for rows in (1, 1_000, 1_000_000):
        states = {lane: _later(state, rows) for lane, state in stream.first_states().items()}
        times = []
        for _ in range(rounds):
            again = Stream({"texts": {"path": str(folder / "texts")}}, NumberProcessor(), rules(LANES))
            start = time.perf_counter()
            assert again.check_states(states, saved) == rows
            next(iter(again.loader(range(LANES), states=states)))
            times.append(1000 * (time.perf_counter() - start))
        table.append({"samples": float(rows * LANES), "ms": median(times)})
    return table


def _later(state: bytes, rows: int) -> bytes:
    """A lane after `rows` rows of one sample each, nothing damaged."""
    lane = LaneState.from_bytes(state)
    lane.rows = lane.places[0].j = lane.places[0].taken = rows
    return lane.to_bytes()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
