"""Learning rates as pure functions of progress: no state to save, nothing to restore.

One curve serves every unit. Ours runs in steps of a stage; the references' run in fractional epochs (fine-tuning of
SPHINX and SPHINX-V, `accessory/util/lr_sched.py: adjust_learning_rate_epoch`) and in iterations (pre-training).
"""

from __future__ import annotations

import math


def warmup_cosine(position: float, *, lr: float, warmup: float, end: float, min_lr: float = 0.0) -> float:
    """Linear from 0 to `lr` over `warmup`, half a cosine to `min_lr` at `end`, `min_lr` after that.

    position, warmup, end: progress in one common unit (share of the stage, epochs, iterations).
    """
    if position < warmup:
        return lr * position / warmup
    if position >= end:
        return min_lr
    share = (position - warmup) / (end - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def log_then_constant(step: int, *, lr: float, warmup_steps: int) -> float:
    """`lr` times log(step + 1) / log(warmup_steps) before step `warmup_steps`, and `lr` for good from there on.

    Monkey's published launch asks for a cosine, but its DeepSpeed json holds a WarmupLR, which counts instead
    (reference/monkey.md, section 3.1, "Scheduler trap").
    """
    return lr if step >= warmup_steps else lr * math.log(step + 1) / math.log(max(2, warmup_steps))


def lr_at_step(
    step: int, max_steps: int, *, lr: float, warmup: float = 0.0, min_lr: float = 0.0, shape: str = "cosine"
) -> float:
    """The learning rate of optimiser step `step` (from 0): with a warm-up, the first step has learning rate 0.

    warmup: share of the stage, [0, 1). shape: see `config.Schedule`. The cosine equals the reference's epoch
    form for one epoch of `max_steps` steps.
    """
    if shape == "log_then_constant":
        return log_then_constant(step, lr=lr, warmup_steps=math.ceil(max_steps * warmup))
    return warmup_cosine(step / max_steps, lr=lr, warmup=warmup, end=1.0, min_lr=min_lr)


def lr_at_micro_step(
    micro_step: int,
    *,
    iters_per_epoch: int,
    accum_iter: int,
    lr: float,
    warmup_epochs: float,
    epochs: float,
    min_lr: float = 0.0,
) -> float:
    """The reference's epoch form: progress is read only when a new accumulation begins and kept until the next.

    micro_step: counts from 0 over all epochs; an accumulation never spans two epochs.
    """
    epoch, iteration = divmod(micro_step, iters_per_epoch)
    boundary = iteration - iteration % accum_iter
    position = boundary / iters_per_epoch + epoch
    return warmup_cosine(position, lr=lr, warmup=warmup_epochs, end=epochs, min_lr=min_lr)
