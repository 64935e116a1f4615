"""Trains the four encoders of demo-scale SPHINX-V on embedded pictures, each alone, on one thread.

python -m experiments.demo_assets.encoders            # all, two at a time, about 15 minutes on two cores
python -m experiments.demo_assets.encoders --tower clip

The published encoders have seen billions of pictures; these learn the names and letters of the embedded data. Every
step shows crops around one thing each and asks what lies at a point of it: easy at first (the thing in the middle, at
the scale of the quarters), then anywhere in the crop and, for a share of the steps, at the scale of the whole picture.
Towers with a position table also say where each of their tokens lies, so that features carry the place of their cell;
the Q-Former says which names its view holds.
"""

from __future__ import annotations

import argparse
import logging
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bestiary.vision.encoders import clip_to_imagenet, normalise
from data_modules.embedded.scene import STRING_LETTERS

from .model import demo_model
from .pictures import LENGTH, TEXT, Pictures, cached

log = logging.getLogger("demo_assets")

NUM_PICTURES, SEED = 24_000, 77
WORK = Path(".cache/demo_assets")
MARGIN = 64
"""Pixels by which pictures are extended before cropping."""


@dataclass(frozen=True, slots=True)
class Course:
    """One part of a tower's training. shift: largest distance of the thing from the crop's middle, px, begin and end.

    half: share of steps at half scale. ramp: share of the part after which `shift` has reached its end.
    """

    steps: int
    lr: float
    crop_px: int
    batch: int
    shift: tuple[float, float]
    half: float = 0.0
    ramp: float = 0.6


COURSES: dict[str, tuple[Course, ...]] = {
    "convnext": (
        Course(1800, 1.4e-2, 40, 96, (4, 4)),
        Course(8500, 8e-3, 48, 80, (4, 15), half=0.27, ramp=0.3),
    ),
    "clip": (Course(6000, 3e-3, 64, 64, (6, 22), half=0.3),),
    "dinov2": (Course(6000, 3e-3, 64, 64, (6, 22), half=0.3),),
    "qformer": (Course(4500, 3e-3, 64, 64, (16, 24), half=0.4),),
}


