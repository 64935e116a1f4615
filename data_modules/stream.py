"""The stream of a rank: its lanes, spread over worker processes, as micro-batches of optimiser steps.

A rank owns a contiguous block of lanes, its workers split that block, and every worker emits one item a step; torch's
loader asks workers in turn, so the order is fixed and the numbers do not depend on who made them. A process needs a
lane of its own: workers beyond the lanes of a rank become threads of its processes. Workers send the
examples of their rows in one shared-memory tensor; padding happens in the main process, which knows the micro-batches.
"""

from __future__ import annotations

import atexit
import pickle
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bestiary.schema import Batch, Processor
from data_modules.collate import collate_rows
from data_modules.decoding import Row, rows_of
from data_modules.fingerprint import fingerprint, losses
from data_modules.lanes import LaneState, lanes_of
from data_modules.ledger import check_damage
from data_modules.planning import plan_mix
from data_modules.rows import Plan, read_lanes
from data_modules.rules import Rules
from data_modules.skiplist import resolve_skip_list
from data_modules.sources import SourceSpec, StreamError, parse_sources
from data_modules.storage import Storage, StorageError
from data_modules.storage.counters import Counters
from data_modules.surgery import Resumed, resume
from data_modules.undecoded import SampleReader

_ALIGNMENT = 64
_NOTHING = Counters()


class Stream:
    """The endless sequence of global batches over a mix; `loader` gives one rank's part of it.

    sources: name -> the fields of SourceSpec but its name, or a SourceSpec. rules: what shapes the rows.
    skip: file of samples that are never drawn (skiplist.py). storage: where remote shards are kept; None = the default.
    max_steps: length of the run; only `max_epochs` of a source needs it.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, Any] | SourceSpec],
        processor: Processor,
        rules: Rules,
        *,
        skip: Path | str | None = None,
        storage: Storage | None = None,
        max_steps: int | None = None,
    ) -> None:
        self.specs = parse_sources(sources)
        self.storage = storage = storage or Storage()
        opened = [spec.open(storage, chunk=rules.chunk) for spec in self.specs]
        skipped = resolve_skip_list(skip, [spec.name for spec in self.specs], opened) if skip else {}
        self.plan = plan_mix(self.specs, opened, processor, rules, max_steps=max_steps, skipped=skipped)

    def fingerprint(self) -> dict[str, Any]:
        """Everything the sequence depends on, as plain JSON."""
        return fingerprint(self.plan)

    def first_states(self) -> dict[int, bytes]:
        """The states of all lanes before step 0."""
        return {lane: self.plan.first_state(lane).to_bytes() for lane in range(self.plan.rules.num_lanes)}

    def resume(
        self, states: Mapping[int, bytes], saved_fingerprint: Mapping[str, Any], on_change: str = "refuse"
    ) -> Resumed:
        """Where to go on after `states` (lane -> bytes, of every lane); StreamError when they do not belong here.

        on_change: what to do where the stream is not the one that was saved, see `surgery.resume`.
        """
        return resume(states, saved_fingerprint, self.plan, on_change)

    def check_states(self, states: Mapping[int, bytes], saved_fingerprint: Mapping[str, Any]) -> int:
        """The step that follows `states`; StreamError when they do not belong to exactly this stream."""
        return self.resume(states, saved_fingerprint).step

    def loader(
        self, lanes: range, *, states: Mapping[int, bytes] | None = None, micro_batch: int = 0, num_workers: int = 0
    ) -> StreamLoader:
        """The part of a rank. states: lane -> bytes, of these lanes at least; None starts at step 0."""
        states = self.first_states() if states is None else states
        chosen = [states[lane] for lane in lanes]
        return StreamLoader(_LaneDataset(self.plan, chosen, num_workers, self.storage), micro_batch)

    def samples(self, lanes: range | None = None, *, states: Mapping[int, bytes] | None = None) -> SampleReader:
        """The undecoded samples of some lanes (None = all), one of each a step: see `SampleReader`.

        Order, mix, skip list and damage are those of rows without packing; budgets do not apply. Pictures are slices of
        mapped shards. states: lane -> bytes, as `loader` takes them.
        """
        chosen = range(self.plan.rules.num_lanes) if lanes is None else lanes
        states = self.first_states() if states is None else states
        return SampleReader(self.plan, [states[lane] for lane in chosen])

    def losses(self, states: Iterable[bytes]) -> list[str]:
        """What was left out so far: one line for each shard and reason."""
        return losses(self.plan, [LaneState.from_bytes(state) for state in states])

    def check_damage(self, states: Iterable[bytes]) -> None:
        """StreamError where the lanes together have left out more than `bad_budget` allows; states: of all lanes."""
        plan = self.plan
        check_damage(plan.names, plan.sources, plan.rules, [LaneState.from_bytes(state) for state in states])


class StreamLoader:
    """Endless iterable of `list[Batch]`: one rank's micro-batches of one optimiser step, in lane order.

    Iterating again starts again at the states it was made with.
    """

    def __init__(self, dataset: _LaneDataset, micro_batch: int) -> None:
        self._dataset = dataset
        self._micro_batch = micro_batch
        self.num_processes = min(dataset.num_workers, len(dataset.states))
        self._fetched: dict[int, Counters] = {}

    def fetched(self) -> dict[str, int]:
        """What reading remote shards has cost this rank since it began, its workers included; {} without any."""
        if not self._dataset.is_remote:
            return {}
        parts = [self._dataset.storage.counters, *self._fetched.values()]
        return {name: sum(getattr(part, name) for part in parts) for name in asdict(parts[0])}

    def __iter__(self) -> Iterator[list[Batch]]:
        first = [LaneState.from_bytes(state) for state in self._dataset.states]
        lanes = [state.lane for state in first]
        size = self._micro_batch or max(1, len(lanes))
        step = first[0].rows if first else 0
        for rows in self._steps():
            yield [
                collate_rows(
                    [examples for examples, _ in rows[start : start + size]],
                    lanes=lanes[start : start + size],
                    states=[state for _, state in rows[start : start + size]],
                    step=step,
                )
                for start in range(0, len(rows), size)
            ]
            step += 1

    def _steps(self) -> Iterator[list[Row]]:
        """All rows of this rank, step by step."""
        if not self.num_processes:
            yield from self._dataset.steps(0, 1, threads=1)
            return
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self.num_processes,
            collate_fn=_identity,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or every new iterator would draw from the global generator of the model
        )
        items = iter(loader)
        end = partial(_end, items._workers)  # type: ignore[attr-defined]  # torch has no public name for them
        atexit.register(end)  # before multiprocessing's own, which would wait for ever: see _ignore_signals
        try:
            while True:
                rows: list[Row] = []
                for number in range(self.num_processes):
                    try:
                        item = next(items)
                    except RuntimeError as error:
                        if (told := worker_died(error)) is None:
                            raise
                        raise told from error
                    if isinstance(item, Exception):
                        raise item
                    packed, self._fetched[number] = item
                    rows += _unpack(packed)
                yield rows
        finally:
            del items  # the last reference unless an exception holds it: the workers end in peace
            atexit.unregister(end)
            end()


class _LaneDataset(IterableDataset[Any]):
    """What travels into a worker: the plan and the states of this rank's lanes.

    num_workers: as asked for. A process needs a lane of its own; those beyond the lanes become threads of the others.
    """

    def __init__(self, plan: Plan, states: Sequence[bytes], num_workers: int, storage: Storage) -> None:
        super().__init__()
        self.plan = plan
        self.storage = storage
        self.is_remote = not all(shards.storage.is_local for shards in plan.sources)
        self.states = list(states)
        self.num_workers = num_workers

    def steps(self, part: int, parts: int, *, threads: int) -> Iterator[list[Row]]:
        """The rows of one worker's lanes, step by step, for ever."""
        mine = lanes_of(part, parts, range(len(self.states)))
        return rows_of(read_lanes(self.plan, [self.states[number] for number in mine]), threads)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None, "only worker processes iterate the dataset; the main process calls steps()"
        threads = len(range(worker.id, self.num_workers, worker.num_workers))
        try:
            for rows in self.steps(worker.id, worker.num_workers, threads=threads):
                yield _pack(rows), (self.storage.counters if self.is_remote else _NOTHING)
        except (StreamError, StorageError) as error:
            yield error  # torch would wrap it into a page of traceback


