"""What the kinds of remote stores have in common, and the making of their fsspec file systems."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from data_modules.storage.cache import Part
from data_modules.storage.errors import StorageError
from data_modules.storage.urls import printable

SLOWEST_RATE = 32 * 1024
"""Bytes a second: a store that sends less over a whole request counts as one that does not answer."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a store said of a file. version: "" where it tells none. has_ranges: False if it only sends whole files."""

    size: int
    version: str
    has_ranges: bool = True

    def check_same(self, now: Facts, url: str) -> None:
        """StorageError where a later answer tells of another file."""
        is_other = self.version and now.version and self.version != now.version
        if is_other or self.size != now.size:
            before, after = (f"{facts.size} bytes, version {facts.version or 'unknown'}" for facts in (self, now))
            raise StorageError(
                f"{printable(url)} changed while the run read it ({before}; now {after}); the samples of this run "
                "would not be those of its index; restore the file or start anew"
            )


class RangesIgnoredError(Exception):
    """The server sent the whole file where a range was asked for."""


class Store(Protocol):
    """One kind of store. Its methods raise HiccupError for what may pass, StorageError for what will not."""

    def look(self, url: str, peek: int) -> tuple[Facts, bytes]:
        """What the store says of a file, and its first bytes: up to `peek` of them, if they come for nothing."""

    def fetch(self, url: str, start: int, part: Part, facts: Facts) -> None:
        """Write the bytes from `start + part.written` on until the part is full."""

    def list(self, url: str) -> list[str]:
        """The names of the files of a folder, sorted."""


_FILE_SYSTEMS: dict[tuple[object, ...], Any] = {}
"""By process id, scheme, options and environment; kept to the end of the process. In a forked child, a finaliser of the
parent's file system would take the parent's connections out of the event queue that both share."""


_SETTINGS = ("AWS_", "AZURE_", "GOOGLE_", "GCSFS_", "FSSPEC_")


def file_system(scheme: str, options: Mapping[str, Any]) -> Any:
    """This process's fsspec file system of a scheme; StorageError names the extra that is not installed."""
    environment = sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
    key = (os.getpid(), scheme, repr(sorted(options.items())), tuple(environment))
    found = _FILE_SYSTEMS.get(key)
    if found is None:
        try:
            import fsspec

            found = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        except ImportError as error:
            raise StorageError(f"{scheme}:// needs {_INSTALL.get(scheme, _INSTALL['s3'])}") from error
        if scheme == "s3":
            found.retries = 1  # ours are logged, counted and bounded; its own would multiply with them
        found = _FILE_SYSTEMS.setdefault(key, found)
    return found


_INSTALL = {
    "s3": "a package that is not installed; pip install bestiary[remote]",
    **dict.fromkeys(("gs", "gcs"), "the package gcsfs; pip install gcsfs"),
    **dict.fromkeys(("az", "abfs"), "the package adlfs; pip install adlfs"),
}


_FAILURES = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "azure.core.exceptions": ("AzureError",),
}


def failures() -> tuple[type[Exception], ...]:
    """What a store's library raises when it cannot reach the store; only libraries that are loaded are asked."""
    known: list[type[Exception]] = [OSError, TimeoutError, EOFError]
    for module, names in _FAILURES.items():
        if module in sys.modules:
            known += [getattr(sys.modules[module], name) for name in names]
    return tuple(known)
