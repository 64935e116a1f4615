"""A model of a few hundred parameters, a stream that is a pure function of (lane, step), and a program of both."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import nn

from bestiary.config import Cluster, Logger, Optimizer, Schedule, Stage
from bestiary.mllm import TokenLosses
from bestiary.schema import IGNORE, Batch, Example
from bestiary.training.fit import Summary, fit
from bestiary.training.module import MLLMModule
from bestiary.training.resuming import open_run
from data_modules.collate import collate_rows

VOCABULARY = 17
SOURCES = ("alpha", "beta")
DOMAINS = ("natural", "document")


class TinyLM(nn.Module):
    """Embedding, a frozen part, dropout and a head: each token predicts the next."""

    def __init__(self, width: int = 8, dropout: float = 0.1, blocks: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5))
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, batch: Batch) -> TokenLosses:
        hidden = self.embed(batch.ids)
        hidden = hidden + self.encoder(hidden)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        logits = self.head(self.dropout(self.norm(hidden)))
        where = [(s.row, s.start + i) for s in batch.segments for i in range(1, s.length)]
        rows = torch.tensor([r for r, _ in where], dtype=torch.int64, device=batch.ids.device)
        columns = torch.tensor([c for _, c in where], dtype=torch.int64, device=batch.ids.device)
        owner = torch.tensor([n for n, s in enumerate(batch.segments) for _ in range(1, s.length)], dtype=torch.int64)
        labels = batch.labels[rows, columns]
        keep = labels != IGNORE
        values = nn.functional.cross_entropy(logits[rows, columns - 1][keep].float(), labels[keep], reduction="none")
        return TokenLosses(values, owner.to(batch.ids.device)[keep])


def tiny_model(seed: int = 0, **options: Any) -> TinyLM:
    """A model with repeatable weights."""
    torch.manual_seed(seed)
    return TinyLM(**options)


def tiny_stage(**changes: Any) -> Stage:
    """A stage over everything but the encoder."""
    given: dict[str, Any] = {
        "name": "tiny",
        "parents": ["tiny"],
        "freeze": ["encoder.*"],
        "max_steps": 6,
        "batch_size": 4,
        "optimizer": Optimizer(lr=0.05, weight_decay=0.1),
        "schedule": Schedule(warmup=0.2),
        "clip_norm": 1.0,
        "checkpoint_every": 2,
    }
    return Stage(**(given | changes))


def tiny_row(lane: int, step: int) -> list[Example]:
    """One or two counting sequences, a pure function of lane and step."""
    rng = np.random.default_rng((lane, step))
    row = []
    for part in range(1 + lane % 2):
        length = int(rng.integers(4, 9))
        ids = (int(rng.integers(VOCABULARY)) + np.arange(length)) % VOCABULARY
        labels = ids.copy()
        labels[: int(rng.integers(1, 3))] = IGNORE
        which = int(rng.integers(2))
        row.append(
            Example(
                ids=ids,
                labels=labels,
                slots=np.zeros(length, np.uint8),
                pixels=np.zeros((0, 3, 4, 4), np.uint8),
                regions=None,
                num_views=0,
                key=f"{SOURCES[which]}/{lane}-{step}-{part}",
                source=SOURCES[which],
                domain=DOMAINS[which],
            )
        )
    return row


class TinyData(lightning.LightningDataModule):
    """An endless stream of `lanes` rows a step in micro-batches of `micro` rows; weights: source -> loss weight."""

    def __init__(
        self,
        lanes: int = 4,
        micro: int = 2,
        sleep_s: float = 0.0,
        version: int = 1,
        on_change: str = "refuse",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.on_change = dict(weights or {}), on_change
        self.num_lanes, self.micro, self.sleep_s, self.version = lanes, micro, sleep_s, version
        self.first = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"lanes": self.num_lanes, "version": self.version}

    def shares(self, step: int) -> dict[str, float]:
        return dict.fromkeys(SOURCES, 0.5)

    def explain_change(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> list[str]:
        old, new = fingerprint["version"], self.version
        return [] if old == new else [f"version {old} -> {new}"]

    def load_states(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> int:
        if dict(fingerprint) != self.fingerprint() and self.on_change == "refuse":
            raise ValueError(f"the stream changed: {dict(fingerprint)} -> {self.fingerprint()}")
        (self.first,) = {int(state) for state in states.values()}
        return self.first

    def fetched(self) -> dict[str, int]:
        return {}

    def losses(self, states: Sequence[bytes]) -> list[str]:
        return []

    def check_damage(self, states: Sequence[bytes]) -> None:
        """Nothing is ever damaged."""

    def step_of(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """A rank's micro-batches of a step."""
        share = self.num_lanes // world
        mine = list(range(rank * share, (rank + 1) * share))
        groups = [mine[i : i + self.micro] for i in range(0, share, self.micro)]
        return [
            collate_rows(
                [self.row(lane, step) for lane in group],
                lanes=group,
                states=[str(step + 1).encode()] * len(group),
                step=step,
            )
            for group in groups
        ]

    def row(self, lane: int, step: int) -> list[Example]:
        """A row with the weights of its sources."""
        return [replace(e, loss_weight=self.weights.get(e.source, 1.0)) for e in tiny_row(lane, step)]

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return _Endless(self, rank, world)


class _Endless:
    def __init__(self, data: TinyData, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __iter__(self) -> Iterator[list[Batch]]:
        step = self.data.first
        while True:
            time.sleep(self.data.sleep_s)
            yield self.data.step_of(step, self.rank, self.world)
            step += 1


def train(
    path: Path,
    *,
    stage: Stage | None = None,
    resume: bool = False,
    data: TinyData | None = None,
    cluster: Cluster | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[Summary, MLLMModule]:
    """Train a tiny model into `path`."""
    stage = stage or tiny_stage()
    run, checkpoint = open_run(path, resume=resume, stage=stage.name, config="asked: 1\n", resolved="became: 1\n")
    module = MLLMModule(model or tiny_model(), stage, seed=3, sources=SOURCES, domains=DOMAINS)
    summary = fit(
        module,
        data or TinyData(lanes=stage.batch_size),
        run=run,
        cluster=cluster or Cluster(threads=1),
        checkpoint=checkpoint,
        **options,
    )
    return summary, module


def main() -> int:
    """The program the tests kill (`killed.py`): trains into the run directory it is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sleep", type=float, default=0.02)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--beta-weight", type=float, default=1.0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    stage = tiny_stage(max_steps=given.steps, checkpoint_every=given.every)
    summary, _ = train(
        given.path,
        stage=stage,
        resume=given.resume,
        data=TinyData(lanes=4, micro=given.micro, sleep_s=given.sleep, weights={"beta": given.beta_weight}),
        cluster=Cluster(devices=given.devices, strategy=given.strategy, precision=given.precision, threads=1),
        model=tiny_model(width=given.width, dropout=given.dropout, blocks=2),
        logger=Logger(wandb=False, progress=True),
    )
    logging.info("%s", json.dumps({"state": summary.state, "step": summary.step}))
    return summary.exit_code
