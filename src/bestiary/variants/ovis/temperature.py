"""The temperature of Gumbel words: a line over the steps of a stage (reference/ovis.md, section 2)."""

from __future__ import annotations

MAX_TAU, MIN_TAU = 5.0, 0.05
"""Defaults of the published trainer (reference/ovis.md, section 2)."""


def tau_ends(max_tau: float | None = None, min_tau: float | None = None) -> tuple[float, float]:
    """The ends of tau's line, the published ones where they are None."""
    ends = (MAX_TAU if max_tau is None else max_tau, MIN_TAU if min_tau is None else min_tau)
    if not 0 < ends[1] <= ends[0]:
        raise ValueError(f"max_tau={ends[0]}, min_tau={ends[1]}: give 0 < min_tau <= max_tau")
    return ends


def tau_at_step(step: int, max_steps: int, *, max_tau: float = MAX_TAU, min_tau: float = MIN_TAU) -> float:
    """tau before optimiser step `step`, from 0: a line whose end is the step after the last, so never reached."""
    return max_tau - (max_tau - min_tau) * step / max_steps
