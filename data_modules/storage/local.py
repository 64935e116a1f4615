"""A folder on this machine: its files are mapped, never copied."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from data_modules.storage.errors import NotThereError, StorageError
from data_modules.storage.mapping import mapped
from data_modules.storage.urls import checked_name

_MAX_MAPS = 64
_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What letting go of other files mends: the caller's business."""


class LocalFolder:
    """Files below one local folder; `location` is its path. Links, devices and pipes are refused."""

    is_local = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.location = str(path)
        self._maps: dict[str, memoryview] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "location": self.location}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = {}

    def __repr__(self) -> str:
        return f"LocalFolder({self.location!r})"

    def read(self, name: str) -> memoryview:
        """A whole file."""
        return self.map(name)

    def map(self, name: str) -> memoryview:
        """A whole file, mapped read-only without reading it; the caller keeps it as long as it is wanted."""
        descriptor, size = self._opened(name)
        try:
            return mapped(descriptor, size)
        finally:
            os.close(descriptor)

    def span(self, name: str, start: int, stop: int) -> memoryview:
        """The bytes from `start` up to `stop`, fewer where the file ends before; slices of maps that are kept."""
        if not 0 <= start <= stop:
            raise StorageError(f"{self.path / name}: there is no range {start}..{stop}")
        data = self._maps.get(name)
        if data is None:
            data = self.map(name)
            if len(self._maps) >= _MAX_MAPS:
                self._maps = {}  # a lock held at a fork would stay held in the child; mapping again costs little
            self._maps[name] = data
        return data[start:stop]

    def exists(self, name: str) -> bool:
        """Whether a regular file of that name is there."""
        path = self._path(name)
        try:
            return path.is_file() and not path.is_symlink()
        except OSError as error:
            raise _unreadable(path, error) from error

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._status(name).st_size

    def expect(self, name: str, size: int) -> None:
        """Nothing: what lies on a disk is the file, whatever its size."""

    def version(self, name: str) -> str:
        """Time of change and size: another one means that the file was written again."""
        status = self._status(name)
        return f"{status.st_mtime_ns}-{status.st_size}"

    def list(self) -> list[str]:
        """Names of the regular files directly in the folder, sorted."""
        if not self.path.is_dir():
            raise NotThereError(f"folder {self.path} does not exist")
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _path(self, name: str) -> Path:
        path = self.path / checked_name(name)
        if "/" in name and not path.parent.resolve().is_relative_to(self.path.resolve()):
            raise StorageError(f"{path} leaves {self.path} through a link; copy the files into the folder")
        return path

    def _status(self, name: str) -> os.stat_result:
        path = self._path(name)
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotThereError(f"{path} does not exist") from error
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{path} is not a regular file; copy the shard here")
        return status

    def _opened(self, name: str) -> tuple[int, int]:
        """Descriptor and size of a regular file. The flags close the gap between looking and opening.

        OSError where the process has too many files open already.
        """
        self._status(name)
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _SHORT_OF:
                raise
            raise _unreadable(path, error) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise StorageError(f"{path} is not a regular file; copy the shard here")
        return descriptor, status.st_size


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be read ({error.strerror or error}); check the path and who may read it")
