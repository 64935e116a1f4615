"""A suite: benchmarks by name, run one after the other on one model, results in `<run>/eval/<benchmark>/`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bestiary.schema import Processor, Sample

if TYPE_CHECKING:
    from bestiary.evaluation.report import Report
    from bestiary.mllm import MultimodalLM

log = logging.getLogger(__name__)


class Benchmark(Protocol):
    """Scores a model on samples and leaves report.json and predictions.jsonl in `out`.

    sources: globs of the names of the held-out sources it reads; empty = all of them.
    """

    name: str
    sources: tuple[str, ...]

    def run(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], out: Path) -> Report:
        """Ask, score, write."""


class HeldOut(Protocol):
    """Held-out samples of several sources."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sources."""

    def of(self, names: Sequence[str]) -> Sequence[Sample]:
        """The samples of these sources, in this order."""


def sources_of(name: str, benchmark: Benchmark, heldout: Iterable[str]) -> list[str]:
    """The held-out sources a benchmark reads, in their order; ValueError for a glob that names none."""
    known = list(heldout)
    for glob in benchmark.sources:
        if not any(fnmatchcase(source, glob) for source in known):
            near = get_close_matches(glob, known, n=3, cutoff=0.3) or known[:5]
            held = f"nearest: {', '.join(near)}" if near else "data.heldout is empty"
            raise ValueError(
                f"suite.{name} reads the held-out source {glob!r}, which data.heldout does not name ({held}); "
                f"set suite.{name}.sources, or add it as +dataset@data.heldout.{glob}=FILE"
            )
    globs = benchmark.sources or ("*",)
    return [source for source in known if any(fnmatchcase(source, glob) for glob in globs)]


def checked(benchmarks: dict[str, Benchmark], samples: HeldOut) -> dict[str, Benchmark]:
    """The benchmarks, if each finds its held-out sources; ValueError before a model is trained for one that does not.

    Without any held-out data nothing is scored, which is only logged: a recipe may have none.
    """
    if not samples.names:
        log.warning("data.heldout is empty: nothing is scored (suite: %s)", ", ".join(benchmarks) or "no benchmark")
        return benchmarks
    for name, benchmark in benchmarks.items():
        sources_of(name, benchmark, samples.names)
    return benchmarks


def run_suite(
    benchmarks: Mapping[str, Benchmark],
    model: MultimodalLM,
    processor: Processor,
    samples: HeldOut,
    out: Path,
) -> dict[str, Any]:
    """Runs every benchmark; returns `metrics` (flat names), `panels`, `tables` and `text`, a table for a person."""
    found: dict[str, Any] = {"metrics": {}, "panels": {}, "tables": {}, "text": ""}
    read = {name: sources_of(name, benchmark, samples.names) for name, benchmark in benchmarks.items()}
    for name, benchmark in benchmarks.items():
        report = benchmark.run(model, processor, samples.of(read[name]), out / name)
        found["metrics"] |= {f"{name}/{metric}": value for metric, value in report.scalars().items()}
        found["text"] += f"{name}\n{report.table()}\n" if len(benchmarks) > 1 else f"{report.table()}\n"
        if report.panel is not None:
            found["panels"][name] = report.panel
            found["tables"][name] = (report.table_columns, report.table_rows)
    return found
