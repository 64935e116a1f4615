"""Trains two demo models on two domains, mixes their weights, and scores every mix on both.

python -m experiments.domain_mix --out experiments/domain_mix

Writes results.json and domain_mix.png into --out, and the table into its README.md if there is one.
"""

from __future__ import annotations

import argparse
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bestiary.weights.mixing import mix
from data_modules.embedded.generate import DOMAINS
from data_modules.embedded.plain import build_plain
from experiments.domain_mix import report
from experiments.domain_mix.score import score
from experiments.running import add_folders, begin, train_once, write_results

log = logging.getLogger("domain_mix")
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXPERIMENT = "sphinx_stage1"
WEIGHTS = Path("checkpoints/last/model.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """Data, a common base, two models, five mixes, ten scores."""
    parser = argparse.ArgumentParser(prog="python -m experiments.domain_mix", description=__doc__)
    parser.add_argument("--domains", nargs=2, default=["natural", "screenshot"], choices=DOMAINS, metavar="DOMAIN")
    add_folders(parser, "domain_mix")
    parser.add_argument("--steps", type=int, nargs=2, default=[100, 100], help="of the base, and of either domain")
    parser.add_argument("--pictures", type=int, default=2000, help="training pictures of a domain")
    parser.add_argument("--heldout", type=int, default=96, help="held-out pictures of a domain")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    begin(args)
    found = study(args)
    write_results(args.out, found, table=report.table(found), plot=report.plot, picture="domain_mix.png")


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; the two domains' runs go on beside one another, a thread each."""
    a, b = args.domains
    heldout = {name: make_data(args, [name], name) / "sphinx_caption_heldout" for name in (a, b)}
    make_data(args, [a, b], "both")
    base = train(args, "base", "both", args.steps[0], lr=1.5e-3)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, args, name, name, args.steps[1], lr=7e-4, weights=base / WEIGHTS) for name in (a, b)]
        runs = [job.result() for job in jobs]
    found: dict[str, Any] = {"domains": [a, b], "steps": args.steps, "seed": args.seed, "betas": {}}
    found["base"] = {name: score(base, heldout[name]) for name in (a, b)}
    for beta in BETAS:
        mixed = args.work / f"mix-{beta:g}"
        if not mixed.exists():
            mix(runs[0], runs[1], mixed, beta=beta)
        found["betas"][f"{beta:g}"] = {name: score(mixed, heldout[name]) for name in (a, b)}
        log.info("beta %g: %s", beta, found["betas"][f"{beta:g}"])
    return found


def make_data(args: argparse.Namespace, domains: list[str], name: str) -> Path:
    """Pictures and texts of some domains; the folder of their sources."""
    root = args.work / "data" / name / "embedded"
    sizes = {"sphinx_caption": args.pictures * len(domains), "sphinx_caption_heldout": args.heldout * len(domains)}
    build_plain(root, sources=["sphinx_caption", "sphinx_documents"], domains=domains, seed=args.seed, sizes=sizes)
    return root


def train(args: argparse.Namespace, run: str, data: str, steps: int, *, lr: float, weights: Path | None = None) -> Path:
    """One run of train.py on one thread, unless it is there already; its run directory."""
    overrides = [
        f"experiment={EXPERIMENT}", f"stage.max_steps={steps}", "stage.batch_size=8", f"stage.optimizer.lr={lr}",
        "data.prepare=null", "suite.captions.max_samples=4", "suite.documents.max_samples=4",
        *([f"model.weights=[{weights}]"] if weights else []),
    ]  # fmt: skip
    return train_once(args.work / run, str(WEIGHTS), overrides, data=args.work / "data" / data, seed=args.seed)


if __name__ == "__main__":
    main()
