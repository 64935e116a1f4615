"""`bestiary runs`: list the runs below a folder, explain the steps of one sample by sample, compare two's scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestiary.training.explaining import Explained
    from bestiary.training.flight import SeenSample

_HEADER = ("lane", "source", "key", "tokens", "targets", "loss")
_RIGHT = ("lane", "tokens", "targets", "loss")


def add_runs(commands: Any) -> None:
    """Adds `runs` to the console script: alone it lists, `runs explain` explains, `runs compare` compares."""
    runs: argparse.ArgumentParser = commands.add_parser(
        "runs", help="list the runs below a folder, newest last; explain one of them, compare two"
    )
    runs.add_argument("--root", type=Path, default=Path("runs"))
    runs.set_defaults(act=_list)
    inner = runs.add_subparsers(metavar="explain|compare")
    explain = inner.add_parser("explain", help="print the samples of a step with their losses")
    explain.add_argument("run", type=Path, help="run directory")
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="completed steps, from 1, as in metrics.jsonl")
    which.add_argument("--steps", metavar="FIRST:LAST", help="both included; either may be left out")
    explain.add_argument("--by", choices=("lane", "loss"), default="lane", help="order of the samples")
    explain.add_argument("--above", type=float, metavar="LOSS", help="only samples with a larger loss")
    explain.add_argument("--key", action="append", default=[], help="only this sample; repeatable")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a step")
    form.add_argument(
        "--as-skip-list", action="store_true", help="source<tab>key lines for data.skip, of --above or --key"
    )
    explain.set_defaults(act=_explain)
    both = inner.add_parser("compare", help="scores of two runs on the same questions, and their difference")
    both.add_argument("first", type=Path, help="run directory")
    both.add_argument("second", type=Path, help="run directory")
    both.set_defaults(act=_compare)


def _list(args: argparse.Namespace) -> None:
    from bestiary.training.run_dir import RunDir

    found = sorted(args.root.glob("**/status.json"), key=_changed)
    if not found:
        raise ValueError(f"no run below {args.root}; start one with python train.py experiment=sphinxv_stage2")
    for path in found:
        try:
            status = RunDir(path.parent).status
        except (ValueError, OSError) as error:  # one bad file does not hide the other runs
            sys.stdout.write(f"{'unreadable':<12} {error}\n")
            continue
        scores = [_score(report) for report in sorted(path.parent.glob("eval/*/report.json"))]
        line = f"{status.state:<12} {status.stage:<16} {status.step:>7} steps  {path.parent}"
        sys.stdout.write("  ".join([line, *scores]) + "\n")


def _changed(path: Path) -> float:
    """When the file was written; 0 for a link that leads nowhere."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _score(report: Path) -> str:
    """A benchmark's name and its accuracy, or else its first metric; what is wrong with a report that has neither."""
    try:
        metrics = json.loads(report.read_text(encoding="utf-8"))["metrics"]
        if "accuracy" in metrics:
            return f"{report.parent.name} {metrics['accuracy']['value']:.3f}"
        return " ".join([report.parent.name, *(f"{name} {metrics[name]['value']:.3f}" for name in list(metrics)[:1])])
    except (OSError, ValueError, RecursionError) as error:
        return f"{report.parent.name} unreadable: {report} ({error})"
    except (LookupError, TypeError):
        return f"{report.parent.name} unreadable: {report} (it does not hold the metrics of a benchmark)"


def _compare(args: argparse.Namespace) -> None:
    from bestiary.evaluation.comparing import compare

    rows = [("benchmark", "first", "second", "second - first, 95 %", "questions")]
    for found in compare(args.first, args.second):
        gain = "-" if found.gain is None else f"{found.gain.low:+.3f} to {found.gain.high:+.3f}"
        apart = f"{found.num}" + (f" ({found.num_apart} of one run alone left out)" if found.num_apart else "")
        rows.append((found.benchmark, f"{found.first:.3f}", f"{found.second:.3f}", gain, apart))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        sys.stdout.write("  ".join([*cells, row[4]]) + "\n")


