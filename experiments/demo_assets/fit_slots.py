"""Part 1 of the prompt fit: every slot learns, in the decoder's first block, what lies under its mark."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_modules.embedded.generate import DOMAINS

from .pictures import LENGTH, TEXT, Pictures
from .prompt_path import NUM_SLOTS, Asked, Fitter, Marked, schedule

log = logging.getLogger("demo_assets")
BATCH = 48


def answers_of(
    slots: Tensor, asked: Asked, things: tuple[np.ndarray, np.ndarray], used: np.ndarray, pictures: Pictures
) -> Any:
    """(name targets, letter targets, name scores, letter scores) of slots; things: (picture, thing) of every slot."""
    names, letters = pictures.names[things[0], things[1]], pictures.letters[things[0], things[1]]
    names_of = torch.from_numpy(np.where(used & (names >= 0), names, -100))
    letters_of = torch.from_numpy(np.where((used & (names == TEXT))[..., None], letters, -100))
    return names_of, letters_of, asked.names(slots), asked.letters(slots).unflatten(-1, (LENGTH, -1))


def fit_slots(fitter: Fitter, asked: Asked, data: Marked, heldout: Marked, *, steps: int, lr: float) -> None:
    """Part 1 of the fit."""
    block, vision = fitter.inner.layers[0], fitter.vision
    with torch.no_grad():
        for weight in block.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.06)
    parts = [vision.visual_proj, vision.qformer_proj, fitter.model.regions, block, asked]
    learned = [p for part in parts for p in part.parameters() if p.requires_grad] + [vision.start, vision.end]
    for step, began in schedule(learned, lr, steps):
        rows = data.rng.integers(0, len(data.counts), BATCH)
        things, marks = data.dense(rows)
        coords, is_point = marks.coords, marks.is_point
        logits, slots = fitter.slots_after_first_block(fitter.embeds(data, rows, marks))
        names, letters, name_scores, letter_scores = answers_of(
            slots, asked, (rows[:, None], things), marks.used, data.pictures
        )
        corners = coords[..., 2:] * ~is_point[..., None] + coords[..., :2] * is_point[..., None]
        places = fitter.places((coords[..., :2] + corners) / 2)
        unused, mask = F.one_hot(torch.tensor(0), fitter.text).float(), torch.from_numpy(marks.used)[..., None]
        told = [torch.where(mask, place, unused) for place in places]
        look = sum(-(t * logits[:, h].log_softmax(-1)).sum(-1).mean() for h, t in enumerate(told)) / len(told)
        numbers = torch.arange(NUM_SLOTS).repeat(len(rows))
        loss = look + F.cross_entropy(name_scores.flatten(0, 1), names.flatten())
        loss = loss + F.cross_entropy(letter_scores.flatten(0, 2), letters.flatten())
        loss = loss + 0.1 * F.cross_entropy(asked.number(slots).flatten(0, 1), numbers)
        loss.backward()
        if (step + 1) % 200 == 0:
            told_now = score_slots(fitter, asked, heldout) if (step + 1) % 600 == 0 or step + 1 == steps else ""
            log.info("slots step %d loss %.3f %.0f s %s", step + 1, loss.item(), time.monotonic() - began, told_now)


@torch.no_grad()
def score_slots(fitter: Fitter, asked: Asked, data: Marked) -> str:
    """Share of slots that know their thing, by domain."""
    hits: list[list[Tensor]] = [[] for _ in DOMAINS]
    for rows in np.array_split(np.arange(len(data.counts)), max(1, len(data.counts) // 100)):
        things, marks = data.dense(rows)
        _, slots = fitter.slots_after_first_block(fitter.embeds(data, rows, marks))
        names, letters, name_scores, letter_scores = answers_of(
            slots, asked, (rows[:, None], things), marks.used, data.pictures
        )
        right = torch.where(names >= 0, name_scores.argmax(-1) == names, (letter_scores.argmax(-1) == letters).all(-1))
        for number, found in enumerate(hits):
            found.append(right[torch.from_numpy(marks.used & (data.pictures.domains[rows] == number)[:, None])])
    shares = [torch.cat(found).float().mean().item() for found in hits]
    return " ".join(f"{domain} {share:.3f}" for domain, share in zip(DOMAINS, shares, strict=True))
