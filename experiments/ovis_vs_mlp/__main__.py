"""Trains Ovis' three stages at demo scale with its table and with other connectors, and scores every stage.

python -m experiments.ovis_vs_mlp --out experiments/ovis_vs_mlp

Writes results.json and ovis_vs_mlp.png into --out, and the table into its README.md if there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from experiments.ovis_vs_mlp import report
from experiments.running import add_folders, begin, train_once, write_results

log = logging.getLogger("ovis_vs_mlp")
STAGES = ("ovis_s1", "ovis_s2", "ovis_s3")
CONNECTORS = {
    "table": ("connector=table",),
    "mlp": ("connector=mlp", "connector_width=512"),
    "linear": ("connector=linear",),
}
"""Overrides below model.build.vision. 512 gives the MLP as many parameters as head and table have at demo scale."""


def main(arguments: list[str] | None = None) -> None:
    """Every connector with every seed, three stages each; then the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ovis_vs_mlp", description=__doc__)
    parser.add_argument("--connectors", nargs="+", default=["table", "mlp"], choices=CONNECTORS, metavar="CONNECTOR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of every stage; the recipes' own without it")
    parser.add_argument("--questions", type=int, default=0, help="held-out questions; 0 = all")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside one another, a thread each")
    add_folders(parser, "ovis_vs_mlp")
    args = parser.parse_args(arguments)
    begin(args)
    found = study(args)
    write_results(args.out, found, table=report.table(found), plot=report.plot, picture="ovis_vs_mlp.png")


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Scores by connector, seed and stage."""
    pairs = list(product(args.connectors, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda pair: stages(args, *pair), pairs))
    scores: dict[str, Any] = {connector: {} for connector in args.connectors}
    for (connector, seed), stage_scores in zip(pairs, done, strict=True):
        scores[connector][str(seed)] = stage_scores
    return {"steps": args.steps, "seeds": args.seeds, "scores": scores}


def stages(args: argparse.Namespace, connector: str, seed: int) -> dict[str, Any]:
    """The three stages in sequence; what the benchmarks said after each."""
    found, parent = {}, None
    for stage in STAGES:
        parent = train(args, stage, connector, seed, parent)
        found[stage] = scores_of(parent)
        log.info("%s, seed %d, %s: %s", connector, seed, stage, found[stage])
    return found


def train(args: argparse.Namespace, stage: str, connector: str, seed: int, parent: Path | None) -> Path:
    """One run of train.py on one thread, unless it is there already; its run directory."""
    asked = "".join(f"-{word}{n}" for word, n in (("steps", args.steps), ("questions", args.questions)) if n)
    overrides = [
        f"experiment={stage}",
        *(f"model.build.vision.{setting}" for setting in CONNECTORS[connector]),
        *([f"parent={parent}"] if parent else []),
        *([f"stage.max_steps={args.steps}"] if args.steps else []),
        *(f"suite.{name}.max_samples={args.questions}" for name in ("answers", "captions", "descriptions")),
    ]
    run = args.work / f"{connector}-{seed}{asked}-{stage}"
    return train_once(run, "eval/captions/report.json", overrides, data=args.work / "data", seed=seed)


def scores_of(run: Path) -> dict[str, float]:
    """Share of exact short answers and nats a token of captions, each also asked about another picture."""
    found = {}
    for benchmark, metric in (("answers", "accuracy"), ("captions", "nll")):
        told = json.loads((run / "eval" / benchmark / "report.json").read_text(encoding="utf-8"))["metrics"][metric]
        found |= {metric: told["value"], f"{metric}_control": told["control"]}
    return found


if __name__ == "__main__":
    main()
