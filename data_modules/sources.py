"""The sources of a mix: what the configuration says of them, and opening them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_modules.index import SOURCE_FILE
from data_modules.shards import ShardSet


class StreamError(ValueError):
    """Something a user can put right: a source, an option, a damaged shard. One line."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of a mix.

    path: folder of shards; with `split`, the folder of that name below it. weight: share, on any scale.
    domain: the only domain the folder may hold; None accepts all. licence, origin: for people.
    """

    name: str
    path: Path
    weight: float = 1.0
    domain: str | None = None
    split: str | None = None
    licence: str = ""
    origin: str = ""

    @property
    def folder(self) -> Path:
        """Where its shards are."""
        return self.path / self.split if self.split else self.path

    @property
    def is_missing(self) -> bool:
        """Whether no finished source lies in its folder."""
        return not (self.folder / SOURCE_FILE).is_file()

    def open(self) -> ShardSet:
        """Its shards; StreamError names the source, the path and the remedy."""
        if self.is_missing:
            raise StreamError(_missing_line(self))
        shards = ShardSet(self.folder)
        if self.domain and shards.domains != (self.domain,):
            raise StreamError(
                f"source {self.name!r} at {self.folder} holds domains {list(shards.domains)}, not {self.domain!r}; "
                f"write one folder a domain, or leave out data.sources.{self.name}.domain"
            )
        return shards


def parse_sources(sources: Mapping[str, Mapping[str, Any] | SourceSpec]) -> tuple[SourceSpec, ...]:
    """The `data.sources` of a configuration, in its order; StreamError on an unknown key or a senseless value."""
    if not sources:
        raise StreamError("data.sources is empty; choose a data_mix or name at least one source")
    return tuple(_parse(name, given) for name, given in sources.items())


def missing_sources(sources: Mapping[str, Mapping[str, Any] | SourceSpec]) -> list[str]:
    """One line for every source without finished shards; nothing is opened."""
    return [_missing_line(spec) for spec in parse_sources(sources) if spec.is_missing]


def _parse(name: str, given: Mapping[str, Any] | SourceSpec) -> SourceSpec:
    if isinstance(given, SourceSpec):
        return replace(given, name=name)
    known = [field.name for field in fields(SourceSpec) if field.name != "name"]
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1) or known
            raise StreamError(f"data.sources.{name}.{key} is unknown; did you mean {' or '.join(near)}?")
    if not given.get("path"):
        raise StreamError(f"data.sources.{name}.path is not set; name the folder of its shards")
    spec = SourceSpec(name, **{**given, "path": Path(given["path"])})
    if isinstance(spec.weight, bool) or not isinstance(spec.weight, (int, float)) or not 0 < spec.weight < float("inf"):
        raise StreamError(
            f"data.sources.{name}.weight={spec.weight!r}; a share is a positive number (or drop the source)"
        )
    return spec


def _missing_line(spec: SourceSpec) -> str:
    state = "is unfinished (no source.json)" if spec.folder.is_dir() else "does not exist"
    return f"source {spec.name!r}: {spec.folder} {state}; write its shards there or set data.sources.{spec.name}.path"
