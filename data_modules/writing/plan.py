"""What the writer is asked for, what it says on the way, and what it reports."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from data_modules.adapters.protocol import Adapter
from data_modules.index import FORMAT

MAX_REJECTED = 0.01
"""Share of rejected records beyond which a source is not finished: more is rarely what the user meant."""


class WritingError(ValueError):
    """The writer cannot go on; one line that says why, what is kept and what to do."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a source goes and how.

    samples_per_shard: records dealt to one shard; rejected ones make it smaller. workers: processes; with 1 everything
    happens in the calling one. max_rejected: share of rejected records up to which the source is finished.
    overwrite: replace whatever the folder holds. limit: only so many records.
    """

    folder: Path
    source: str
    licence: str = ""
    samples_per_shard: int = 1000
    workers: int = field(default_factory=available_cores)
    max_rejected: float = MAX_REJECTED
    overwrite: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise WritingError("the source has no name; give one with --source")
        for name in ("samples_per_shard", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WritingError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.max_rejected <= 1:
            raise WritingError(f"max_rejected is {self.max_rejected}; it is a share, from 0 to 1")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a writer is: counts of this source, those of an earlier attempt included.

    bytes: of finished shards. share: of the annotations read, None where the format cannot tell.
    """

    records: int = 0
    samples: int = 0
    rejected: int = 0
    bytes: int = 0
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A finished source. kinds: rejections by class. resumed: records that an earlier attempt had done."""

    folder: Path
    state: Literal["written", "unchanged"]
    records: int
    samples: int
    shards: int
    bytes: int
    kinds: Mapping[str, int]
    resumed: int = 0

    @property
    def rejected(self) -> int:
        """Rejections of every class."""
        return sum(self.kinds.values())


def identity_of(adapter: Adapter, plan: Plan) -> dict[str, str]:
    """A short hash of everything that the bytes of a source depend on, by name: equal ones may be continued.

    Only hashes leave this machine with source.json: no path of it does.
    """
    try:
        own = adapter.identity()
    except OSError as error:
        raise WritingError(
            f"{error.filename}: {error.strerror}; name the annotations and --images as they lie"
        ) from error
    facts: dict[str, Any] = {
        **own,
        "adapter": adapter.name,
        "shards": FORMAT,
        "source": plan.source,
        "licence": plan.licence,
        "samples_per_shard": plan.samples_per_shard,
        "limit": plan.limit,
    }
    return {name: _short_hash(name, value) for name, value in sorted(facts.items())}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The names under which two identities differ."""
    return ", ".join(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))


def _short_hash(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WritingError(f"identity {name!r} of the adapter is not plain JSON: {error}") from error
    return sha256(text.encode()).hexdigest()[:16]
