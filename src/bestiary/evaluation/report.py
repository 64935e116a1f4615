"""What a benchmark leaves behind: `report.json`, `predictions.jsonl`, a table for the terminal.

Every metric stands beside its shuffled-prompt control. Values are means over regions (or answers), never means of
means; intervals come from drawing whole pictures.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bestiary.evaluation.statistics import (
    Interval,
    Strata,
    Totals,
    bootstrap,
    paired_bootstrap,
    ratio_bootstrap,
    total_bootstrap,
)

GROUPS = ("domain", "kind", "task", "marks")
"""What a metric is broken down by: `by_domain` ... in report.json. `marks` is the number of regions of the picture."""
MIN_PICTURES = 5
"""Below it a bootstrap interval says nothing, and none is given."""


@dataclass(frozen=True, slots=True)
class Score:
    """One scored unit (a region or a whole answer).

    picture: number of the sample it belongs to. control: the same truth scored with shuffled prompts, None without.
    groups: group -> value, keys of GROUPS.
    """

    picture: int
    value: float
    control: float | None
    groups: dict[str, str]


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over `n` units beside its control; intervals are 95 % bootstrap intervals over pictures.

    interval: None below MIN_PICTURES. gain_interval: of value minus control, on the same resamples.
    """

    value: float
    n: int
    control: float | None
    interval: Interval | None
    control_interval: Interval | None
    gain_interval: Interval | None
    by: dict[str, dict[str, Metric]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The form of report.json; floats rounded to 6 decimals."""
        out: dict[str, Any] = {"value": round(self.value, 6), "n": self.n, "control": _rounded(self.control)}
        for name in ("interval", "control_interval", "gain_interval"):
            interval = getattr(self, name)
            out[name] = None if interval is None else [round(interval.low, 6), round(interval.high, 6)]
        for group, metrics in self.by.items():
            out[f"by_{group}"] = {name: metric.to_json() for name, metric in metrics.items()}
        return out


@dataclass(frozen=True, slots=True)
class MarkResult:
    """One region's truth and what was said about it; `predicted`/`control` are None where the answer left it out."""

    mark: int
    kind: str
    truth: str
    predicted: str | None
    control: str | None
    is_correct: bool
    is_control_correct: bool | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of predictions.jsonl.

    regions, control_regions: kind, mark and coordinates (fractions of the original image) as they were asked.
    control: the answer to the shuffled prompts. is_correct: the whole answer is right.
    """

    key: str
    source: str
    domain: str
    task: str
    question: str
    reference: str
    prediction: str
    control: str | None
    is_correct: bool
    marks: tuple[MarkResult, ...]
    regions: tuple[dict[str, Any], ...]
    control_regions: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a benchmark found out.

    predictions: dataclasses, one a line of predictions.jsonl. counts: what was asked, scored and left out. notes: what
    a reader must know. settings: the benchmark's arguments. panel: the PNG beside the report, or None.
    table_rows: its contents for a logger's table, the marked picture (PIL) first; table_columns: their names.
    """

    benchmark: str
    metrics: dict[str, Metric]
    predictions: tuple[Any, ...]
    counts: dict[str, int]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    panel: Path | None = None
    table_columns: tuple[str, ...] = ()
    table_rows: tuple[tuple[Any, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "benchmark": self.benchmark,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "counts": self.counts,
            "notes": list(self.notes),
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
            "panel": self.panel.name if self.panel else None,
        }

    def scalars(self) -> dict[str, float]:
        """Flat numbers for a logger: `accuracy`, `accuracy/control`, `accuracy/domain/natural`, ..."""
        flat: dict[str, float] = {}
        for name, metric in self.metrics.items():
            flat |= _flat(name, metric)
            for group, parts in metric.by.items():
                for value, part in parts.items():
                    flat |= _flat(f"{name}/{group}/{value}", part)
        return flat

    def write(self, out: Path) -> Path:
        """Writes predictions.jsonl, then report.json, each atomically, into the folder `out`."""
        lines = (json.dumps(asdict(prediction), ensure_ascii=False) for prediction in self.predictions)
        write_atomically(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines).encode())
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        path = out / "report.json"
        write_atomically(path, f"{text}\n".encode())
        return path

    def table(self) -> str:
        """Scores beside their controls, one line a metric and group, for the terminal."""
        rows = [("", "score", "95 %", "control", "n")]
        for name, metric in self.metrics.items():
            rows.append(_table_row(name, metric))
            for group in ("domain", "kind", "category"):
                rows += [_table_row(f"  {value}", part) for value, part in metric.by.get(group, {}).items()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def metric_of(scores: Sequence[Score], *, seed: int, groups: Sequence[str] = GROUPS) -> Metric:
    """The mean over all scores and over every value of every group."""
    metric = _plain_metric(scores, seed)
    parts: dict[str, dict[str, Metric]] = {}
    for group in groups:
        split: dict[str, list[Score]] = defaultdict(list)
        for score in scores:
            if group in score.groups:
                split[score.groups[group]].append(score)
        parts[group] = {value: _plain_metric(split[value], seed) for value in sorted(split, key=_natural)}
    return replace(metric, by=parts)


def ratio_metric(ours: Totals, theirs: Totals | None, *, seed: int) -> Metric:
    """A ratio of sums whose denominator the answers decide, as a precision: 0 where it is empty.

    ours, theirs: numerator and denominator by picture, of the answers and of their control. n: the denominator.
    """
    value, control = _ratio(ours), None if theirs is None else _ratio(theirs)
    if len(ours[1]) < MIN_PICTURES or not sum(ours[1]) or (theirs is not None and not sum(theirs[1])):
        return Metric(value, round(sum(ours[1])), control, None, None, None)
    if theirs is None:
        return Metric(value, round(sum(ours[1])), None, bootstrap(*ours, seed=seed), None, None)
    return Metric(value, round(sum(ours[1])), control, *ratio_bootstrap(ours, theirs, seed=seed))


def total_metric(ours: Strata, theirs: Strata | None, *, seed: int) -> Metric:
    """The sum of the means of several groups of pictures, as MME's total. n: the pictures."""

    def total(strata: Strata) -> float:
        return math.fsum(math.fsum(values) / len(values) for values in strata)

    num_pictures, control = sum(map(len, ours)), None if theirs is None else total(theirs)
    if num_pictures < MIN_PICTURES:
        return Metric(total(ours), num_pictures, control, None, None, None)
    return Metric(total(ours), num_pictures, control, *total_bootstrap(ours, theirs, seed=seed))


def _ratio(totals: Totals) -> float:
    return math.fsum(totals[0]) / under if (under := math.fsum(totals[1])) else 0.0


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it: a sibling file, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with sibling.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(sibling, path)


def _plain_metric(scores: Sequence[Score], seed: int) -> Metric:
    ours: dict[int, float] = defaultdict(float)
    theirs: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    has_control = all(score.control is not None for score in scores)
    for score in scores:
        ours[score.picture] += score.value
        theirs[score.picture] += score.control or 0.0
        counts[score.picture] += 1
    a, b, n = list(ours.values()), list(theirs.values()), list(counts.values())
    interval = control_interval = gain_interval = None
    if len(n) >= MIN_PICTURES and has_control:
        interval, control_interval, gain_interval = paired_bootstrap(a, b, n, seed=seed)
    elif len(n) >= MIN_PICTURES:
        interval = bootstrap(a, n, seed=seed)
    control = math.fsum(b) / sum(n) if has_control else None
    return Metric(math.fsum(a) / sum(n), sum(n), control, interval, control_interval, gain_interval)


def _natural(value: str) -> tuple[int, str]:
    """Sorts "10" behind "9"."""
    return (int(value), "") if value.isdecimal() else (-1, value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _flat(name: str, metric: Metric) -> dict[str, float]:
    control = {} if metric.control is None else {f"{name}/control": metric.control}
    return {name: metric.value} | control


def _table_row(name: str, metric: Metric) -> tuple[str, str, str, str, str]:
    interval = "-" if metric.interval is None else f"{metric.interval.low:.3f}-{metric.interval.high:.3f}"
    control = "-" if metric.control is None else f"{metric.control:.3f}"
    return name, f"{metric.value:.3f}", interval, control, str(metric.n)
