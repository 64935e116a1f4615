"""Answers of experts on disk: one small JSON file for each, under a key that says everything the answer depends on.

Several threads and processes may share one folder: files appear whole, and two that make one answer write equal files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised where a step changes what it makes of equal experts' answers."""


class Cache:
    """The answers below one folder, in a folder for each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, step: str, *key: str) -> Any:
        """The answer of a step, or None; a damaged file is reported and counts as none."""
        path = self._path(step, key)
        try:
            found = json.loads(path.read_bytes())
            if found["key"] != list(key):
                raise ValueError("it answers another question")
            return found["answer"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s; the answer is made again", path, error)
            return None

    def put(self, step: str, answer: Any, *key: str) -> None:
        """Keep an answer (plain JSON, never null)."""
        path = self._path(step, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": list(key), "answer": answer}, allow_nan=False)
        aside, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(aside, "w", encoding="ascii") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _path(self, step: str, key: tuple[str, ...]) -> Path:
        digest = sha256(json.dumps([FORMAT, step, *key]).encode()).hexdigest()
        return self.folder / step / digest[:2] / f"{digest}.json"
