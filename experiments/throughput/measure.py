"""Rounds, ratios and their spread: plain numbers, no clock of its own.

Every contender is one process that waits; a round lets each of them run once, one after another, on one core. A ratio
is taken inside a round, so that a busy machine slows both sides of it; the median over rounds is what is reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass
class Contender:
    """One way to do the work. python: the interpreter whose packages it needs. passes: epochs in a round."""

    name: str
    module: str
    python: str = sys.executable
    passes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def start(self, task: str, folder: Path) -> None:
        """Start its process and let it open the data."""
        spec = {"module": self.module, "task": task, "folder": str(folder), "options": self.options}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/src"}
        self.process = subprocess.Popen(
            [self.python, "-W", "ignore", str(HERE / "serve.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        """`check`: what it delivers. `round`: CPU and wall seconds of `passes` epochs."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, "passes": self.passes}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.name} ended with code {self.process.wait()}; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_rounds(contenders: Sequence[Contender], task: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Name -> CPU milliseconds a sample, one number a round; all must deliver the same things first."""
    try:
        for contender in contenders:
            contender.start(task, folder)
        _require_equal({c.name: c.ask("check") for c in contenders})
        found: dict[str, list[float]] = {c.name: [] for c in contenders}
        for number in range(rounds + 1):  # the first one warms up
            order = contenders if number % 2 else contenders[::-1]
            for contender in order:
                answer = contender.ask("round")
                if number:
                    found[contender.name].append(1000 * answer["cpu_s"] / answer["samples"])
        return found
    finally:
        for contender in contenders:
            contender.stop()


def _require_equal(checks: dict[str, dict[str, Any]]) -> None:
    groups: dict[str, list[str]] = {}
    for name, check in checks.items():
        groups.setdefault(f"{check['samples']} samples, digest {check['digest']}", []).append(name)
    if len(groups) > 1:
        told = "; ".join(f"{', '.join(names)}: {what}" for what, names in groups.items())
        raise RuntimeError(f"the contenders do not deliver the same: {told}")


def ratios(times: dict[str, list[float]], ours: str, floor: str | None) -> dict[str, dict[str, float]]:
    """Name -> median and range of (its time / our time) inside rounds; above 1 we are faster.

    Rounds in which the floor is more than 15 % off its own median are left out: the machine was disturbed.
    """
    kept = list(range(len(times[ours])))
    if floor is not None:
        middle = median(times[floor])
        kept = [i for i in kept if abs(times[floor][i] / middle - 1) <= 0.15] or kept
    table = {}
    for name, values in times.items():
        quotients = sorted(values[i] / times[ours][i] for i in kept)
        table[name] = {
            "ms": median(values[i] for i in kept),
            "ratio": median(quotients),
            "low": quotients[0],
            "high": quotients[-1],
            "rounds": float(len(kept)),
        }
    return table
