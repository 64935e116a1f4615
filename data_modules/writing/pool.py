"""Batches through processes and back in their order, a bounded number under way."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType

from data_modules.adapters.protocol import Record
from data_modules.writing.batches import Made, ShardMaker
from data_modules.writing.plan import WritingError

EXTRA = 2
"""Batches waiting beside those that workers hold, so that none idles while the main process commits."""

_maker: ShardMaker | None = None
"""Of a worker process."""


class Pool:
    """Makes batches in `workers` processes (with 1: in this one); a context manager.

    Processes are spawned, so they share no descriptor with this one, and end when it does, however it ends: they hold
    the other end of a pipe that nobody writes to.
    """

    def __init__(self, maker: ShardMaker, workers: int) -> None:
        self._maker = maker
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._life: Connection | None = None

    def __enter__(self) -> Pool:
        if self._workers > 1:
            context = get_context("spawn")
            theirs, self._life = context.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(self._workers, context, _start_worker, (self._maker, theirs))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._executor is None or self._life is None:
            return
        if kind is not None:
            self._life.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._life.close()

    def in_order(self, batches: Iterable[tuple[int, Sequence[Record]]]) -> Iterator[tuple[int, Sequence[Record], Made]]:
        """(number, records, what was made) of every batch; at most workers + EXTRA are under way."""
        pending: deque[tuple[int, Sequence[Record], Callable[[], Made]]] = deque()
        depth = self._workers + EXTRA if self._executor else 1
        for number, records in batches:
            if len(pending) == depth:
                first, batch, result = pending.popleft()
                yield first, batch, result()
            pending.append((number, records, self._submit(number, records)))
        while pending:
            first, batch, result = pending.popleft()
            yield first, batch, result()

    def again(self, number: int, records: Sequence[Record], refused: Collection[int]) -> Made:
        """Make one batch once more, without the samples of some keys."""
        return self._submit(number, records, refused)()

    def _submit(self, number: int, records: Sequence[Record], refused: Collection[int] = ()) -> Callable[[], Made]:
        if self._executor is None:
            return lambda: self._maker.make(number, records, refused)
        # A process is started in here. It inherits the mask: an interrupt while it starts is the main process's, too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            future = self._executor.submit(_make, number, records, refused)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return lambda: _result(future)


def _result(future: Future[Made]) -> Made:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WritingError("a worker process died (out of memory?); run it again with fewer --workers") from error


def _start_worker(maker: ShardMaker, life: Connection) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    _maker = maker
    threading.Thread(target=_die_with_parent, args=(life,), daemon=True).start()


def _die_with_parent(life: Connection) -> None:
    life.poll(None)
    os._exit(1)


def _make(number: int, records: Sequence[Record], refused: Collection[int]) -> Made:
    assert _maker is not None, "the initialiser ran first"
    return _maker.make(number, records, refused)
