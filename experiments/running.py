"""What studies share: their folders, runs of train.py that are used again, and results as JSON, table and picture."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import write_tables

log = logging.getLogger("experiments")
ROOT = Path(__file__).resolve().parents[1]


def add_folders(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments --work and --out of the study `name`."""
    parser.add_argument(
        "--work", type=Path, default=Path(".cache") / name, help="data and runs; what is there is used again"
    )
    parser.add_argument("--out", type=Path, default=Path(".cache") / name / "results")


def begin(args: argparse.Namespace) -> None:
    """Make the folders and say what goes on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)


def train_once(run: Path, proof: str, overrides: Sequence[str], *, data: Path, seed: int) -> Path:
    """One run of train.py on one thread into the folder `run`, unless its file `proof` is there; the folder.

    Its output goes into a file beside the folder. data: the data root.
    """
    run = run.resolve()
    if (run / proof).exists():
        return run
    given = [
        f"run_dir={run}", f"seed={seed}", "logger=csv", "logger.progress=false", "cluster.threads=1",
        f"cluster.data_root={data.resolve()}", "stage.checkpoint_every=0", *overrides,
    ]  # fmt: skip
    log.info("train.py %s", " ".join(given))
    with run.with_name(f"{run.name}.log").open("w", encoding="utf-8") as output:
        subprocess.run([sys.executable, "train.py", *given], cwd=ROOT, check=True, stdout=output, stderr=output)
    return run


def write_results(
    out: Path, found: dict[str, Any], *, table: str, plot: Callable[[dict[str, Any], Path], None], picture: str
) -> None:
    """results.json, the table to the screen and into README.md if there is one, and the picture."""
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table + "\n")
    plot(found, out / picture)
    if (out / "README.md").exists():
        write_tables(out / "README.md", table)
