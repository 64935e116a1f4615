"""The shared LightningModule: one Lightning step is one optimiser step over a rank's micro-batches.

The loss is the sum of token losses over the global number of target tokens (all ranks, all micro-batches), each token
weighted in both sums by its sample's loss weight, so the same global batch gives the same gradient for every split.
Lightning runs the loop and the strategy; the step itself is
written out here (manual optimisation), because averages of averages are what automatic accumulation would give.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn

from bestiary.config import Stage
from bestiary.mllm import TokenLosses
from bestiary.schema import Batch
from bestiary.training.report import (
    NAMED_COUNTS,
    Names,
    StepReport,
    count_step,
    gather_objects,
    keys_by_lane,
    loss_weights,
    seen_samples,
    states_by_lane,
    sum_by_segment,
    sum_losses,
)
from bestiary.training.schedule import lr_at_step
from bestiary.training.stages import apply_stage, build_optimizer, set_lr, set_train_mode
from bestiary.training.strategies import accumulating, call_model, clip_gradients, norm_after_step, shard_for_strategy


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of a step is not a finite number."""


class MLLMModule(LightningModule):
    """Trains a model whose forward turns a Batch into TokenLosses (`values` float[K], `segment` int64[K]).

    sources, domains: labels the per-source and per-domain losses may carry. Needed with several ranks (all must agree);
    on one rank they may be left out and are collected as they occur.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        *,
        seed: int = 0,
        sources: Sequence[str] = (),
        domains: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.stage = stage
        self.seed = seed
        self.sources = Names(sources, what="source")
        self.domains = Names(domains, what="domain")
        self.step = 0
        self.stop_signals: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.report: StepReport | None = None
        apply_stage(model, stage)
        if stage.activation_checkpointing:
            enable_activation_checkpointing(model)

    def check(self, batch: Batch) -> None:
        """A variant's own checks of a micro-batch, still on the host; raises on a batch it must not train on."""

    def rank_state(self) -> dict[str, torch.Tensor]:
        """Tensors of this rank beside weights and moments that an exact resume needs, by name."""
        return {}

    def set_rank_state(self, states: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `rank_state`; an empty mapping is a run that had other ranks."""

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it (FSDP2)."""
        shard_for_strategy(self.trainer.strategy, self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the stage's groups."""
        return build_optimizer(self.model, self.stage.optimizer)

    def on_train_start(self) -> None:
        """Frozen parts into eval mode, and the labels agreed between ranks."""
        set_train_mode(self.model)
        if self.trainer.world_size > 1 and not (self.sources.fixed and self.domains.fixed):
            raise ValueError(f"training on {self.trainer.world_size} ranks needs sources= and domains= of the module")

    def on_before_batch_transfer(self, batch: list[Batch], dataloader_idx: int) -> list[Batch]:
        """Check micro-batches before they leave the host."""
        for micro in batch:
            self.check(micro)
        return batch

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, dataloader_idx: int) -> list[Batch]:
        """Move every micro-batch's tensors."""
        return [micro.to(device, non_blocking=True) for micro in batch]

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """One optimiser step; the result stands in `self.report`."""
        if not batch:
            raise ValueError(f"step {self.step}: the loader gave no micro-batch to rank {self.global_rank}")
        seed_step(self.seed, self.step, self.global_rank)
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        lr = self.learning_rate(self.step)
        set_lr(optimizer.optimizer, lr)
        counts = self._over_ranks(count_step(batch, self.sources, self.domains).to(self.device))
        losses = self._backward(batch, counts[-1])
        sums, sums_by_segment = self._sums(batch, losses)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = clip_gradients(self.trainer.strategy, parameters, self.stage.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        norm = norm_after_step(self.trainer.strategy) if norm is None else norm
        signals = torch.tensor(self.stop_signals(), dtype=torch.float64, device=self.device)
        summed = self._over_ranks(torch.cat([sums, signals]))
        norm = norm.detach().double().reshape(1)
        packed = torch.cat([counts, summed, norm, sums_by_segment]).tolist()  # the step's one transfer
        self.step += 1
        self.report = self._unpack(packed, batch, lr)
        if not (math.isfinite(self.report.loss) and math.isfinite(self.report.grad_norm)):
            raise NonFiniteLossError(self._blame(batch, losses, self.report))

    def learning_rate(self, step: int) -> float:
        """The schedule's value at a step, from 0."""
        schedule = self.stage.schedule
        return lr_at_step(
            step,
            self.stage.max_steps,
            lr=self.stage.optimizer.lr,
            warmup=schedule.warmup,
            min_lr=schedule.min_lr,
            shape=schedule.shape,
        )

    def _backward(self, batches: list[Batch], global_weight: torch.Tensor) -> list[TokenLosses]:
        """Gradients of the global mean; returns each micro-batch's token losses, detached and unweighted.

        global_weight: sum of the loss weights of all target tokens, over ranks and micro-batches.
        """
        # Strategies average gradients over ranks: the world size undoes it, the division by the global count stays.
        scale = (self.trainer.world_size / torch.where(global_weight > 0, global_weight, 1.0)).float()
        detached = []
        for number, batch in enumerate(batches, 1):
            losses: TokenLosses = call_model(self.trainer.strategy, self.model, batch)
            assert len(losses.values) == batch.num_targets, (
                f"step {self.step}: {len(losses.values)} token losses but {batch.num_targets} target positions"
            )
            weights = loss_weights(batch, losses.values.device)
            values = losses.values if weights is None else losses.values * weights.float()[losses.segment]
            with accumulating(self.trainer.strategy, self.model, last=number == len(batches)):
                self.manual_backward(values.sum() * scale)
            detached.append(replace(losses, values=losses.values.detach()))
        return detached

    def _sums(self, batches: list[Batch], losses: list[TokenLosses]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's loss sums by source, then by domain, then the weighted one; and the sum of every segment."""
        total = torch.zeros(len(self.sources) + len(self.domains), dtype=torch.float64, device=self.device)
        weighted, segments = total.new_zeros(1), []
        for batch, found in zip(batches, losses, strict=True):
            by_source = [self.sources.index(s.source) for s in batch.segments]
            by_domain = [self.domains.index(s.domain) for s in batch.segments]
            parts = [(by_source, len(self.sources)), (by_domain, len(self.domains))]
            total += torch.cat([sum_losses(found.values, found.segment, labels, n) for labels, n in parts])
            segments.append(sum_by_segment(found.values, found.segment, len(batch.segments)))
            weights = loss_weights(batch, self.device)
            weighted += (segments[-1] if weights is None else segments[-1] * weights).sum()
        return torch.cat([total, weighted]), torch.cat(segments)

    def _over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks."""
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
        return values

    def _unpack(self, packed: list[float], batches: list[Batch], lr: float) -> StepReport:
        """The step's numbers by name, in the order `count_step` and `_backward` laid them down."""
        values = iter(packed)

        def take(names: Sequence[str]) -> dict[str, float]:
            return {name: next(values) for name in names}

        def whole(numbers: dict[str, float]) -> dict[str, int]:
            return {name: int(value) for name, value in numbers.items() if value}

        counts = {name: int(value) for name, value in take(NAMED_COUNTS).items()}
        samples, tokens, targets = (whole(take(self.sources.names)) for _ in range(3))
        domain_targets, weight = whole(take(self.domains.names)), next(values)
        source_sums, domain_sums = take(self.sources.names), take(self.domains.names)
        weighted_sum, signals = next(values), (int(next(values)), int(next(values)))
        return StepReport(
            step=self.step,
            loss=sum(source_sums.values()) / max(1, counts["targets"]),
            weighted_loss=weighted_sum / (weight or 1.0) if counts["weighted"] else None,
            lr=lr,
            grad_norm=next(values),
            counts=counts,
            loss_by_source={name: source_sums[name] / count for name, count in targets.items()},
            loss_by_domain={name: domain_sums[name] / count for name, count in domain_targets.items()},
            targets_by_source=targets,
            samples_by_source=samples,
            tokens_by_source=tokens,
            stop_signals=signals,
            keys=keys_by_lane(batches),
            states=states_by_lane(batches),
            samples=tuple(seen_samples(batches, values)),
        )

    def _blame(self, batches: list[Batch], losses: list[TokenLosses], report: StepReport) -> str:
        """One line that names the step and, over all ranks, the lanes and keys of the samples at fault."""
        bad = {
            batch.segments[index].key
            for batch, found in zip(batches, losses, strict=True)
            for index in set(found.segment[~found.values.isfinite()].tolist())
        }
        gathered = gather_objects((report.keys, bad))
        everyone = {key for _, part in gathered for key in part}
        named = [
            f"lane {lane}: {', '.join(suspects[:8])}"
            for keys, _ in gathered
            for lane, held in sorted(keys.items())
            if (suspects := [key for key in held if key in everyone or not everyone])
        ]
        is_loss = not math.isfinite(report.loss)
        what = f"loss {report.loss}" if is_loss else f"gradient norm {report.grad_norm} (loss {report.loss:.4g})"
        return (
            f"step {report.step}: {what} at lr {report.lr:.3g}; {'; '.join(named[:16])}. "
            "Leave these samples out (data.skip=, a file of source<tab>key lines), or resume from the last checkpoint "
            "with a lower stage.optimizer.lr"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch, numpy and python for one step, so that a step's noise is a function of (seed, step, rank) alone."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Let the decoder recompute its blocks; a model without such a decoder says so."""
    switch: Any = getattr(getattr(model, "decoder", None), "set_activation_checkpointing", None)
    if switch is None:
        raise ValueError(f"stage.activation_checkpointing is set, but {type(model).__name__} has no decoder that can")
    switch(True)
