"""Storage: how this run reaches its shards; it holds no file and no connection of its own, so it travels to workers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_modules.storage.counters import Counters
from data_modules.storage.errors import StorageError
from data_modules.storage.folder import Folder
from data_modules.storage.local import LocalFolder
from data_modules.storage.patience import Patience
from data_modules.storage.remote import Remote, RemoteFolder
from data_modules.storage.urls import REMOTE_SCHEMES, local_path, printable, scheme_of

DEFAULT_CACHE_BYTES = 20 * 2**30


class Storage:
    """Opens folders, local and remote; picklable, safe over threads, forks and spawned processes.

    cache_root: holds what was fetched (in `spans`) and the indexes of tars that cannot have them beside them; a folder
    on a local disk, None is `bestiary/shards` in the user's cache folder. cache_bytes: the most that `spans` takes,
    over all processes. attempts: tries of a request before the run stops. timeout_s: silence that ends one try.
    backoff_s: the first wait between tries, doubled at each. options: scheme -> keyword arguments of its fsspec file
    system, such as {"s3": {"anon": True}}; the environment (AWS_ENDPOINT_URL and the like) is honoured without them.
    http's also serve https.
    """

    def __init__(
        self,
        cache_root: Path | str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        attempts: int = 5,
        timeout_s: float = 30.0,
        backoff_s: float = 0.5,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if cache_bytes < 1:
            raise StorageError(f"cache_bytes={cache_bytes}; raise data.cache_gb above 0")
        unknown = sorted(set(options or {}) - set(REMOTE_SCHEMES))
        if unknown:
            raise StorageError(f"storage options for {unknown}; there are {', '.join(REMOTE_SCHEMES)}")
        self.cache_bytes = cache_bytes
        self.cache_root = Path(cache_root) if cache_root is not None else default_cache_root()
        self._remote = Remote(self.cache_root / "spans", cache_bytes, Patience(attempts, timeout_s, backoff_s), options)

    def folder(self, location: str | Path) -> Folder:
        """The folder at a local path or a URL; nothing is read yet. StorageError for an address that is not opened."""
        text = str(location)
        scheme = scheme_of(text)
        if scheme is None or scheme == "file":
            return LocalFolder(local_path(text))
        if scheme not in ("http", "https") and "@" in text.partition("//")[2].partition("/")[0] and scheme != "abfs":
            raise StorageError(f"{printable(text)}: keys do not belong into an address; set them in the environment")
        return RemoteFolder(text, self._remote)

    @property
    def counters(self) -> Counters:
        """What this process has fetched, found and repeated so far; workers count for themselves."""
        return self._remote.counters


def default_cache_root() -> Path:
    """Where fetched ranges are kept unless a folder is named."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a user without a home, as in some containers
        home = f"{tempfile.gettempdir()}/cache-{os.getuid()}"
    return Path(home) / "bestiary" / "shards"
