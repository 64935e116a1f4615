"""Ovis' training module: the shared step, the falling temperature of Gumbel words, the redrawn layers of stage 1."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bestiary.config import Stage
from bestiary.mllm import MultimodalLM
from bestiary.schema import Batch
from bestiary.training.module import MLLMModule
from bestiary.training.schedule import lr_at_step
from bestiary.variants.ovis.model import redraw_layers
from bestiary.variants.ovis.temperature import tau_at_step, tau_ends
from bestiary.variants.ovis.usage import WordUsage
from bestiary.variants.ovis.visual_tokenizer import OvisVision

log = logging.getLogger(__name__)
PUBLISHED_PARTS = {
    "vision.backbone": "visual_tokenizer.backbone",
    "vision.head": "visual_tokenizer.head",
    "vision.table": "vte",
    "decoder": "llm",
}
"""Our parts and what the published trainer calls them (reference/ovis.md, sections 1.1 and 2)."""


class OvisModule(MLLMModule):
    """MLLMModule that anneals tau before every step, counts used words and may begin with fresh layers.

    Every `stage.log_every` steps the metrics say of the visual words what `usage.WordUsage.numbers` does; what it needs
    is counted in the forward pass of training, and only then brought to the host.

    max_tau, min_tau: the line that tau follows over the stage with gumbel_argmax alone; None takes the published
        ends.
    redraw_from: the backbone's layers from this one on are drawn anew before training (-1 in stage 1 of 1.0: the last
        of CLIP's 24); a resumed run takes its checkpoint's instead.
    """

    def __init__(
        self,
        model: MultimodalLM,
        stage: Stage,
        *,
        seed: int = 0,
        sources: Sequence[str] = (),
        domains: Sequence[str] = (),
        max_tau: float | None = None,
        min_tau: float | None = None,
        redraw_from: int | None = None,
    ) -> None:
        super().__init__(model, stage, seed=seed, sources=sources, domains=domains)
        if self.vision.tokenize != "gumbel_argmax" and (max_tau is not None or min_tau is not None):
            raise ValueError(
                f"max_tau={max_tau}, min_tau={min_tau}: only tokenize=gumbel_argmax has a temperature, this model has "
                f"tokenize={self.vision.tokenize}; leave them out"
            )
        self.max_tau, self.min_tau = tau_ends(max_tau, min_tau)
        if self.vision.connector == "table":
            self.vision.usage = WordUsage()
        if redraw_from is not None:
            redraw_layers(self.vision, redraw_from, seed=seed)
        parts = ", ".join(f"{name} ({count} tensors)" for name, count in trained_parts(model).items())
        log.info("stage %s trains %s", stage.name, parts)

    @property
    def vision(self) -> OvisVision:
        """The visual tokenizer."""
        return cast(OvisVision, self.model.vision)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """One optimiser step at the temperature of that step."""
        if self.vision.tokenize == "gumbel_argmax":
            self.vision.tau = self.temperature(self.step)
        usage, is_due = self.vision.usage, (self.step + 1) % max(1, self.stage.log_every) == 0
        if usage is not None:
            usage.begin(is_full=is_due)
        super().training_step(batch, batch_idx)
        if usage is not None and is_due:
            assert self.report is not None
            words = self.vision.table.num_embeddings - self.vision.num_marks
            self.report = replace(self.report, measured=usage.numbers(words, self.device, self._over_ranks))

    def rank_state(self) -> dict[str, Tensor]:
        """Which words were ever used, as this rank saw it; a resumed run goes on from there."""
        used = None if self.vision.usage is None else self.vision.usage.used
        return {} if used is None else {"words_used": used.cpu().to(torch.uint8)}

    def set_rank_state(self, states: Mapping[str, Tensor]) -> None:
        """The inverse of `rank_state`."""
        if self.vision.usage is not None and "words_used" in states:
            self.vision.usage.used = states["words_used"].to(self.device).bool()

    def temperature(self, step: int) -> float:
        """tau at a step, see `tau_at_step`."""
        return tau_at_step(step, self.stage.max_steps, max_tau=self.max_tau, min_tau=self.min_tau)

    def learning_rate(self, step: int) -> float:
        """The schedule with a warm-up of whole steps, rounded up, as published (section 2)."""
        stage = self.stage
        warmup = whole_warmup(stage.schedule.warmup, stage.max_steps)
        return lr_at_step(step, stage.max_steps, lr=stage.optimizer.lr, warmup=warmup, min_lr=stage.schedule.min_lr)


def trained_parts(model: MultimodalLM) -> dict[str, int]:
    """How many tensors train of each part, by the part's published name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    counts = Counter(told for name in names for ours, told in PUBLISHED_PARTS.items() if name.startswith(f"{ours}."))
    return {told: counts[told] for told in PUBLISHED_PARTS.values() if counts[told]}


def whole_warmup(share: float, max_steps: int) -> float:
    """A warm-up's share of the stage made a whole number of steps, rounded up."""
    return math.ceil(max_steps * share) / max_steps
