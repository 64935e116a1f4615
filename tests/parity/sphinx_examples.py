"""Examples and comparisons that the SPHINX and SPHINX-V parity tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bestiary.schema import IGNORE, Example, RegionRows, Slot
from bestiary.text.tokenizer import SentencePieceTokenizer, load_tokenizer


def image_example(
    ids: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    pixels: np.ndarray | None = None,
    image_rows: int = 0,
    regions: RegionRows | None = None,
    key: str = "0",
) -> Example:
    """[BOS][image rows][tags and slots][rest of the ids]; labels of 0 are IGNORE. pixels: [3, S, S] or None."""
    num_region = 0 if regions is None else len(regions.valid) + 2
    num_image = 0 if pixels is None else image_rows
    gap = num_image + num_region
    slots = np.zeros(len(ids) + gap, np.uint8)
    slots[1 : 1 + num_image], slots[1 + num_image : 1 + gap] = Slot.IMAGE, Slot.REGION
    all_ids = np.concatenate([ids[:1], np.zeros(gap), ids[1:]]).astype(np.int64)
    own = np.asarray(labels if labels is not None else np.zeros(len(ids)))
    all_labels = np.concatenate([own[:1], np.zeros(gap), own[1:]]).astype(np.int64)
    all_labels[all_labels == 0] = IGNORE
    none = np.zeros((0, 3, 1, 1), np.uint8)
    return Example(
        ids=all_ids,
        labels=all_labels,
        slots=slots,
        pixels=none if pixels is None else pixels[None],
        regions=regions,
        num_views=0,
        key=key,
        source="golden",
        domain="golden",
    )


def rows_of(regions: RegionRows, sample: int) -> RegionRows:
    """One sample's slots out of a batch's, as numpy."""
    counts = np.asarray(regions.counts)
    start = int(counts[:sample].sum())
    span = slice(start, start + int(counts[sample]))
    coords, kinds, valid = (np.asarray(x)[span] for x in (regions.coords, regions.kinds, regions.valid))
    return RegionRows(coords, kinds, valid, counts[sample : sample + 1])


def tokenizer_of(folder: Path) -> SentencePieceTokenizer:
    """The tokenizer nearest to a case: in its folder, or in one above it."""
    return load_tokenizer(next(path for above in (folder, *folder.parents) for path in sorted(above.glob("*.model"))))


def data_folder(folder: Path, image: str) -> Path:
    """Where a model case's pictures are: the folder named like the model's, otherwise a sibling that has them."""
    named = folder.with_name(folder.name.replace("model", "data"))
    return next(p for p in (named, *sorted(folder.parent.iterdir())) if (p / image).is_file())


def stop_ids(tokenizer: SentencePieceTokenizer, *symbols: str) -> list[list[int]]:
    """EOS and the token sequences a stop symbol may take."""
    stops = [[tokenizer.eos_id]]
    for symbol in symbols:
        stops += [tokenizer.encode_segment(symbol), tokenizer.encode_wo_prefix_space(symbol)]
    return stops


def reference_grads(
    model: nn.Module, to_reference: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Gradients by published name."""
    return to_reference({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Shapes equal, largest absolute difference within the README's tolerance."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    worst = (actual.detach().double() - expected.double()).abs().max().item()
    assert worst <= tolerance, f"{what}: largest difference {worst:.3g}, tolerance {tolerance:.3g}"
