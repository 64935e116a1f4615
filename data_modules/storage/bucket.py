"""Files in buckets (s3, gs, az, ...): whatever fsspec has a file system for, through `info`, `cat_file` and `ls`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from data_modules.storage.cache import Part
from data_modules.storage.errors import NotThereError, StorageError
from data_modules.storage.patience import HiccupError, Patience
from data_modules.storage.store import Facts, failures, file_system
from data_modules.storage.urls import printable, scrubbed

T = TypeVar("T")

_BLOCK = 16 << 20
"""cat_file returns bytes, so a long range is asked for in pieces of so many."""

_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "NoSuchBucket")
"""Failures that another try does not mend, by name: their libraries may not be installed."""


class BucketStore:
    """One scheme. options: of its fsspec file system, such as anon or endpoint_url."""

    def __init__(self, scheme: str, patience: Patience, options: Mapping[str, Any]) -> None:
        self._scheme = scheme
        own = _quick_s3(patience) if scheme == "s3" else {}
        self._options = {**own, **options}
        self._is_s3 = scheme == "s3"

    def look(self, url: str, peek: int) -> tuple[Facts, bytes]:
        """Size and version; no bytes."""
        info = self._ask(url, lambda system: system.info(url, **({"refresh": True} if self._is_s3 else {})))
        if info.get("type") != "file" or info.get("size") is None:
            raise NotThereError(f"{printable(url)} is not a file")
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        return Facts(int(info["size"]), version), b""

    def fetch(self, url: str, start: int, part: Part, facts: Facts) -> None:
        """Pieces until the part is full; then the store is asked whether the file is still the same."""
        while part.written < part.size:
            first = start + part.written
            last = min(first + _BLOCK, start + part.size)
            data = self._ask(url, partial(_piece, url, first, last))
            if len(data) != last - first:
                facts.check_same(self.look(url, 0)[0], url)
                raise HiccupError(f"the store sent {len(data)} of {last - first} bytes")
            part.write(data)
        facts.check_same(self.look(url, 0)[0], url)

    def list(self, url: str) -> list[str]:
        """The names of the files of a folder, sorted."""
        found = self._ask(url, lambda system: system.ls(url, detail=True, refresh=True))
        return sorted(entry["name"].rpartition("/")[2] for entry in found if entry.get("type") == "file")

    def _ask(self, url: str, question: Callable[[Any], T]) -> T:
        """One call of the library; every failure is a HiccupError or a StorageError."""
        system = file_system(self._scheme, self._options)
        try:
            return question(system)
        except FileNotFoundError as error:
            raise NotThereError(f"{printable(url)} is not there") from error
        except PermissionError as error:
            problem = scrubbed(str(error))
            raise StorageError(f"{printable(url)} cannot be read ({problem}); check who may read it") from error
        except failures() as error:
            said = scrubbed(f"{type(error).__name__} {error}").strip()
            if type(error).__name__ in _FINAL:
                raise StorageError(f"{printable(url)} cannot be read: {said}") from error
            raise HiccupError(said) from error


def _piece(url: str, start: int, stop: int, system: Any) -> bytes:
    data: bytes = system.cat_file(url, start=start, end=stop)
    return data


def _quick_s3(patience: Patience) -> dict[str, Any]:
    """Timeouts as asked for, and no retries inside the library: ours are logged, counted and bounded."""
    return {
        "config_kwargs": {
            "connect_timeout": patience.timeout_s,
            "read_timeout": patience.timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    }
