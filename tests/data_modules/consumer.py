"""A program that consumes a stream as training does, to be killed: it logs what it took and saves as it goes.

Every step is appended to the run's own log: (step, keys of every row, hash of every row's token ids). A checkpoint
holds the lanes' states and, as its only weights, a chain of hashes over everything taken so far, so that a sample which
was lost or repeated between two checkpoints changes the weights of all later ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from bestiary.schema import Batch
from bestiary.training import checkpoints
from data_modules.lanes import lanes_of
from data_modules.stream import Stream
from tests.data_modules.making import LANES, source, stream

WEIGHTS = {"big": 6.0, "bad": 3.0, "tiny": 1.0}
Row = tuple[list[str], str, bytes]
"""Keys of the samples, hash of the token ids, state of the lane after the row."""


@dataclass(frozen=True)
class Job:
    """What to consume and how.

    sources: what `write_sources` made. root: takes logs and checkpoints. ballast: bytes of zeros that a checkpoint
    holds beside its weights, so that saving takes its time.
    """

    sources: Path
    root: Path
    steps: int
    ranks: int = 1
    workers: int = 0
    micro_batch: int = 0
    save_every: int = 3
    ballast: int = 0


def write_sources(root: Path) -> None:
    """Three sources: one has undecodable pictures and a shard that is cut off, one is smaller than the batch."""
    source(root / "big", "big", 400, per_shard=50)
    source(root / "tiny", "tiny", 5, domain="text")
    shards = source(root / "bad", "bad", 90, per_shard=30, bad=(3, 4, 11, 70), domain="chart")
    tar = root / "bad" / shards.shards[1].file
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def open_stream(root: Path) -> Stream:
    """Packed, three weighted sources, 12 rows a step."""
    return stream({name: {"path": root / name, "weight": weight} for name, weight in WEIGHTS.items()}, max_tokens=48)


def consume(job: Job, name: str) -> None:
    """Go on from the newest checkpoint to the last step; the log is `<name>.jsonl`."""
    made = open_stream(job.sources)
    checkpoint = checkpoints.newest(job.root / "checkpoints")
    states, chain, step = made.first_states(), bytes(32), 0
    if checkpoint is not None:
        states, chain = checkpoint.state.lanes, bytes(checkpoint.model()["chain"].tolist())
        step = made.check_states(states, checkpoint.state.fingerprint)
    with (job.root / f"{name}.jsonl").open("ab", buffering=0) as log, closing(_steps(made, job, states)) as steps:
        for rows in steps:
            keys, ids = [row[0] for row in rows], [row[1] for row in rows]
            line = json.dumps([step, keys, ids]).encode() + b"\n"
            log.write(line)
            chain = sha256(chain + line).digest()
            step += 1
            if step % job.save_every == 0 or step == job.steps:
                _save(job, made, step, chain, [row[2] for row in rows])
            if step == job.steps:
                return


def chain_of(job: Job) -> list[int]:
    """The weights of the newest checkpoint."""
    checkpoint = checkpoints.newest(job.root / "checkpoints")
    assert checkpoint is not None and checkpoint.state.step == job.steps
    return list(checkpoint.model()["chain"].tolist())


def logged(path: Path) -> list[str]:
    """The whole lines of a log; a run that was killed may have left a part of one, or nothing."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _save(job: Job, made: Stream, step: int, chain: bytes, states: list[bytes]) -> None:
    state = checkpoints.TrainState(
        step=step, stage="taking", seed=0, lanes=dict(enumerate(states)), fingerprint=made.fingerprint()
    )
    model = {"chain": torch.tensor(list(chain), dtype=torch.uint8), "ballast": torch.zeros(job.ballast // 8 + 1)}
    checkpoints.write(job.root / "checkpoints", state, model=model, optimizer={}, rng={}, keep=2)


def _steps(made: Stream, job: Job, states: dict[int, bytes]) -> Iterator[list[Row]]:
    """The rows of all ranks, in lane order, step by step; ranks beyond one are processes of their own."""
    if job.ranks == 1:
        yield from _rows(made, job, 0, states)
        return
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(job.ranks)]
    ranks = [
        fork.Process(target=_send_rows, args=(made, job, rank, states, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        for _, end in pipes:
            end.close()
        while True:
            yield [row for receiving, _ in pipes for row in receiving.recv()]
    finally:
        for process in ranks:
            process.terminate()
            process.join()


def _send_rows(made: Stream, job: Job, rank: int, states: dict[int, bytes], pipe: Connection) -> None:
    """One rank; it ends when nobody listens any more."""
    try:
        for rows in _rows(made, job, rank, states):
            pipe.send(rows)
    except BrokenPipeError:
        return


def _rows(made: Stream, job: Job, rank: int, states: dict[int, bytes]) -> Iterator[list[Row]]:
    """What one rank takes of each step."""
    lanes = lanes_of(rank, job.ranks, range(LANES))
    loader = made.loader(lanes, states=states, micro_batch=job.micro_batch, num_workers=job.workers)
    for batches in loader:
        yield [_row(batch, number) for batch in batches for number in range(len(batch.lanes))]


def _row(batch: Batch, number: int) -> Row:
    ids = batch.ids[number][batch.segment_ids[number] > 0]
    keys = [segment.key for segment in batch.segments if segment.row == number]
    return keys, sha256(ids.numpy().tobytes()).hexdigest()[:16], batch.states[number]


def main(job: Job, name: str) -> None:
    """The program, as the leader of its own group of processes; what it has to say goes to `<name>.txt`."""
    os.setsid()
    os.dup2(os.open(job.root / f"{name}.txt", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # or its workers would come from a server of their own
    consume(job, name)


def start(job: Job, name: str) -> BaseProcess:
    """The program as a process of its own, forked from a server that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data_modules.consumer"])
    process = context.Process(target=main, args=(job, name))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """SIGKILL to the program, then to whatever it leaves behind."""
    assert process.pid is not None
    process.kill()
    process.join()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it left nothing, or had no group yet


def check_nothing_lost(job: Job, runs: Sequence[str], whole: Sequence[str]) -> None:
    """The runs, each cut where the next one began, are the uninterrupted run; what was taken twice was the same."""
    logs = [lines for name in runs if (lines := logged(job.root / f"{name}.jsonl"))]
    starts = [json.loads(lines[0])[0] for lines in logs] + [len(whole)]
    for lines, start in zip(logs, starts, strict=False):
        assert lines == list(whole[start : start + len(lines)])
    effective = [
        line for lines, begin, end in zip(logs, starts[:-1], starts[1:], strict=True) for line in lines[: end - begin]
    ]
    assert effective == list(whole)
