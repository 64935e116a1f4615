"""Analytic FLOPs of a step, and what the device could do: the two sides of MFU.

Decoder: 2 FLOPs a parameter and token forward, 2 for the gradient of activations where anything upstream trains, 2 for
the gradient of weights that train; the head only at target positions; causal attention by segment lengths. Pictures:
the vision part's forward is counted once by running it, so its cost follows its patches and not the text. Recomputation
is not counted (model FLOPs, not hardware FLOPs).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bestiary.language.tuning import num_elements
from bestiary.training.report import StepReport

log = logging.getLogger(__name__)

PEAK_BF16 = {  # dense bf16 tensor-core FLOP/s, vendors' data sheets; first match in the device's name counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Coefficients of a step's FLOPs: per decoder position, target position, picture, and squared segment length."""

    per_token: float
    per_target: float
    per_image: float
    per_square: float

    def of(self, report: StepReport) -> float:
        """FLOPs of one step over all ranks."""
        c = report.counts
        return (
            self.per_token * c["tokens"]
            + self.per_target * c["targets"]
            + self.per_image * c["images"]
            + self.per_square * c["squares"]
        )


def estimate(model: nn.Module) -> StepFlops:
    """Coefficients of a model with `decoder` and `vision` parts; others count 2 to 6 FLOPs a parameter and token."""
    decoder: Any = getattr(model, "decoder", None)
    body = decoder if isinstance(decoder, nn.Module) else model
    upstream = any(p.requires_grad for p in model.parameters())
    head = getattr(body, "lm_head", None)
    head_parameters = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    embeddings = {id(m.weight) for m in body.modules() if isinstance(m, nn.Embedding)}
    per_token = per_target = 0.0
    for parameter in body.parameters():
        cost = _cost(parameter, upstream)
        if id(parameter) in head_parameters:
            per_target += cost
        elif id(parameter) not in embeddings:
            per_token += cost
    config = getattr(body, "config", None)
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    # Scores and their product with the values: 2 x 2 x n^2 x width, half of it causal; the backward pass twice that.
    per_square = 2.0 * width * layers * (3 if upstream else 1)
    return StepFlops(per_token, per_target, 0.0, per_square)


def with_images(flops: StepFlops, model: nn.Module, pixels: torch.Tensor) -> StepFlops:
    """Adds the cost of one picture, measured on `pixels` uint8[1, 3, S, S]; what trains there counts three times."""
    vision = getattr(model, "vision", None)
    if not isinstance(vision, nn.Module) or not len(pixels):
        return flops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rows = vision(pixels)
    trainable = sum(p.numel() for p in vision.parameters() if p.requires_grad and p.ndim > 1)
    per_image = float(counter.get_total_flops()) + 4.0 * trainable * rows.shape[1]
    return StepFlops(flops.per_token, flops.per_target, per_image, flops.per_square)


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one device: the data sheet's for known GPUs in half precision, else measured with a matrix product."""
    if device.type == "cuda" and not precision.startswith("32"):
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_BF16.items():
            if known in name:
                return peak
        log.warning("no data-sheet peak for %s: MFU is against a measured one", name)
    dtype = torch.float32 if precision.startswith("32") else torch.bfloat16
    return measured_flops(device, dtype, size=8192 if device.type == "cuda" else 768)


def measured_flops(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int = 5) -> float:
    """The best of several square matrix products, FLOP/s."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _cost(parameter: nn.Parameter, upstream: bool) -> float:
    """FLOPs a token of one parameter tensor: forward, activation gradient, weight gradient."""
    if parameter.ndim < 2:
        return 0.0
    return (2.0 + 2.0 * upstream + 2.0 * parameter.requires_grad) * num_elements(parameter)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
