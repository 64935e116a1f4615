"""A run's folder: complete without any server, true at every moment, safe against being killed.

Small files are replaced in one step; logs are appended a line at a time and cut back to the checkpoint on resume, so
that a resumed run's files equal an uninterrupted run's.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import msgspec

from bestiary.training.flight import FlightRecorder

log = logging.getLogger(__name__)

TIME_FIELDS = ("step_s", "wait_s", "tokens_per_s", "mfu", "remote")
"""Fields of metrics.jsonl about the clock or the network; whether two runs are equal is judged without them."""

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
    """An append-only log of records whose `step` never falls, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; values that JSON has no word for (NaN) are an error."""
        line = json.dumps(record, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a last line that a kill cut short is left out."""
        return list(self.steps())

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[dict[str, Any]]:
        """The records of these steps, both included (None: to the end); found by bisection, the rest is not read."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            start = self._end_of(file, first - 1)
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    log.warning("%s: the last line is incomplete and left out", self.path)
                    return
                record = self._record(line, start)
                if last is not None and record["step"] > last:
                    return
                start += len(line)
                yield record

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps and a half-written end."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(self._end_of(file, step))
                os.fsync(file.fileno())

    def _end_of(self, file: IO[bytes], step: int) -> int:
        """Bytes up to and including the last record of this step or an earlier one."""
        low, high = 0, os.fstat(file.fileno()).st_size
        while low < high:  # lines before `low` are kept, lines that begin at `high` or later are not
            middle = (low + high) // 2
            file.seek(max(low, middle - 1))
            if middle > low:
                file.readline()  # to the first line that begins at `middle` or later
            start = file.tell()
            line = file.readline() if start < high else b""
            if line.endswith(b"\n") and self._record(line, start)["step"] <= step:
                low = start + len(line)
            else:
                high = middle
        return low

    def _record(self, line: bytes, start: int) -> dict[str, Any]:
        """The record of the line at this byte; ValueError where it is none."""
        try:
            record = json.loads(line.decode())
            problem = "" if isinstance(record, dict) and isinstance(record.get("step"), int) else "it has no step"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise ValueError(
                f"{self.path}: the line at byte {start} is damaged ({problem}); delete that line, or move the file "
                "away to go on without it"
            )
        return cast(dict[str, Any], record)


class RunDir:
    """The paths and small files of one run.

    changes: what a resume changed in the stream {step, time, lines}. left_out: samples that were skipped or damaged up
    to a checkpoint {step, lines}, written where a checkpoint finds more than the one before. mix: see `write_mix`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.eval = self.path / "eval"
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.evaluations = JsonLines(self.eval / "history.jsonl")
        self.changes = JsonLines(self.path / "changes.jsonl")
        self.left_out = JsonLines(self.path / "left_out.jsonl")
        self.samples = FlightRecorder(self.path / "samples.jsonl.zst")
        self._lock: int | None = None
        self._options_before: dict[str, str] = {}

    @property
    def exists(self) -> bool:
        """True if a run was started here."""
        return (self.path / "status.json").is_file()

    @property
    def status(self) -> Status:
        """The content of status.json; ValueError where it is damaged."""
        path = self.path / "status.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            status = msgspec.convert(raw, Status)
            lacking = [name for name in ("state", "step") if name not in raw]
            problem = f"it has no {' and no '.join(lacking)}" if lacking else ""
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise ValueError(
                f'{path} is damaged ({problem}); write {{"state": "interrupted", "step": 0}} into it, and '
                f"resume={self.path} goes on from the newest checkpoint"
            )
        return status

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

    def check_free(self) -> None:
        """Raise where this folder already holds a run."""
        if self.exists:
            at = f"{self.status.state} at step {self.status.step}"
            raise ValueError(f"{self.path} already holds a run ({at}): pass resume={self.path}, or another run_dir=")

    def start(self, *, config: str, resolved: str, stage: str = "") -> None:
        """Make a new run's folder; a folder that already holds a run is refused.

        config, resolved: YAML text of what was asked and of what it became.
        """
        self.check_free()
        self.eval.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self.lock()
        write_atomic(self.path / "config.yaml", config)
        write_atomic(self.path / "config.resolved.yaml", resolved)
        self._write(Status(stage=stage, started=now(), heartbeat=now()))
        self.write_environment()

    def ask(self, *, config: str, resolved: str) -> None:
        """Replace the options, which the next resume stands on; see `start` and `unless_refused`."""
        for name, text in (("config.yaml", config), ("config.resolved.yaml", resolved)):
            path = self.path / name
            if path.is_file():
                self._options_before[name] = path.read_text(encoding="utf-8")
            write_atomic(path, text)

    def begun(self) -> None:
        """Training has begun with the new options: they are the run's own from here on."""
        self._options_before = {}

    @contextlib.contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Puts the options back as they were before `ask` where something raises before training has begun."""
        try:
            yield
        except BaseException as error:
            if self._options_before:
                for name, text in self._options_before.items():
                    write_atomic(self.path / name, text)
                self._options_before = {}
                self.update(state="failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
            raise

    def reopen(self, step: int, change: Mapping[str, Any] | None = None) -> None:
        """Go on from `step`: cut every log back to it and count the restart. change: see `set_change`."""
        status, _ = self.status, self._environments()  # damaged ones are refused before anything changes
        for journal in (self.metrics, self.evaluations, self.left_out, self.samples):
            journal.cut_after(step)
        self.set_change(step, change)
        self._write(replace(status, state="running", step=step, restarts=status.restarts + 1, error=None))
        self.write_environment()

    def set_change(self, step: int, change: Mapping[str, Any] | None) -> None:
        """Keep what a resume at `step` changes in the stream, in place of what an earlier one changed there or later.

        The file is replaced in one step: other ranks read it at the same time.
        """
        before = self.changes.read()
        records = [*(record for record in before if record["step"] < step), *([change] if change else [])]
        if records != before:
            write_atomic(self.changes.path, "".join(f"{json.dumps(one, allow_nan=False)}\n" for one in records))

    def update(self, **changes: Any) -> None:
        """Change fields of status.json; the heartbeat is set to now."""
        self._write(replace(self.status, heartbeat=now(), **changes))

    def write_environment(self) -> None:
        """Record versions, commit and devices of this start; those of the starts before it stay under `earlier`."""
        text = json.dumps({**environment(), "earlier": self._environments()}, indent=2) + "\n"
        write_atomic(self.path / "environment.json", text)

    def _environments(self) -> list[dict[str, Any]]:
        """The environments of the starts so far; ValueError where environment.json is damaged."""
        path = self.path / "environment.json"
        if not path.exists():
            return []
        try:
            last = json.loads(path.read_text(encoding="utf-8"))
            return [*last.pop("earlier"), last]
        except (ValueError, RecursionError) as error:
            problem = str(error)
        except (LookupError, TypeError, AttributeError):
            problem = "it does not hold what a start wrote"
        raise ValueError(f"{path} is damaged ({problem}); move it away to go on without the environments of before")

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
