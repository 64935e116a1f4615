"""How much memory a training step takes on one device, from shapes alone: told before a machine is asked for.

Counted are weights, gradients and the optimiser's state as the strategy holds and divides them, what the backward pass
needs of a micro-batch of full rows, and a flat reserve. What the backward pass needs is an upper bound: the inputs of
all blocks that are computed again, or all that every block keeps, and twice the largest piece at work (its values and
their gradients). Of a decoder's block every position keeps, beside its input of D numbers,

    6 D + 3 K + 4 F numbers, and 2 D in float32

(norms' outputs, query, key and value before and after rotation, context, residual; gate, up, their product and the
activation; the norms' float32), D, K and F being the widths of the model, of keys and of the MLP. A vision part counts
for itself (`step_values`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from bestiary.config import Run
from bestiary.mllm import HEAD_ELEMENTS, MultimodalLM
from bestiary.saved_tuning import frozen_dtype
from bestiary.training.strategies import ZERO_BUCKET

GIB = 1 << 30
RESERVE = GIB
"""The device's own context, kernels' workspaces and what is lost between blocks: unpublished, our choice."""
_FLOAT = 4


@runtime_checkable
class CountsItself(Protocol):
    """A vision part that knows what its backward pass needs."""

    def step_values(self) -> tuple[int, int]:
        """Numbers for one picture: (kept until the backward pass, the most that one piece has at work)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device by what they are for, and what is not among them."""

    parts: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def lines(self, *, head: str, limit_gb: float) -> list[str]:
        """As a table in GiB; limit_gb: what a device has, 0 where nobody said."""
        rows = [f"  {name:<28} {size / GIB:>8.2f}" for name, size in self.parts.items()]
        told = f"  {'total':<28} {self.total / GIB:>8.2f}"
        if limit_gb:
            spare = limit_gb - self.total / GIB
            told += f" of {limit_gb:g}: " + (f"fits, {spare:.2f} to spare" if spare >= 0 else f"{-spare:.2f} too much")
        return [head, *rows, told, *(f"  {note}" for note in self.notes)]


def estimate_memory(model: MultimodalLM, run: Run) -> MemoryEstimate:
    """Of a model (also on the meta device) to which stage and tuning were applied."""
    cluster = run.cluster
    world = cluster.devices * cluster.nodes
    is_zero = cluster.strategy.startswith("zero")
    is_sharded = cluster.strategy in ("zero3", "fsdp2")
    shares = world if is_zero or is_sharded else 1
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = sum(_held(p, run) for p in parameters)
    weights = held // world + 2 * _largest_block(model, run) if is_sharded else held
    num_trained = sum(p.numel() for p in trained)
    parts = {
        "weights": weights,
        "gradients": sum(_held(p, run) for p in trained) // shares,
        # DeepSpeed keeps a float32 master, two moments and the step's gradients in float32; AdamW the moments alone.
        "optimizer": (4 * _FLOAT * num_trained if is_zero else 2 * sum(_held(p, run) for p in trained)) // shares,
    }
    if is_zero:
        parts["buckets of gradients"] = 2 * ZERO_BUCKET * _compute_bytes(run)
    notes: list[str] = []
    parts |= _activations(model, run, notes)
    return MemoryEstimate(parts | {"reserve": RESERVE}, notes)


def memory_lines(model: MultimodalLM, run: Run) -> list[str]:
    """The estimate as a dry run tells it; nothing for a CPU whose memory nobody named."""
    cluster = run.cluster
    if cluster.accelerator == "cpu" and not cluster.memory_gb:
        return []
    world = cluster.devices * cluster.nodes
    head = f"memory of each of {world} devices ({cluster.strategy}, {cluster.precision}), estimated, GiB:"
    estimate = estimate_memory(model, run)
    lines = estimate.lines(head=head, limit_gb=cluster.memory_gb)
    if cluster.memory_gb and estimate.total > cluster.memory_gb * GIB:
        lines.append("  take more devices, cluster=zero3, shorter rows, a smaller micro_batch or checkpointing")
    return ["", *lines]


def _activations(model: MultimodalLM, run: Run, notes: list[str]) -> dict[str, int]:
    size = _compute_bytes(run)
    rows = run.stage.micro_batch or run.stage.batch_size // (run.cluster.devices * run.cluster.nodes)
    row_tokens = run.data.row_tokens or run.data.max_tokens
    positions = rows * row_tokens
    config: Any = model.decoder.config
    dim, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = dim // config.num_attention_heads * config.num_key_value_heads
    block = positions * ((6 * dim + 3 * keys + 4 * mlp) * size + 2 * dim * _FLOAT)
    inputs = layers * positions * dim * size
    kept = inputs if run.stage.activation_checkpointing else inputs + layers * block
    parts = {"decoder: kept": kept, "decoder: at work": 2 * block}
    vision = model.vision
    if vision is not None and isinstance(vision, CountsItself):
        pictures = rows * (row_tokens // model.layout["image_rows"])
        kept_values, at_work = vision.step_values()
        trains = any(p.requires_grad for p in vision.parameters())
        parts["vision: kept"] = pictures * kept_values * size if trains else 0
        parts["vision: at work"] = 2 * pictures * at_work * size
    elif vision is not None:
        notes.append(f"without what {type(vision).__name__} keeps for the backward pass, which it does not say")
    chunk = min(HEAD_ELEMENTS, positions * config.vocab_size)
    return parts | {"output head: at work": chunk * (size + 2 * _FLOAT)}


def _compute_bytes(run: Run) -> int:
    return _FLOAT if run.cluster.precision.startswith("32") else 2


def _held(parameter: nn.Parameter, run: Run) -> int:
    """Bytes of one whole parameter as the strategy holds it."""
    if not parameter.is_floating_point():  # quantised
        return parameter.numel() * parameter.element_size()
    precision = run.cluster.precision
    if precision.endswith("-true") or run.cluster.strategy.startswith("zero"):
        return parameter.numel() * _compute_bytes(run)
    frozen = frozen_dtype(run.tuning, run.cluster)
    is_cast = frozen is not None and not parameter.requires_grad
    return parameter.numel() * torch.empty(0, dtype=frozen if is_cast else torch.float32).element_size()


def _largest_block(model: nn.Module, run: Run) -> int:
    """Bytes of what a sharding strategy gathers at a time: the largest block, or what stands outside of blocks."""
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = _bytes((p for p in model.parameters() if id(p) not in inside), run)
    return max([rest, *(_bytes(block.parameters(), run) for block in blocks)])


def _bytes(parameters: Iterable[nn.Parameter], run: Run) -> int:
    return sum(_held(p, run) for p in parameters)
