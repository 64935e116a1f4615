"""Two runs on the same questions: whether the difference of their scores is more than the draw of the pictures.

Scores are paired question by question from `eval/<benchmark>/predictions.jsonl`, and whole pictures are drawn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestiary.evaluation.report import MIN_PICTURES
from bestiary.evaluation.statistics import Interval, paired_bootstrap


@dataclass(frozen=True, slots=True)
class Comparison:
    """One benchmark of two runs.

    first, second: mean scores of the questions that both answered (nats per token where likelihoods were scored).
    gain: the second's minus the first's, 95 % interval; None below report.MIN_PICTURES pictures. num: questions of
    both. num_apart: questions of one run alone, which are left out.
    """

    benchmark: str
    first: float
    second: float
    gain: Interval | None
    num: int
    num_apart: int


def compare(first: Path, second: Path, *, seed: int = 0) -> list[Comparison]:
    """Every benchmark that both run directories were scored on; ValueError where there is none."""
    scored = [{path.parent.name: path for path in run.glob("eval/*/predictions.jsonl")} for run in (first, second)]
    both = sorted(scored[0].keys() & scored[1].keys())
    if not both:
        told = " and ".join(
            f"{run} has {', '.join(sorted(s)) or 'none'}" for run, s in zip((first, second), scored, strict=True)
        )
        raise ValueError(f"no benchmark was scored on both runs: {told}; run eval.py on them with the same suite")
    return [_compared(name, scored[0][name], scored[1][name], seed) for name in both]


def _compared(name: str, first: Path, second: Path, seed: int) -> Comparison:
    ours, theirs = _lines(first), _lines(second)
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise ValueError(f"{first} and {second} share no question; score both runs on the same held-out data")
    pictures: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for key in shared:
        if _asked(ours[key]) != _asked(theirs[key]):
            raise ValueError(
                f"question {key[1]} of {first} is another one in {second}; score both on the same held-out data"
            )
        (value, weight), (other, _) = _score(ours[key]), _score(theirs[key])
        sums = pictures[ours[key].get("picture", key)]
        for i, amount in enumerate((value, other, weight)):
            sums[i] += amount
    a, b, n = ([sums[i] for sums in pictures.values()] for i in range(3))
    gain = paired_bootstrap(b, a, n, seed=seed)[2] if len(n) >= MIN_PICTURES else None
    apart = len(ours) + len(theirs) - 2 * len(shared)
    return Comparison(name, sum(a) / sum(n), sum(b) / sum(n), gain, len(shared), apart)


def _lines(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(source, key) -> what predictions.jsonl says of the question; keys are unique within a source alone."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(line["source"], line["key"]): line for line in lines}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); run eval.py again") from error


def _score(line: Mapping[str, Any]) -> tuple[float, float]:
    """Score and weight of a question: of a text its tokens, of anything else 1."""
    if "nll" in line:
        return line["nll"], line["num_tokens"]
    return float(line.get("score", line.get("is_correct"))), 1.0


def _asked(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same in both runs."""
    return tuple(line.get(name) for name in ("question", "gold", "reference", "num_tokens"))
