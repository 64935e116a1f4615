"""The journal of an unfinished source: which batches are done, in their order, each line flushed to the disk.

`journal.jsonl` begins with the identity of the output and has one line a batch; it disappears when the source is
finished. `rejected.jsonl` beside it has one line a rejection and stays. Whatever follows the last whole line of the
journal never happened: a reader cuts both files there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from data_modules.index import Shard
from data_modules.writer import is_whole
from data_modules.writing.batches import Rejected
from data_modules.writing.plan import WritingError

JOURNAL_FILE = "journal.jsonl"
REJECTED_FILE = "rejected.jsonl"

_log = logging.getLogger(__name__)


class Done(msgspec.Struct, frozen=True):
    """One finished batch: shard (None where all was rejected), rejections by class, size of rejected.jsonl after it."""

    records: int
    shard: Shard | None
    kinds: dict[str, int]
    rejected_bytes: int


class Journal:
    """The open journal of a folder, locked against a second writer; a context manager.

    `identity` and `done` are what an earlier attempt left (None and empty in a fresh folder).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity: dict[str, str] | None = None
        self.done: list[Done] = []
        self._fd = -1

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o644)
        self._lock()
        lines, self._ends = _whole_lines(self._path.read_bytes())
        identity = _decode(lines[0], dict[str, str]) if lines else None
        if identity is not None:
            self.identity = identity
            self.done = self._believable(lines[1:])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def begin(self, identity: Mapping[str, str]) -> None:
        """Forget an earlier attempt, if any, and start with this identity."""
        self.identity, self.done = dict(identity), []
        (self.folder / REJECTED_FILE).unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)
        self._append(self.identity)

    def resume(self) -> None:
        """Cut both files to what `done` says."""
        os.ftruncate(self._fd, self._ends[len(self.done)])
        rejected = self.folder / REJECTED_FILE
        if rejected.exists():
            os.truncate(rejected, self._rejected_bytes)

    def commit(self, records: int, shard: Shard | None, rejected: Sequence[Rejected]) -> Done:
        """Note the next batch: its rejections first, then the line that makes both count."""
        if rejected:
            lines = b"".join(msgspec.json.encode(line) + b"\n" for line in rejected)
            with (self.folder / REJECTED_FILE).open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        kinds: dict[str, int] = {}
        for line in rejected:
            kinds[line.kind] = kinds.get(line.kind, 0) + 1
        size = self._rejected_bytes + (len(lines) if rejected else 0)
        done = Done(records, shard, kinds, size)
        self._append(done)
        self.done.append(done)
        return done

    def first_rejected(self) -> str:
        """Where the first rejection was and what its problem is."""
        with (self.folder / REJECTED_FILE).open("rb") as file:
            first = msgspec.json.decode(file.readline(), type=Rejected)
        return f"{first.where} {first.problem}"

    def remove(self) -> None:
        """The source is finished."""
        self._path.unlink()

    @property
    def shards(self) -> list[Shard]:
        """The shards so far."""
        return [done.shard for done in self.done if done.shard is not None]

    @property
    def _path(self) -> Path:
        return self.folder / JOURNAL_FILE

    @property
    def _rejected_bytes(self) -> int:
        return self.done[-1].rejected_bytes if self.done else 0

    def _append(self, content: Any) -> None:
        data = msgspec.json.encode(content) + b"\n"
        if os.write(self._fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        os.fsync(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise WritingError(
                f"another process is writing into {self.folder}; wait for it or choose another folder"
            ) from error
        except OSError as error:
            _log.warning("%s: this file system cannot lock (%s); do not start a second writer", self._path, error)

    def _believable(self, lines: Sequence[bytes]) -> list[Done]:
        """The batches from the first on whose lines, shards and rejections are all there."""
        rejected = self.folder / REJECTED_FILE
        written = rejected.stat().st_size if rejected.exists() else 0
        found = []
        for line in lines:
            done = _decode(line, Done)
            if done is None or done.rejected_bytes > written:
                break
            if done.shard is not None and not is_whole(self.folder, done.shard):
                break
            found.append(done)
        return found


def _whole_lines(data: bytes) -> tuple[list[bytes], list[int]]:
    """The lines that end, and where each does."""
    lines = data.split(b"\n")[:-1]
    ends, at = [], 0
    for line in lines:
        at += len(line) + 1
        ends.append(at)
    return lines, ends


def _decode(line: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        _log.warning("journal: a line is broken (%s); what follows is written again", error)
        return None
