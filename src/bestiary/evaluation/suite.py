"""A suite: benchmarks by name, run one after the other on one model, results in `<run>/eval/<benchmark>/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bestiary.schema import Processor, Sample

if TYPE_CHECKING:
    from bestiary.evaluation.report import Report
    from bestiary.mllm import MultimodalLM


class Benchmark(Protocol):
    """Scores a model on samples and leaves report.json and predictions.jsonl in `out`."""

    name: str

    def run(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], out: Path) -> Report:
        """Ask, score, write."""


def run_suite(
    benchmarks: Mapping[str, Benchmark],
    model: MultimodalLM,
    processor: Processor,
    samples: Sequence[Sample],
    out: Path,
) -> dict[str, Any]:
    """Runs every benchmark; returns `metrics` (flat names), `panels`, `tables` and `text`, a table for a person."""
    found: dict[str, Any] = {"metrics": {}, "panels": {}, "tables": {}, "text": ""}
    for name, benchmark in benchmarks.items():
        report = benchmark.run(model, processor, samples, out / name)
        found["metrics"] |= {f"{name}/{metric}": value for metric, value in report.scalars().items()}
        found["text"] += f"{report.table()}\n"
        if report.panel is not None:
            found["panels"][name] = report.panel
            found["tables"][name] = (report.table_columns, report.table_rows)
    return found
