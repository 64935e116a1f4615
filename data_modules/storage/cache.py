"""The bounded cache of fetched ranges: one file a range, shared by all processes of a machine.

A file is written aside (`.part`) and renamed when it is whole, so a crash leaves only parts; the owner of a part holds
its lock, and whoever makes room removes parts that nobody holds. Nothing is flushed to the disk: a footer with the
length and a crc32 tells after a power cut that a file is not what was written, and it is fetched again.

The sizes of all files, the parts included, add up in `ledger`; every change of it happens under its lock, so the bound
holds over processes. Reading takes no lock: a file may be evicted under its reader, whose map stays valid.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import FileIO
from pathlib import Path
from types import TracebackType

from data_modules.storage.counters import Tally
from data_modules.storage.errors import StorageError

log = logging.getLogger(__name__)

_FOOTER = struct.Struct("<4sIQ")
_MAGIC = b"BSP1"
_FILE = re.compile(r"[0-9a-f]{64}\.span|[0-9a-f]{32}\.part")
_HEADROOM = 16
"""Making room frees a sixteenth of the cache more than is needed: looking through the folder is the dear part."""
_MAX_VERIFIED = 100_000


def cache_key(identity: str, version: str, start: int, stop: int) -> str:
    """The name of a range of one version of one file."""
    return sha256(f"{identity}\n{version}\n{start}\n{stop}".encode()).hexdigest()


class Part:
    """A file in the making: `write` its bytes in order, then `commit`. Leaving without a commit removes it."""

    def __init__(self, cache: Cache, path: Path, file: FileIO, target: Path, size: int) -> None:
        self._cache, self._path, self._file, self._target = cache, path, file, target
        self.size = size
        self.written = 0
        self._crc32 = 0

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._file.closed:
            self._cache.drop(self._path, self.size)
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append; StorageError when the disk is full."""
        assert self.written + len(data) <= self.size, f"{len(data)} bytes after {self.written} of {self.size}"
        self._append(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self.written += len(data)

    def restart(self) -> None:
        """Begin again at the first byte."""
        self._file.seek(0)
        self.written = self._crc32 = 0

    def commit(self) -> memoryview:
        """Put it under its name; its bytes, mapped."""
        assert self.written == self.size, f"{self.written} of {self.size} bytes were written"
        self._append(_FOOTER.pack(_MAGIC, self._crc32, self.size))
        data = memoryview(mmap.mmap(self._file.fileno(), self.size + _FOOTER.size, access=mmap.ACCESS_READ))
        self._cache.publish(self._path, self._target)
        self._file.close()
        return data[: self.size]

    def _append(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise _unusable(self._path.parent, error) from error


class Cache:
    """The files below `root`, at most `limit` bytes of them."""

    def __init__(self, root: Path, limit: int, tally: Tally) -> None:
        self.root, self.limit = root, limit
        self._tally = tally
        self._verified: set[tuple[str, int]] = set()

    def find(self, key: str, size: int) -> memoryview | None:
        """The bytes under a key, touched; None when they are not there or not what was written."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.root, error) from error
        try:
            data = self._checked(descriptor, key, size)
            if data is not None:
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                return data
        finally:
            os.close(descriptor)
        log.warning("%s is not what was written; it is fetched again", path)
        self._tally.add("corrupt")
        path.unlink(missing_ok=True)
        return None

    def part(self, key: str, size: int, what: str, patience_s: float) -> Part:
        """Room for `size` bytes, made by evicting what was longest unused; StorageError when there is no such room."""
        needed = size + _FOOTER.size
        if needed > self.limit:
            raise StorageError(
                f"{what}: {size} bytes are needed at once, the cache at {self.root} holds {self.limit}; "
                "raise data.cache_gb or lower the chunk of the source"
            )
        deadline = time.monotonic() + patience_s
        while (made := self._reserve(key, size, needed)) is None:
            if time.monotonic() > deadline:
                raise StorageError(f"{what}: the cache at {self.root} is full of unfinished files; raise data.cache_gb")
            time.sleep(0.05)  # other processes are filling it; their files can be evicted once they are whole
        return made

    def drop(self, path: Path, size: int) -> None:
        """Remove a part that was not finished, and give back its room."""
        with self._ledger() as (descriptor, total):
            path.unlink(missing_ok=True)
            _write_total(descriptor, max(0, total - size - _FOOTER.size))

    def publish(self, path: Path, target: Path) -> None:
        """Put a whole file under its name; with the ledger locked, or a count of the folder could miss it."""
        with self._ledger() as (descriptor, total):
            try:
                replaced = target.lstat().st_size  # by another process that wanted the same
            except FileNotFoundError:
                replaced = 0
            os.replace(path, target)
            _write_total(descriptor, max(0, total - replaced))

    def _reserve(self, key: str, size: int, needed: int) -> Part | None:
        with self._ledger() as (descriptor, total):
            if total + needed > self.limit:
                total = self._make_room(needed)
            if total + needed > self.limit:
                _write_total(descriptor, total)
                return None
            path = self.root / f"{uuid.uuid4().hex}.part"
            try:
                file = _new_part(path, needed)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _unusable(self.root, error) from error
            _write_total(descriptor, total + needed)
            return Part(self, path, file, self._path(key), size)

    @contextmanager
    def _ledger(self) -> Iterator[tuple[int, int]]:
        """The open, locked ledger and the total it holds."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.root / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.root, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0).strip()
            yield descriptor, int(text) if text.isdigit() else self._make_room(0)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has a copy, which would keep the lock
            os.close(descriptor)

    def _make_room(self, needed: int) -> int:
        """Remove orphaned parts and, where `needed` bytes do not fit, the files longest unused; the bytes left."""
        total, files = 0, []
        for path in self.root.iterdir():
            if not _FILE.fullmatch(path.name) or (path.suffix == ".part" and _is_orphan(path)):
                continue
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            total += status.st_size
            if path.suffix == ".span":
                files.append((status.st_mtime_ns, path.name, status.st_size))
        if total + needed <= self.limit:
            return total
        target = max(0, self.limit - needed - self.limit // _HEADROOM)
        for _, name, size in sorted(files):
            if total <= target:
                break
            (self.root / name).unlink(missing_ok=True)
            self._tally.add("evictions")
            total -= size
        return total

    def _checked(self, descriptor: int, key: str, size: int) -> memoryview | None:
        """The mapped bytes of an open file if it is whole; the crc32 is computed once a process."""
        status = os.fstat(descriptor)
        if status.st_size != size + _FOOTER.size:
            return None
        data = memoryview(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
        mark = (key, status.st_ino)
        if mark not in self._verified:
            if _FOOTER.unpack(data[size:]) != (_MAGIC, zlib.crc32(data[:size]), size):
                return None
            if len(self._verified) >= _MAX_VERIFIED:
                self._verified = set()
            self._verified.add(mark)
        return data[:size]

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.span"


def _new_part(path: Path, needed: int) -> FileIO:
    """An open, locked file of `needed` bytes: its size tells everybody what is reserved."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(needed)
    except OSError:
        file.close()
        raise
    return file


def _unusable(root: Path, error: OSError) -> StorageError:
    return StorageError(
        f"the cache {root} cannot be used ({error}); set data.cache_root to a folder on a local disk with room"
    )


def _write_total(descriptor: int, total: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(total).encode(), 0)


def _is_orphan(path: Path) -> bool:
    """Whether nobody writes a part any more; it is then removed. Only called with the ledger locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    path.unlink(missing_ok=True)
    return True
