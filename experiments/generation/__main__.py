"""Runs the benchmark: python -m experiments.generation

Writes results.json and prints the table; with --out experiments/generation it goes into README.md too.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bestiary.mllm import MultimodalLM
from experiments.generation.contenders import (
    Prompts,
    counted_passes,
    one_by_one,
    ours,
    random_prompts,
    shortest_first,
    text_model,
)
from experiments.tables import write_tables

log = logging.getLogger("generation")
CASES = {"20-400": (20, 400), "60-140": (60, 140), "200, all equal": (200, 200)}
"""Name -> shortest and longest prompt; the others lie evenly between."""
CONTENDERS: dict[str, Callable[[MultimodalLM, Prompts, int], list[list[int]]]] = {
    "ours": ours,
    "one by one": one_by_one,
    "references' algorithm": shortest_first,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases, write down what was found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.generation", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/generation"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    model = text_model(dim=args.dim, layers=args.layers, vocab=4096, positions=1024)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "cases": {name: _case(model, ends, args) for name, ends in CASES.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found) + "\n")
    if (args.out / "README.md").exists():
        write_tables(args.out / "README.md", table(found))


def table(found: dict[str, Any]) -> str:
    """Markdown of all results."""
    lines = ["| prompts | way | passes | CPU ms | times ours (lowest-highest round) |", "|---|---|---|---|---|"]
    for case, ways in found["cases"].items():
        for way, line in ways.items():
            numbers = (
                f"{line['passes']} | {line['ms']:.0f} | {line['ratio']:.2f} ({line['low']:.2f}-{line['high']:.2f})"
            )
            lines.append(f"| {case} | {way} | {numbers} |")
    return "\n".join(lines)


def _case(model: MultimodalLM, ends: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Passes, CPU time and its ratio to ours, once all have given the same tokens."""
    lengths = [round(length) for length in np.linspace(*ends, args.prompts)]
    prompts = random_prompts(lengths, model.decoder.vocab_size)
    passes, answers = {}, {}
    for name, answer in CONTENDERS.items():
        with counted_passes(model) as seen:
            answers[name] = answer(model, prompts, args.new_tokens)
        passes[name] = len(seen)
    for name, given in answers.items():
        if given != answers["ours"]:
            raise ValueError(f"prompts of {lengths}: {name} gives other tokens than ours; the times compare nothing")
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, answer in CONTENDERS.items():
            before = time.process_time()
            answer(model, prompts, args.new_tokens)
            times[name].append(time.process_time() - before)
    log.info("prompts of %s: done", lengths)
    return {name: {"passes": passes[name], **_ratios(spent, times["ours"])} for name, spent in times.items()}


def _ratios(spent: list[float], base: list[float]) -> dict[str, float]:
    """Median time, and median and range of the ratios taken inside rounds."""
    ratios = [one / other for one, other in zip(spent, base, strict=True)]
    return {"ms": 1000 * median(spent), "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}


if __name__ == "__main__":
    main()
