"""Trains Monkey's demo with one, four and six windows, with and without adapters, and scores small and large text.

python -m experiments.resolution --out experiments/resolution

Writes results.json and resolution.png into --out, and the table into its README.md if there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from experiments.resolution import report
from experiments.running import add_folders, begin, train_once, write_results

log = logging.getLogger("resolution")
GRIDS = {"1": "[64,64]", "4": "[128,128]", "6": "[128,192]"}
"""Windows and height and width of the canvas they make up."""
NO_ADAPTERS = "model.build.vision.adapters=null"
STARVED = "stage.train=[decoder.*,vision.resampler.*]"
"""What trains where there are no adapters: the recipe's parts but for theirs."""
ARMS = ("1", "4", "4-bare", "6", "6-bare")
"""Windows; `bare` without adapters. One window has none that could differ from another's, and is trained without."""


def main(arguments: list[str] | None = None) -> None:
    """Every arm with every seed; then the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.resolution", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="the recipe's own without it")
    parser.add_argument("--questions", type=int, default=0, help="held-out questions; 0 = all")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside one another, a thread each")
    add_folders(parser, "resolution")
    args = parser.parse_args(arguments)
    begin(args)
    found = study(args)
    write_results(args.out, found, table=report.table(found), plot=report.plot, picture="resolution.png")


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Scores by arm and seed."""
    pairs = list(product(args.seeds, args.arms))
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda pair: scores_of(train(args, *pair)), pairs))
    scores: dict[str, Any] = {arm: {} for arm in args.arms}
    for (seed, arm), told in zip(pairs, done, strict=True):
        scores[arm][str(seed)] = told
    return {"steps": args.steps, "seeds": args.seeds, "scores": scores}


def train(args: argparse.Namespace, seed: int, arm: str) -> Path:
    """One run of train.py, unless it is there already; its run directory."""
    windows, _, bare = arm.partition("-")
    overrides = [
        "experiment=monkey_finetune",
        f"model.build.vision.image_px={GRIDS[windows]}",
        *([NO_ADAPTERS, STARVED] if bare or windows == "1" else []),
        *([f"stage.max_steps={args.steps}"] if args.steps else []),
        "stage.eval_at_start=false",
        f"suite.texts.max_samples={args.questions}",
    ]
    asked = "".join(f"-{word}{n}" for word, n in (("steps", args.steps), ("questions", args.questions)) if n)
    run = args.work / f"{arm}-{seed}{asked}"
    return train_once(run, "eval/texts/report.json", overrides, data=args.work / "data", seed=seed)


def scores_of(run: Path) -> dict[str, float]:
    """Share of words right by size of print, each also asked about another picture."""
    told = json.loads((run / "eval/texts/report.json").read_text(encoding="utf-8"))
    found = {}
    for size in report.SIZES:
        metric = told["metrics"]["accuracy"]["by_category"][size]
        found |= {size: metric["value"], f"{size}_control": metric["control"]}
    log.info("%s: %s", run.name, found)
    return found


if __name__ == "__main__":
    main()
