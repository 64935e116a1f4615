"""A run's folder: complete without any server, true at every moment, safe against being killed.

Small files are replaced in one step; logs are appended a line at a time and cut back to the checkpoint on resume, so
that a resumed run's files equal an uninterrupted run's.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

TIME_FIELDS = ("step_s", "wait_s", "tokens_per_s", "mfu")
"""Fields of metrics.jsonl that tell the clock, not the training: equality of two runs is judged without them."""

_PACKAGES = ("bestiary", "torch", "lightning", "transformers", "numpy", "safetensors", "hydra-core", "wandb", "pillow")


def now() -> str:
    """The present moment, UTC, ISO 8601 to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old or the new, and a crash leaves one of them."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True)
class Status:
    """What status.json tells: where the run stands.

    heartbeat: last sign of life (UTC). parent: what the weights started from. restarts: times the run was resumed.
    """

    state: Literal["running", "finished", "interrupted", "failed"] = "running"
    step: int = 0
    max_steps: int = 0
    stage: str = ""
    heartbeat: str = ""
    started: str = ""
    parent: str | None = None
    restarts: int = 0
    wandb_id: str | None = None
    error: str | None = None


class JsonLines:
    """An append-only log of records with a `step`, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; values that JSON has no word for (NaN) are an error."""
        line = json.dumps(record, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a last line that a kill cut short is left out."""
        return list(self._records())

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps and a half-written end."""
        if self.path.exists():
            kept = [json.dumps(r) for r in self._records() if r["step"] <= step]
            write_atomic(self.path, "".join(line + "\n" for line in kept))

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                log.warning("%s: line %d is incomplete and left out", self.path, number)
                return
            yield json.loads(line)


class FlightRecorder:
    """Which sample keys went into which step: JSON lines in zstandard frames, one frame a `flush`.

    A line is {"step": completed steps, "lanes": {lane: [keys]}}; whole frames are appended, so a kill loses at most
    the lines not yet flushed, and those steps are trained again on resume.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write one frame."""
        import zstandard

        if records:
            text = "".join(json.dumps(r) + "\n" for r in records)
            with self.path.open("ab") as file:
                file.write(zstandard.ZstdCompressor(level=9).compress(text.encode()))
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records of complete frames."""
        import zstandard

        if not self.path.exists():
            return []
        data, records = self.path.read_bytes(), []
        while data:
            frame = zstandard.ZstdDecompressor().decompressobj()
            text = frame.decompress(data)
            if not frame.eof:
                log.warning("%s: the last frame is incomplete and left out", self.path)
                break
            records += [json.loads(line) for line in text.decode().splitlines()]
            data = frame.unused_data
        return records

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps."""
        if self.path.exists():
            kept = [r for r in self.read() if r["step"] <= step]
            self.path.unlink()
            self.append(kept)


class RunDir:
    """The paths and small files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.eval = self.path / "eval"
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.evaluations = JsonLines(self.eval / "history.jsonl")
        self.samples = FlightRecorder(self.path / "samples.jsonl.zst")
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        """True if a run was started here."""
        return (self.path / "status.json").is_file()

    @property
    def status(self) -> Status:
        """The content of status.json."""
        raw = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        known = {f.name for f in fields(Status)}
        return Status(**{key: value for key, value in raw.items() if key in known})

    @property
    def is_locked(self) -> bool:
        """True while a living process holds this run."""
        try:
            self.lock()
        except ValueError:
            return True
        self.unlock()
        return False

    def lock(self) -> None:
        """Claim the run until this process ends, however it ends; a run that another process holds is refused."""
        if self._lock is not None:
            return
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            # A record lock, not flock: forked data workers may outlive a killed trainer and must not inherit the claim.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{self.path} is being trained by another process; stop that one first") from error
        self._lock = descriptor

    def unlock(self) -> None:
        """Let go of the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def start(self, *, config: str, resolved: str, stage: str = "") -> None:
        """Make a new run's folder; a folder that already holds a run is refused.

        config, resolved: YAML text of what was asked and of what it became.
        """
        if self.exists:
            at = f"{self.status.state} at step {self.status.step}"
            raise ValueError(f"{self.path} already holds a run ({at}): pass resume={self.path}, or another run_dir=")
        self.eval.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self.lock()
        write_atomic(self.path / "config.yaml", config)
        write_atomic(self.path / "config.resolved.yaml", resolved)
        self._write(Status(stage=stage, started=now(), heartbeat=now()))
        self.write_environment()

    def reopen(self, step: int) -> None:
        """Go on from `step`: cut every log back to it and count the restart."""
        for journal in (self.metrics, self.evaluations, self.samples):
            journal.cut_after(step)
        status = self.status
        self._write(replace(status, state="running", step=step, restarts=status.restarts + 1, error=None))
        self.write_environment()

    def update(self, **changes: Any) -> None:
        """Change fields of status.json; the heartbeat is set to now."""
        self._write(replace(self.status, heartbeat=now(), **changes))

    def write_environment(self) -> None:
        """Record versions, commit and devices of this start; those of the starts before it stay under `earlier`."""
        path = self.path / "environment.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        earlier = [*before.pop("earlier"), before] if before else []
        write_atomic(path, json.dumps({**environment(), "earlier": earlier}, indent=2) + "\n")

    def _write(self, status: Status) -> None:
        write_atomic(self.path / "status.json", json.dumps(asdict(status), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Where a run ran: versions, git commit, command, devices."""
    import torch

    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": git_commit(Path(__file__).parent),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the source tree, with `+dirty` if tracked files were changed; None outside a repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=10)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode != 0:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the git commit is not recorded: %s", error)
        return None
    return head.stdout.strip() + ("+dirty" if changed else "")
