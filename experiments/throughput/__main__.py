"""Runs the benchmarks: python -m experiments.throughput --peers .venv-peers/bin/python

Writes results.json and a plot and prints the tables; with --out experiments/throughput they go into README.md too.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.tables import write_tables
from experiments.throughput import fill, measure, report, start, workload
from experiments.throughput.measure import Contender

log = logging.getLogger("throughput")
TASKS = ("read", "prepare", "photographs", "grainy", "start", "resume", "fill", "bound")


def main(arguments: list[str] | None = None) -> None:
    """Make the data once, measure what was asked for, write down what was found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.throughput", description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--peers", type=Path, help="python of the second virtual environment (peers.txt)")
    parser.add_argument("--data", type=Path, default=Path(".cache/throughput"))
    parser.add_argument("--out", type=Path, default=Path(".cache/throughput/results"))
    parser.add_argument("--num", type=int, default=3000, help="pictures of the reading benchmark")
    parser.add_argument("--num-index", type=int, default=1_000_000, help="samples of the start benchmark")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        parser.error(f"unknown tasks {', '.join(unknown)}; choose of {', '.join(TASKS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for task in args.tasks:
        found[task] = globals()[f"_{task}"](args)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(report.table(task, found[task]) + "\n\n")
    found = {task: found[task] for task in TASKS if task in found}
    report.plot(found, args.out)
    if (args.out / "README.md").exists():
        write_tables(args.out / "README.md", "\n\n".join(report.table(task, found[task]) for task in found))


def _read(args: argparse.Namespace) -> dict[str, Any]:
    folder = _photos(args)
    contenders = [
        Contender("floor", "plain", passes=8, options={"kind": "floor"}),
        Contender("ours", "ours", passes=8, options={"copy": True}),
        Contender("ours, 8 lanes", "ours", passes=8, options={"copy": True, "lanes": 8}),
        Contender("ours, not copied", "ours", passes=8),
        Contender("loose files", "plain", passes=4, options={"kind": "references"}),
        *_peers(args, ("litdata", 4), ("webdataset", 1), ("webdataset_own_tars", 1), ("datasets", 1), ("energon", 1)),
    ]
    times = measure.run_rounds(contenders, "read", folder, args.rounds)
    return measure.ratios(times, "ours", "floor")


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    folder = _pictures(args, "prepare", min(args.num, 400))
    times = measure.run_rounds(_preparers(args, ("webdataset", 1)), "prepare", folder, args.rounds)
    return measure.ratios(times, "ours", "floor")


def _photographs(args: argparse.Namespace) -> dict[str, Any]:
    return _large(args, "photographs", detail=2.0)


def _grainy(args: argparse.Namespace) -> dict[str, Any]:
    return _large(args, "grainy", detail=7.6)


def _large(args: argparse.Namespace, name: str, **size: float) -> dict[str, Any]:
    folder = _pictures(args, name, min(args.num, 16), width=2560, height=1920, **size)
    contenders = [*_preparers(args), Contender("Pillow, no pad", "plain", options={"kind": "pillow"})]
    times = measure.run_rounds(contenders, "prepare", folder, args.rounds)
    return measure.ratios(times, "ours", "floor")


def _start(args: argparse.Namespace) -> dict[str, Any]:
    return {"samples": args.num_index, **start.run(_texts(args), args.rounds)}


def _resume(args: argparse.Namespace) -> list[dict[str, float]]:
    return start.resume_costs(_texts(args), args.rounds)


def _fill(args: argparse.Namespace) -> list[dict[str, Any]]:
    return fill.run(min(50_000, args.num_index))


def _bound(args: argparse.Namespace) -> list[dict[str, Any]]:
    return fill.bounds(min(50_000, args.num_index))


def _preparers(args: argparse.Namespace, *peers: tuple[str, int]) -> list[Contender]:
    return [
        Contender("floor", "plain", options={"kind": "floor"}),
        Contender("ours", "ours"),
        Contender("references", "plain", options={"kind": "references"}),
        *_peers(args, *peers),
    ]


def _peers(args: argparse.Namespace, *wanted: tuple[str, int]) -> list[Contender]:
    if args.peers is None:
        log.info("no --peers: the other projects' loaders are left out")
        return []
    return [Contender(name, "peers", str(args.peers), passes, {"loader": name}) for name, passes in wanted]


def _photos(args: argparse.Namespace) -> Path:
    return _made(args.data / f"read-{args.num}{'-peers' if args.peers else ''}", args, args.num)


def _pictures(args: argparse.Namespace, name: str, num: int, **size: float) -> Path:
    return _made(args.data / f"{name}-{num}{'-peers' if args.peers else ''}", args, num, **size)


def _made(folder: Path, args: argparse.Namespace, num: int, **size: float) -> Path:
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        log.info("making %d samples below %s", num, folder)
        workload.write_shards(folder / "ours", num, **size)
        workload.write_files(folder / "files", num, **size)
        if args.peers and not size:
            program = "import sys; from pathlib import Path; from experiments.throughput import peers; "
            program += "peers.make(Path(sys.argv[1]), int(sys.argv[2]))"
            subprocess.run([str(args.peers), "-c", program, str(folder), str(num)], cwd=measure.ROOT, check=True)
        (folder / "done").touch()
    return folder


def _texts(args: argparse.Namespace) -> Path:
    folder: Path = args.data / f"texts-{args.num_index}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        log.info("making %d texts below %s", args.num_index, folder)
        start.make(folder, args.num_index)
        (folder / "done").touch()
    return folder


if __name__ == "__main__":
    main()