class Asker(nn.Module):
    """A tower with the heads that question it; the heads are thrown away."""

    def __init__(self, name: str, tower: nn.Module, num_names: int, grid: int) -> None:
        super().__init__()
        self.name, self.tower, self.grid = name, tower, grid
        width = int(tower.out_dim)  # type: ignore[arg-type]
        self.mix = nn.Sequential(nn.Linear(width, 128), nn.LayerNorm(128))
        self.names = nn.Linear(128, num_names)
        self.letters = nn.Linear(128, LENGTH * len(STRING_LETTERS))
        self.register_buffer("code", position_code(grid, width // 4))
        self.place = nn.Linear(width, width)

    def tokens(self, views: Tensor) -> Tensor:
        """float[N, C, g, g] of a tower with places, float[N, Q, C] of the Q-Former; views: CLIP-normalised."""
        if self.name == "qformer":
            return self.tower(views)  # type: ignore[no-any-return]
        if self.name == "convnext":
            return self.tower(views).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        tokens = self.tower(clip_to_imagenet(views) if self.name == "dinov2" else views)[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # type: ignore[no-any-return]

    def at(self, maps: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of names [N, K, names] and letters [N, K, LENGTH, letters] at points [N, K, 2] in [-1, 1]."""
        found = F.grid_sample(maps, points[:, :, None], align_corners=False, padding_mode="border")[..., 0]
        hidden = self.mix(found.transpose(1, 2))
        return self.names(hidden), self.letters(hidden).unflatten(-1, (LENGTH, len(STRING_LETTERS)))

    def place_loss(self, maps: Tensor) -> Tensor:
        """How far the features are from telling their cell; zero for towers without a position table."""
        if self.name == "convnext":
            return maps.new_zeros(())
        said = self.place(maps.flatten(2).transpose(1, 2))
        return F.mse_loss(said, self.code.expand_as(said))  # type: ignore[operator]


def position_code(grid: int, waves: int) -> Tensor:
    """float[grid * grid, 4 * waves]: sines and cosines of x, then of y, of the cells' middles."""
    u = (torch.arange(grid) + 0.5) / grid
    angles = u[:, None] * torch.arange(1, waves + 1) * (math.pi / 2)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1) / 2
    return torch.cat([line.expand(grid, grid, -1), line[:, None].expand(grid, grid, -1)], -1).flatten(0, 1)


@torch.no_grad()
def begin(name: str, tower: Any) -> None:
    """Starting weights with which a small tower learns in minutes: wide enough, and positions as sines and cosines."""
    inner = {"convnext": "tower", "clip": "tower", "dinov2": "tower", "qformer": "vision_model"}[name]
    for key, weight in getattr(tower, inner).named_parameters():
        if key.endswith("layer_scale_parameter"):
            weight.fill_(1.0)
        elif weight.ndim >= 2 and "embed" not in key and name != "convnext":
            nn.init.trunc_normal_(weight, std=0.05)
        elif weight.ndim >= 2 and name == "convnext":
            bound = math.sqrt(3.0 / weight[0].numel())
            nn.init.uniform_(weight, -bound, bound)
    if name == "convnext":
        return
    table = {
        "clip": lambda: tower.tower.embeddings.position_embedding.weight,
        "dinov2": lambda: tower.tower.embeddings.position_embeddings[0],
        "qformer": lambda: tower.vision_model.embeddings.position_embedding[0],
    }[name]()
    table[1:] = position_code(math.isqrt(len(table) - 1), table.shape[1] // 4)
    if name == "qformer":
        nn.init.normal_(tower.query_tokens, std=0.2)


class Crops:
    """Draws crops around one thing each."""

    def __init__(self, pictures: Pictures, seed: int) -> None:
        edges = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
        self.pixels = np.pad(pictures.pixels, edges, mode="edge")
        self.side = pictures.pixels.shape[1]
        self.pictures = pictures
        self.rows, self.columns = np.nonzero(pictures.names >= TEXT)
        self.rng = np.random.default_rng(seed)

    def draw(self, course: Course, shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(views, points [N, 1, 2], names [N, 1], letters [N, 1, LENGTH], names in view [N, names])."""
        rng, scale = self.rng, 2 if self.rng.random() < course.half else 1
        chosen = rng.integers(0, len(self.rows), course.batch)
        i, k = self.rows[chosen], self.columns[chosen]
        box = self.pictures.boxes[i, k] * self.side
        middle, size = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
        half = course.crop_px // 2 * scale
        centre = (middle + rng.uniform(-shift, shift, middle.shape) * scale).round().astype(int)
        centre = centre.clip(half - MARGIN, self.side + MARGIN - half)
        off = rng.uniform(-0.35, 0.35, middle.shape) * size * (shift > 6)
        points = (middle + off - centre) / half
        corner = centre + MARGIN - half
        cut = np.stack(
            [self.pixels[n, y : y + 2 * half, x : x + 2 * half] for n, (x, y) in zip(i, corner, strict=True)]
        )
        views = normalise(torch.from_numpy(cut).permute(0, 3, 1, 2))
        if scale == 2:
            views = F.interpolate(views, scale_factor=0.5, mode="bicubic", align_corners=False)
        names = np.where(self.pictures.names[i, k] >= 0, self.pictures.names[i, k], -100)
        views = views.contiguous(memory_format=torch.channels_last)
        asked = (points[:, None].astype(np.float32), names[:, None], self.pictures.letters[i, k][:, None])
        return (views, *(torch.from_numpy(x) for x in asked), self.inside(i, centre, half))

    def inside(self, rows: np.ndarray, centre: np.ndarray, half: int) -> Tensor:
        """float[N, names]: 1 for names whose middle lies in the crop."""
        boxes, names = self.pictures.boxes[rows] * self.side, self.pictures.names[rows]
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        seen = (np.abs(middle - centre[:, None]) < half).all(-1) & (names >= 0)
        bag = torch.zeros(len(rows), len(self.pictures.vocabulary) + 1)
        bag.scatter_(1, torch.from_numpy(np.where(seen, names, len(self.pictures.vocabulary))), 1.0)
        return bag[:, :-1]


def loss_of(asker: Asker, drawn: tuple[Tensor, ...]) -> Tensor:
    """What a step minimises."""
    views, points, names, letters, bag = drawn
    tokens = asker.tokens(views)
    if asker.name == "qformer":
        return 20 * F.binary_cross_entropy_with_logits(asker.names(asker.mix(tokens.mean(1))), bag)
    name_scores, letter_scores = asker.at(tokens, points)
    loss = F.cross_entropy(name_scores.flatten(0, 1), names.flatten())
    loss = loss + F.cross_entropy(letter_scores.flatten(0, 2), letters.flatten())
    return loss + asker.place_loss(tokens)


def train(asker: Asker, crops: Crops, courses: tuple[Course, ...], heldout: Pictures) -> None:
    """All parts of a tower's training."""
    for number, course in enumerate(courses, 1):
        optimizer = torch.optim.AdamW(
            asker.parameters(), lr=course.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        began = time.monotonic()
        for step in range(course.steps):
            done = step / course.steps
            lr = course.lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = lr
            shift = course.shift[0] + (course.shift[1] - course.shift[0]) * min(1.0, done / course.ramp)
            loss = loss_of(asker, crops.draw(course, shift))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(asker.parameters(), 2.0)
            optimizer.step()
            if (step + 1) % 500 == 0:
                spent = time.monotonic() - began
                log.info("%s part %d step %d loss %.3f %.0f s %s", asker.name, number, step + 1, loss.item(), spent,
                         score(asker, heldout) if (step + 1) % 1500 == 0 else "")  # fmt: skip
    log.info("%s done: held-out %s", asker.name, score(asker, heldout))


@torch.no_grad()
def score(asker: Asker, pictures: Pictures, number: int = 400) -> str:
    """Share of right names and whole strings at things' middles, in the whole view and in the quarters."""
    if asker.name == "qformer":
        return ""
    asker.eval()
    pixels = torch.from_numpy(pictures.pixels[:number]).permute(0, 3, 1, 2)
    canvas, side = normalise(pixels), pixels.shape[-1] // 2
    boxes, names = pictures.boxes[:number], torch.from_numpy(pictures.names[:number])
    letters = torch.from_numpy(pictures.letters[:number])
    middle = torch.from_numpy(boxes[..., :2] + boxes[..., 2:]) / 2
    hits: dict[str, list[Tensor]] = {"whole names": [], "whole strings": [], "cut names": [], "cut strings": []}
    for view in (None, (0, 0), (0, 1), (1, 0), (1, 1)):
        if view is None:
            views, points = F.interpolate(canvas, (side, side), mode="bicubic", align_corners=False), middle * 2 - 1
        else:
            views = canvas[:, :, view[0] * side :, view[1] * side :][:, :, :side, :side]
            points = (middle - torch.tensor([view[1], view[0]]) / 2) * 4 - 1
        name_scores, letter_scores = asker.at(torch.cat([asker.tokens(v) for v in views.split(100)]), points)
        seen, kind = (points.abs() < 1).all(-1), "whole" if view is None else "cut"
        right = name_scores.argmax(-1) == names
        hits[f"{kind} names"].append(right[seen & (names >= 0)])
        right = (letter_scores.argmax(-1) == letters).all(-1)
        hits[f"{kind} strings"].append(right[seen & (names == TEXT)])
    asker.train()
    return ", ".join(f"{what} {torch.cat(found).float().mean():.3f}" for what, found in hits.items())


def train_tower(name: str) -> None:
    """Train one tower and write its part of the encoders' file."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = demo_model()
    vision: Any = model.vision
    pictures = cached(WORK, "pictures", NUM_PICTURES, seed=SEED, split="train", side=vision.canvas_px)
    heldout = cached(WORK, "pictures", 800, seed=SEED, split="heldout", side=vision.canvas_px)
    if heldout.vocabulary != pictures.vocabulary:
        raise ValueError("held-out pictures show other names than training pictures; make more of them")
    tower = getattr(vision, name).train().requires_grad_(True)
    begin(name, tower)
    if name == "convnext":
        tower.to(memory_format=torch.channels_last)
    asker = Asker(name, tower, len(pictures.vocabulary), math.isqrt(vision.clip.num_tokens - 1))
    train(asker, Crops(pictures, SEED), COURSES[name], heldout)
    state = {f"vision.{name}.{key}": value.contiguous() for key, value in tower.state_dict().items()}
    save_file(state, WORK / f"encoder-{name}.safetensors")


def main() -> None:
    """Train the towers asked for; with all of them, write the encoders' file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tower", choices=[*COURSES, "all", "join"], default="all")
    parser.add_argument("--out", type=Path, default=Path("src/bestiary/variants/sphinx_v/assets/encoders.safetensors"))
    args = parser.parse_args()
    if args.tower in COURSES:
        train_tower(args.tower)
        return
    if args.tower == "all":
        side = demo_model().vision.canvas_px  # type: ignore[union-attr]
        cached(WORK, "pictures", NUM_PICTURES, seed=SEED, split="train", side=side)  # type: ignore[arg-type]
        cached(WORK, "pictures", 800, seed=SEED, split="heldout", side=side)  # type: ignore[arg-type]
        command = [sys.executable, "-m", "experiments.demo_assets.encoders", "--tower"]
        beside = subprocess.Popen([*command, "convnext"])
        for name in ("clip", "dinov2", "qformer"):
            subprocess.run([*command, name], check=True)
        if beside.wait():
            raise RuntimeError("training convnext failed; its messages stand above")
    joined = {k: v for name in COURSES for k, v in load_file(WORK / f"encoder-{name}.safetensors").items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half() if value.is_floating_point() else value for key, value in joined.items()}, args.out)
    log.info("%s: %d tensors, %.1f MB", args.out, len(joined), args.out.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
