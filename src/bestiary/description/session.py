"""Summaries by a model of our own."""

from __future__ import annotations

import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from bestiary.inference.session import Session, Settings
from bestiary.saved_weights import open_weights


class SessionSummariser:
    """A Summariser that asks a trained run, without a picture; one call at a time.

    path: a run directory. ValueError for a prompt that leaves no room for an answer.
    """

    name = "session"

    def __init__(self, path: Path, *, device: str = "cpu", max_new_tokens: int = 512, temperature: float = 0.0) -> None:
        settings = replace(Settings(), max_new_tokens=max_new_tokens, temperature=temperature)
        self._session = Session.from_run(path, device=device, settings=settings)
        self._run = path
        # It holds the hashes of the checkpoint's files.
        self._manifest = sha256((open_weights(path, what="run").path / "MANIFEST.json").read_bytes()).hexdigest()
        self._settings = settings
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """The checkpoint's content, wherever it lies, and the settings."""
        return f"session {self._manifest} {self._settings}"

    def __call__(self, prompt: str) -> str:
        """The answer, which must not be empty."""
        with self._lock:
            answer = self._session.respond(None, prompt).strip()
        if not answer:
            raise ValueError(f"{self._run} answers with nothing; train it to summarise, or take another")
        return answer