def _pack(rows: list[Row]) -> tuple[bytes, list[tuple[int, int]], torch.Tensor]:
    """Rows as (pickle without the arrays, (start, stop) of each array, all arrays in one tensor)."""
    buffers: list[pickle.PickleBuffer] = []
    skeleton = pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    spans, end = [], 0
    for view in views:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + view.nbytes
        spans.append((start, end))
    joined = torch.empty(end, dtype=torch.uint8)
    target = joined.numpy().data
    for view, (start, stop) in zip(views, spans, strict=True):
        target[start:stop] = view
    return skeleton, spans, joined


def _unpack(item: tuple[bytes, list[tuple[int, int]], torch.Tensor]) -> list[Row]:
    """The rows again; their arrays are views of the shared tensor."""
    skeleton, spans, joined = item
    source = joined.numpy().data
    rows: list[Row] = pickle.loads(skeleton, buffers=[source[start:stop] for start, stop in spans])
    return rows


def worker_died(error: BaseException) -> StreamError | None:
    """What to say where a worker process ended; torch raises that wherever the main process is at that moment.

    None for any other error.
    """
    told = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not told.startswith("DataLoader worker"):
        return None
    return StreamError(
        f"a process that reads data ended ({told.rstrip('.')}); the system kills one mostly because memory, or shared "
        "memory (/dev/shm), has run out: lower data.num_workers and go on with resume=RUN"
    )


def _identity(item: Any) -> Any:
    return item


def _ignore_signals(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process decides, and needs one more batch to do it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(workers: Sequence[BaseProcess]) -> None:
    """Make sure that no worker is left; they hold nothing that could be lost."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