def _explain(args: argparse.Namespace) -> None:
    from bestiary.training.explaining import explain, left_out
    from bestiary.training.run_dir import RunDir
    from data_modules.skiplist import skip_line

    if args.as_skip_list and args.above is None and not args.key:
        raise ValueError("--as-skip-list needs --above LOSS or --key KEY: which samples are to be skipped?")
    run, (first, last) = RunDir(args.run), _range(args)
    steps = _chosen(explain(run, first, last), args)
    if args.as_skip_list:
        named = dict.fromkeys(skip_line(s.source, s.key) for step in steps for s in step.samples)
        sys.stdout.writelines(named)
        return
    step = 0
    for explained in steps:
        step = explained.step
        sys.stdout.write((json.dumps(explained.to_json()) if args.json else as_text(explained)) + "\n")
    at, lines = left_out(run, step)
    if lines and not args.json:
        sys.stdout.write(f"left out up to step {at}:\n" + "".join(f"  {line}\n" for line in lines))


def _range(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """First and last step that were asked for; None is an open end."""
    if args.steps is None:
        return args.step, args.step
    first, colon, last = args.steps.partition(":")
    try:
        if not colon:
            raise ValueError("no colon")
        return int(first) if first else None, int(last) if last else None
    except ValueError as error:
        raise ValueError(f"--steps {args.steps} is not FIRST:LAST, for example 100:120") from error


def _chosen(steps: Iterator[Explained], args: argparse.Namespace) -> Iterator[Explained]:
    """The steps with the samples that were asked for, in order; ValueError when a filter leaves nothing at all."""
    from dataclasses import replace

    wanted, met, any_left = set(args.key), set(), False
    for step in steps:
        places = [p for p, sample in enumerate(step.samples) if _is_wanted(sample, args.above, wanted)]
        if args.by == "loss":
            places.sort(key=_by_loss(step.samples))
        met |= {sample.key for sample in step.samples} & wanted
        if not places and (wanted or args.above is not None):
            continue
        any_left = True
        worst = frozenset(number for number, place in enumerate(places) if place in step.worst)
        yield replace(step, samples=tuple(step.samples[p] for p in places), worst=worst)
    if wanted - met:
        raise ValueError(f"not among the samples of these steps: {', '.join(sorted(wanted - met))}")
    if not any_left:
        problem = "was recorded" if args.above is None else f"has a loss above {args.above:g}"
        raise ValueError(f"no sample of these steps {problem}")


def _is_wanted(sample: SeenSample, above: float | None, keys: set[str]) -> bool:
    is_above = above is None or (sample.loss is not None and sample.loss > above)
    return is_above and (not keys or sample.key in keys)


def _by_loss(samples: Sequence[SeenSample]) -> Callable[[int], float]:
    def order(place: int) -> float:
        loss = samples[place].loss
        return float("inf") if loss is None else -loss

    return order


def as_text(step: Explained) -> str:
    """A step's numbers on one line, then a table of its samples; `*` marks the worst."""
    numbers = [f"step {step.step}"]
    for name, label, form in (
        ("loss", "loss", ".4f"),
        ("weighted_loss", "weighted", ".4f"),
        ("lr", "lr", ".3g"),
        ("grad_norm", "grad norm", ".4g"),
    ):
        if name in step.metrics:
            numbers.append(f"{label} {step.metrics[name]:{form}}")
    numbers += [f"{step.metrics[name]:,} {name}" for name in ("samples", "tokens", "targets") if name in step.metrics]
    rows = [_HEADER, *(_cells(sample) for sample in step.samples)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_HEADER, row, widths, strict=True)
        ]
        mark = " *" if number - 1 in step.worst else ""
        lines.append("  " + "  ".join(cells) + mark)
    return "  ".join(numbers) + "\n" + "\n".join(lines)


def _cells(sample: SeenSample) -> tuple[str, ...]:
    loss = "-" if sample.loss is None else f"{sample.loss:.4g}"
    return str(sample.lane), sample.source, sample.key, str(sample.tokens), str(sample.targets), loss
