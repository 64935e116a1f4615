"""What a folder of shards can do, wherever it lies."""

from __future__ import annotations

import builtins
from typing import Protocol


class Folder(Protocol):
    """Files below one location; every method raises StorageError, or NotThereError for a file that does not exist.

    location: for messages, without passwords and signatures. Names are relative, without `.` and `..`.
    """

    @property
    def location(self) -> str:
        """Where it lies, fit to be printed."""

    @property
    def is_local(self) -> bool:
        """Whether `map` is offered."""

    def read(self, name: str) -> memoryview:
        """A whole small file."""

    def map(self, name: str) -> memoryview:
        """A whole file as a read-only map; local folders only."""

    def span(self, name: str, start: int, stop: int) -> memoryview:
        """The bytes from `start` up to `stop`, fewer where the file ends before."""

    def exists(self, name: str) -> bool:
        """Whether the file is there; an outage is an error, not False."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def expect(self, name: str, size: int) -> None:
        """StorageError where a store has something else in the place of a file of `size` bytes; not a shorter file."""

    def version(self, name: str) -> str:
        """Changes when the file is written again: time and size, or the store's ETag and size."""

    def list(self) -> builtins.list[str]:
        """Names of the files directly in the folder, sorted; a web server cannot tell."""
