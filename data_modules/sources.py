"""The sources of a mix: what the configuration says of them, and opening them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_modules.foreign_index import FORMATS
from data_modules.index import SOURCE_FILE
from data_modules.storage.urls import expand_braces, is_remote, joined, local_path, names_tars, printable

if TYPE_CHECKING:  # opening is where they are needed; tables and checks of a configuration are not
    from data_modules.shards import ShardSet
    from data_modules.storage import Storage

_LARGEST = 1e100
"""Of a weight, count or repeat: sums of more would leave the range of numbers."""


class StreamError(ValueError):
    """Something a user can put right: a source, an option, a damaged shard. One line."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of a mix.

    path: folder of shards, its URL, or a pattern of tars as `set/part-{00000..00099}.tar`; with `split`, the folder of
        that name below it.
    weight, count, repeat, schedule: at most one; none is weight 1. weight: share on any scale, in the unit of the mix.
        count: share as a number of samples. repeat: share as passes over the source. schedule: (step, weight) points,
        steps rising, linear in between.
    max_epochs: the share is cut so that no more passes are expected over the run; None = never cut.
    loss_weight: factor on the loss of every token. chunk: consecutive samples that stay together; None = `data.chunk`.
    format: what the members of somebody else's tars mean: bestiary, caption, llava.
    kind: its group in the grouped order; None = samples with pictures are one group, those without another.
    domain: the only domain the folder may hold; None accepts all. licence, origin: for people. make: the command that
        writes the shards, said where they are missing.
    """

    name: str
    path: str
    weight: float | None = None
    count: float | None = None
    repeat: float | None = None
    max_epochs: float | None = None
    schedule: tuple[tuple[int, float], ...] = ()
    loss_weight: float = 1.0
    chunk: int | None = None
    format: str = "bestiary"
    domain: str | None = None
    split: str | None = None
    kind: str | None = None
    licence: str = ""
    origin: str = ""
    make: str = ""

    @property
    def location(self) -> str:
        """Where its shards are: a local path, a URL, or a pattern of tars."""
        if not self.split:
            return self.path
        return joined(self.path, self.split) if is_remote(self.path) else str(local_path(self.path) / self.split)

    @property
    def shown(self) -> str:
        """Its location without the signatures a URL may carry."""
        return printable(self.location)

    @property
    def is_missing(self) -> bool:
        """Whether it is local and not there; what lies behind a URL is known when it is opened."""
        return _why_missing(self) is not None

    def open(self, storage: Storage | None = None, *, chunk: int = 1) -> ShardSet:
        """Its shards; StreamError names the source, the path and the remedy.

        chunk: the mix's, where the source has none of its own; remote samples of one chunk are fetched together.
        """
        from data_modules.shards import open_source

        if self.is_missing:
            raise StreamError(_missing_line(self))
        try:
            shards = open_source(
                self.location,
                storage=storage,
                format=self.format,
                name=self.name,
                domain=self.domain,
                lot=self.chunk or chunk,
            )
        except (ValueError, OSError) as error:
            raise StreamError(f"source {self.name!r}: {error}") from error
        if not len(shards):
            raise StreamError(f"source {self.name!r} at {self.shown} holds no sample; leave it out or write it again")
        if not shards.domains:
            raise StreamError(
                f"source {self.name!r} at {self.shown}: none of its {len(shards):,} samples can be read with "
                f"format={self.format}; set data.sources.{self.name}.format ({', '.join(FORMATS)}), or write it again"
            )
        if self.domain and shards.domains != (self.domain,):
            held = shards.domains[0] if len(shards.domains) == 1 else "null"
            raise StreamError(
                f"source {self.name!r} at {self.shown} holds domains {list(shards.domains)}, not {self.domain!r}; "
                f"set data.sources.{self.name}.domain={held}"
            )
        return shards


def parse_sources(sources: Mapping[str, Mapping[str, Any] | SourceSpec]) -> tuple[SourceSpec, ...]:
    """The `data.sources` of a configuration, in its order; StreamError on an unknown key or a senseless value."""
    if not sources:
        raise StreamError("data.sources is empty; choose a data_mix or name at least one source")
    return tuple(_parse(str(name), given) for name, given in sources.items())


def missing_sources(sources: Mapping[str, Mapping[str, Any] | SourceSpec]) -> list[str]:
    """One short line for every local source without finished shards; nothing is opened."""
    return [_absent(spec) for spec in parse_sources(sources) if spec.is_missing]


def _parse(name: str, given: Mapping[str, Any] | SourceSpec) -> SourceSpec:
    if isinstance(given, SourceSpec):
        spec = replace(given, name=name)
    else:
        known = [field.name for field in fields(SourceSpec) if field.name != "name"]
        for key in given:
            if key not in known:
                near = get_close_matches(str(key), known, n=1) or known
                raise StreamError(f"data.sources.{name}.{key} is unknown; did you mean {' or '.join(near)}?")
        if not given.get("path"):
            raise StreamError(f"data.sources.{name}.path is not set; name the folder of its shards")
        spec = SourceSpec(name, **{**given, "schedule": given.get("schedule") or ()})
    spec = replace(spec, path=str(spec.path), schedule=_points(spec))
    try:
        is_remote(spec.path)
    except ValueError as error:
        raise StreamError(f"data.sources.{name}.path: {error}") from error
    for key, (is_right, meaning) in _CHECKS.items():
        value = getattr(spec, key)
        if not is_right(value):
            raise StreamError(f"data.sources.{name}.{key}={value!r}; {meaning}")
    try:
        if not is_remote(spec.location):
            _tars(spec.location)
    except ValueError as error:
        raise StreamError(f"data.sources.{name}.path: {error}") from error
    asked = [key for key in ("weight", "count", "repeat", "schedule") if getattr(spec, key) not in (None, ())]
    if len(asked) > 1:
        raise StreamError(
            f"data.sources.{name} has {' and '.join(asked)}; a source takes one of weight, count, repeat, schedule"
        )
    return spec


def _points(spec: SourceSpec) -> tuple[tuple[int, float], ...]:
    """The schedule as tuples; StreamError unless steps rise and weights are weights."""
    wrong = f"data.sources.{spec.name}.schedule={spec.schedule!r}; "
    try:
        points = tuple([(step, weight) for step, weight in spec.schedule])
    except (TypeError, ValueError):
        raise StreamError(wrong + "it is a list of [step, weight]") from None
    steps = [step for step, _ in points]
    if not all(_is_count(step) or step == 0 for step in steps) or sorted(set(steps)) != steps:
        raise StreamError(wrong + "its steps are whole numbers from 0 on, each larger than the one before")
    if not all(_is_number(weight) and 0 <= weight <= _LARGEST for _, weight in points):
        raise StreamError(wrong + "its weights are numbers from 0 on")
    if points and not any(weight for _, weight in points):
        raise StreamError(wrong + "one of its weights must be positive (or drop the source)")
    return tuple((step, float(weight)) for step, weight in points)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_share(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 < value <= _LARGEST)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "weight": (_is_share, "a share is a positive number (or drop the source)"),
    "count": (_is_share, "a number of samples is positive (or drop the source)"),
    "repeat": (_is_share, "a number of passes is positive (or drop the source)"),
    "max_epochs": (_is_share, "a number of passes is positive; null never cuts the share"),
    "loss_weight": (
        lambda value: _is_number(value) and value >= 0,
        "a factor on the loss is a number from 0 on (0: seen, not learned)",
    ),
    "chunk": (
        lambda value: value is None or _is_count(value),
        "it is a whole number from 1 on; null is data.chunk",
    ),
    "format": (lambda value: value in FORMATS, f"choose {', '.join(FORMATS)}"),
    "domain": (_is_text, "it is the name of a domain, or null"),
    "split": (_is_text, "it is the name of a folder below path, or null"),
}


def _absent(spec: SourceSpec) -> str:
    return f"source {spec.name!r}: {spec.shown} {_why_missing(spec)}"


def _missing_line(spec: SourceSpec) -> str:
    how = f" with `{spec.make}`" if spec.make else ""
    return (
        f"{_absent(spec)}; write its shards there{how}, or set data.sources.{spec.name}.path (of a benchmark: "
        f"data.heldout.{spec.name}.path)"
    )


def _why_missing(spec: SourceSpec) -> str | None:
    """What is wrong with a local location, None if nothing is."""
    if is_remote(spec.location):
        return None
    if names_tars(spec.location):
        absent = [path for path in map(Path, _tars(spec.location)) if not path.is_file()]
        return f"names {absent[0].name}, which does not exist" if absent else None
    folder = local_path(spec.location)
    if (folder / SOURCE_FILE).is_file() or (spec.format != "bestiary" and any(folder.glob("*.tar"))):
        return None
    if not folder.is_dir():
        return "does not exist"
    others = any(folder.glob("*.tar")) and not any(folder.glob("shard-*.tar"))
    return f"has no source.json: unfinished{', or tars of others (then set its format)' if others else ''}"


def _tars(pattern: str) -> Sequence[str]:
    return expand_braces(str(local_path(pattern)))
