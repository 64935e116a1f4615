"""Which run goes on, from where, and whether it may: `resume=<run|auto>` resolved before anything is built."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from bestiary.saved_weights import CheckpointError
from bestiary.training.checkpoints import Checkpoint, newest
from bestiary.training.mix import change_of
from bestiary.training.run_dir import RunDir

if TYPE_CHECKING:
    from bestiary.training.fit import TrainingData

log = logging.getLogger(__name__)

_NEUTRAL = (
    *("cluster.", "logger.", "suite.", "run_dir", "resume", "parent", "dry_run", "attention"),
    *("stage.checkpoint_every", "stage.keep_checkpoints", "stage.log_every"),
)
"""Settings that may differ between a run and its resumption without changing what it computes."""

_OF_THE_STREAM = ("data.", "stream.")
"""Settings whose changes the stream itself judges: it refuses them, or says what they change in the rows to come."""


def resume_path(resume: str | None, runs_root: Path, stage: str) -> Path | None:
    """The run directory to go on with; None starts a new run.

    resume: None, a run directory, or `auto`: the unfinished run of this stage below `runs_root` that was alive last,
    and a new run if there is none.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        if not RunDir(path).exists:
            near = sorted(str(p.parent) for p in runs_root.glob("**/status.json"))[-3:]
            raise ValueError(
                f"resume={resume} is not a run directory (no status.json); the latest are {near or 'none'}"
            )
        return path
    alive: list[tuple[str, Path]] = []
    for file in runs_root.glob("**/status.json"):
        status = RunDir(file.parent).status
        if status.stage == stage and status.state != "finished" and not RunDir(file.parent).is_locked:
            alive.append((status.heartbeat, file.parent))
    if not alive:
        log.info("resume=auto: no unfinished run of stage %s below %s; starting a new one", stage, runs_root)
    return max(alive)[1] if alive else None


def open_run(
    path: Path,
    *,
    resume: bool,
    stage: str,
    config: str,
    resolved: str,
    accept: Callable[[Checkpoint], Mapping[str, Any] | None] | None = None,
) -> tuple[RunDir, Checkpoint | None]:
    """The run directory, made anew or opened to go on from its newest complete checkpoint (None: from step 0).

    config, resolved: YAML text, which a resume replaces: it is what the next one stands on. accept: raises where the
    run cannot go on from its checkpoint, and returns what changes there in its stream (`accept_stream`); called before
    anything in the directory changes, so a refused resume leaves the run as it was. Of several ranks only the first
    writes; all read the same checkpoint. The directory stays locked until the process ends, so that no second process
    trains in it.
    """
    run = RunDir(path)
    is_writer = launched_rank() == 0
    if not resume:
        if is_writer:
            run.start(config=config, resolved=resolved, stage=stage)
        return run, None
    if is_writer:
        run.lock()
    checkpoint = newest(run.checkpoints)
    step, change = checkpoint.state.step if checkpoint else 0, None
    if checkpoint is None:
        log.warning("resume=%s: no complete checkpoint yet; starting again at step 0", path)
    elif checkpoint.state.stage != stage:
        raise CheckpointError(
            f"{path} is a run of stage {checkpoint.state.stage}, not of {stage}; use it as parent={path}"
        )
    elif accept is not None:
        change = accept(checkpoint)
    if is_writer:
        _warn_of_changes(run, resolved)
        run.reopen(step, change)  # before the options: a resume of their own must know that they were meant
        run.ask(config=config, resolved=resolved)
    return run, checkpoint


def accept_stream(run: RunDir, checkpoint: Checkpoint, data: TrainingData) -> dict[str, Any] | None:
    """Let the stream go on from a checkpoint, or raise; returns what that changes in it, as `RunDir.changes` keeps it.

    A run that was told to change its stream at this checkpoint, and died before the next one, makes the same change
    again without being told.
    """
    state = checkpoint.state
    wanted = hashlib.sha256(json.dumps(data.fingerprint(), sort_keys=True, default=str).encode()).hexdigest()
    for record in run.changes.steps(state.step, state.step):
        if data.on_change == "refuse" and record.get("stream") == wanted:
            data.on_change = record["on_change"]
    data.load_states(state.lanes, state.fingerprint)
    lines = data.explain_change(state.lanes, state.fingerprint)
    return change_of(state.step, lines, state.totals, on_change=data.on_change, stream=wanted)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and scalars are leaves."""
    if not isinstance(tree, Mapping):
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The global rank torchrun or SLURM gave this process; 0 when it was started by hand."""
    for name in ("RANK", "SLURM_PROCID"):
        if environment.get(name):
            return int(environment[name])
    return 0


def num_launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun or SLURM started for this run; 1 when it was started by hand."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if environment.get(name):
            return int(environment[name])
    return 1


def _warn_of_changes(run: RunDir, resolved: str) -> None:
    before = (run.path / "config.resolved.yaml").read_text(encoding="utf-8")
    old, new = (flatten(OmegaConf.to_container(OmegaConf.create(text))) for text in (before, resolved))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not key.startswith((*_NEUTRAL, *_OF_THE_STREAM))]
    for key in changed:
        log.warning(
            "resume: %s was %s and is now %s; the run will not equal an uninterrupted one",
            key,
            old.get(key, "absent"),
            new.get(key, "absent"),
        )
