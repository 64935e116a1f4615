"""The table of a study: start, end and control of several runs, mean and range over them.

python -m experiments.sphinxv_demo.collect runs/sphinxv_demo/seed0 runs/sphinxv_demo/seed1 runs/sphinxv_demo/seed2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

DOMAINS = ("natural", "screenshot", "multi_panel", "document")
KINDS = ("point", "box", "stroke")
ROWS = (
    ("all", "accuracy"),
    *((domain, f"accuracy/domain/{domain}") for domain in DOMAINS),
    *((kind, f"accuracy/kind/{kind}") for kind in KINDS),
    ("whole answers, all tasks", "answer_accuracy"),
    *((f"whole answers, {task}", f"answer_accuracy/task/{task}") for task in ("qa", "relation", "caption")),
)


def table(runs: Sequence[Path], benchmark: str = "regions") -> str:
    """Markdown: one line a metric; each number is the mean over runs, (lowest-highest) for the end."""
    histories = [read_history(run) for run in runs]
    lines = ["| exact labels | start | end | control at the end |", "|---|---|---|---|"]
    for title, name in ROWS:
        key = f"{benchmark}/{name}"
        start = [history[0][key] for history in histories]
        end = [history[-1][key] for history in histories]
        control = [history[-1][f"{key}/control"] for history in histories]
        spread = f"{mean(end):.3f} ({min(end):.3f}-{max(end):.3f})"
        lines.append(f"| {title} | {mean(start):.3f} | {spread} | {mean(control):.3f} |")
    return "\n".join(lines)


def read_history(run: Path) -> list[dict[str, float]]:
    """The metrics of every evaluation of a run, the first at its start."""
    path = run / "eval" / "history.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} holds no {path.name}; let the run evaluate itself")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(records) < 2:
        raise ValueError(
            f"{path} holds {len(records)} evaluations; a start and an end are needed (stage.eval_at_start)"
        )
    return [record["metrics"] for record in records]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+")
    sys.stdout.write(table(parser.parse_args().run) + "\n")
