"""The ViT of Monkey's demo learns to read: every patch says which word it shows, from easy pages to real ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestiary.variants.monkey.vit import VisionTransformer
from bestiary.vision.encoders import normalise

from .monkey_pages import NOTHING, pages

KNOWN = 0.55
"""Share of patches right from which on pages become harder."""
STEP = 0.005
"""By how much, a training step."""
_SPREAD = 0.15
"""Pages of a step are up to so much harder than the last ones it mastered."""


def fit_eye(
    vit: VisionTransformer, schedule: Callable[..., None], *, steps: int, batch: int, lr: float, seed: int
) -> None:
    """Fit the ViT with a probe that is thrown away; `schedule` as in `monkey_base`."""
    probe = nn.Linear(vit.width, NOTHING + 1)
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = 0.2
    rng = Random(f"monkey-eye/{seed}")
    state = {"ease": 1.0, "known": 0.0}

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        pixels, words = pages(rng, [max(0.0, state["ease"] - _SPREAD * rng.random()) for _ in range(batch)])
        scores = probe(vit(normalise(pixels)[None])[0])
        loss = F.cross_entropy(scores.flatten(0, 1), words.flatten(), weight)
        right = (scores.argmax(-1) == words)[words != NOTHING].float().mean().item()
        state["known"] = 0.95 * state["known"] + 0.05 * right
        if state["known"] > KNOWN:
            state["ease"] = max(0.0, state["ease"] - STEP)
        return loss, {"loss": loss.item(), "right": right, "ease": state["ease"]}

    schedule([*vit.parameters(), *probe.parameters()], step, steps=steps, lr=lr)
