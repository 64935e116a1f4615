"""Ovis' training module: the shared step, the falling temperature of Gumbel words, the redrawn layers of stage 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from bestiary.config import Stage
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch
from bestiary.training.module import MLLMModule
from bestiary.training.schedule import lr_at_step
from bestiary.variants.ovis.model import redraw_layers
from bestiary.variants.ovis.visual_tokenizer import OvisVision


class OvisModule(MLLMModule):
    """MLLMModule that anneals tau before every step and may begin with fresh layers.

    max_tau, min_tau: the line that tau follows over the stage with gumbel_argmax (reference/ovis.md, section 2).
    redraw_from: the backbone's layers from this one on are drawn anew before training (23 in stage 1 of 1.0, the last
        of CLIP's); a resumed run takes its checkpoint's instead.
    """

    def __init__(
        self,
        model: MultimodalLM,
        stage: Stage,
        *,
        seed: int = 0,
        sources: Sequence[str] = (),
        domains: Sequence[str] = (),
        max_tau: float = 5.0,
        min_tau: float = 0.05,
        redraw_from: int | None = None,
    ) -> None:
        super().__init__(model, stage, seed=seed, sources=sources, domains=domains)
        if not 0 < min_tau <= max_tau:
            raise ValueError(f"max_tau={max_tau}, min_tau={min_tau}: give 0 < min_tau <= max_tau")
        self.max_tau, self.min_tau = max_tau, min_tau
        if redraw_from is not None:
            redraw_layers(self.vision, redraw_from, seed=seed)

    @property
    def vision(self) -> OvisVision:
        """The visual tokenizer."""
        return cast(OvisVision, self.model.vision)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """One optimiser step at the temperature of that step."""
        if self.vision.tokenize == "gumbel_argmax":
            self.vision.tau = self.temperature(self.step)
        super().training_step(batch, batch_idx)

    def temperature(self, step: int) -> float:
        """tau at a step, see `tau_at_step`."""
        return tau_at_step(step, self.stage.max_steps, max_tau=self.max_tau, min_tau=self.min_tau)

    def learning_rate(self, step: int) -> float:
        """The schedule with a warm-up of whole steps, rounded up, as published (section 2)."""
        stage = self.stage
        warmup = whole_warmup(stage.schedule.warmup, stage.max_steps)
        return lr_at_step(step, stage.max_steps, lr=stage.optimizer.lr, warmup=warmup, min_lr=stage.schedule.min_lr)


def tau_at_step(step: int, max_steps: int, *, max_tau: float = 5.0, min_tau: float = 0.05) -> float:
    """tau before optimiser step `step`, from 0: a line whose end is the step after the last, so never reached."""
    return max_tau - (max_tau - min_tau) * step / max_steps


def whole_warmup(share: float, max_steps: int) -> float:
    """A warm-up's share of the stage made a whole number of steps, rounded up."""
    return math.ceil(max_steps * share) / max_steps
