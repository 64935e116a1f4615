"""The estimate of a device's memory: sums that are known, and a bound that a real step keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bestiary.config import Cluster, Data, Model, Run, Source, Stage
from bestiary.mllm import MultimodalLM
from bestiary.training.memory import GIB, RESERVE, estimate_memory, memory_lines
from bestiary.training.stages import apply_stage
from bestiary.training.strategies import ZERO_BUCKET
from bestiary.variants.monkey.model import build_monkey
from tests.variants.test_packed_equals_alone import MONKEY_DECODER, MONKEY_VISION, contents_of, example, monkey, packed

STAGE: dict[str, Any] = {"name": "s", "max_steps": 1, "batch_size": 2}


def run_of(*, stage: dict[str, Any] | None = None, **cluster: Any) -> Run:
    data = Data(sources={"a": Source(path="a")}, max_tokens=64)
    return Run(model=Model(), data=data, stage=Stage(**STAGE | (stage or {})), cluster=Cluster(**cluster))


def on_meta(run: Run) -> MultimodalLM:
    with torch.device("meta"):
        model = build_monkey(vision=MONKEY_VISION, decoder=MONKEY_DECODER, attention="sdpa")
    apply_stage(model, run.stage)
    return model


@pytest.mark.parametrize(
    ("strategy", "precision", "weights", "gradients", "optimizer"),
    [  # bytes of a parameter: weights, gradients and optimiser of one that trains; of two devices
        ("zero2", "bf16-true", 2, 2 / 2, 16 / 2),
        ("ddp", "32-true", 4, 4, 8),
        ("ddp", "bf16-true", 2, 2, 4),
    ],
)
def test_weights_gradients_and_moments_are_those_of_the_strategy(
    strategy: str, precision: str, weights: float, gradients: float, optimizer: float
) -> None:
    run = run_of(
        stage={"train": ["vision.resampler.*"]}, strategy=strategy, precision=precision, accelerator="gpu", devices=2
    )
    model = on_meta(run)
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.vision.resampler.parameters())  # type: ignore[union-attr]
    parts = estimate_memory(model, run).parts
    assert parts["weights"] == weights * every
    assert parts["gradients"] == gradients * trained and parts["optimizer"] == optimizer * trained
    assert parts["reserve"] == RESERVE
    assert parts.get("buckets of gradients") == (2 * 2 * ZERO_BUCKET if strategy == "zero2" else None)


def test_blocks_that_are_computed_again_keep_their_inputs_alone() -> None:
    sizes = {"accelerator": "gpu", "precision": "bf16-true", "devices": 2}
    plain, again = (run_of(stage={"activation_checkpointing": on}, **sizes) for on in (False, True))
    layers, dim, mlp = (MONKEY_DECODER[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    block = 64 * (2 * (6 * dim + 3 * dim + 4 * mlp) + 4 * 2 * dim)
    told = [estimate_memory(on_meta(run), run).parts for run in (plain, again)]
    assert [parts["decoder: kept"] for parts in told] == [layers * (2 * 64 * dim + block), layers * 2 * 64 * dim]
    assert told[0]["decoder: at work"] == told[1]["decoder: at work"] == 2 * block


def test_longer_rows_keep_more_in_proportion() -> None:
    short, long = run_of(), run_of()
    long.data.row_tokens = 4 * long.data.max_tokens
    kept = [estimate_memory(on_meta(run), run).parts["decoder: kept"] for run in (short, long)]
    assert kept[1] == 4 * kept[0] > 0


def test_the_table_says_whether_a_device_has_room_and_nothing_of_a_laptop() -> None:
    small, large = (run_of(accelerator="gpu", memory_gb=gb) for gb in (0.5, 24))
    model = on_meta(small)
    assert any("too much" in line for line in memory_lines(model, small))
    assert any("of 24: fits" in line for line in memory_lines(model, large))
    assert memory_lines(model, run_of()) == []
    estimate = estimate_memory(model, large)
    assert f"{estimate.total / GIB:.2f} of 24" in "\n".join(memory_lines(model, large))


def test_what_a_real_step_keeps_is_below_the_bound_and_not_far() -> None:
    model = monkey().train()
    rows = [[example("monkey", number, *content)] for number, content in enumerate(contents_of("monkey")) if content[0]]
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        loss = model(packed(rows)).values.sum()
    longest = max(len(row[0]) for row in rows)
    run = run_of(stage={"batch_size": len(rows)})
    run.data.max_tokens = longest
    parts = estimate_memory(model, run).parts
    bound = parts["decoder: kept"] + parts["vision: kept"] + parts["output head: at work"]
    assert 0.4 * bound < sum(seen.values()) < bound and loss.isfinite()
