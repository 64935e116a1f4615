"""SPHINX-V's prompt rows at tiny sizes: order, kinds, empty slots, gradients, SAM."""

from __future__ import annotations

import fnmatch
import math

import numpy as np
import pytest
import torch

from bestiary.schema import IGNORE, Example, RegionKind, RegionRows, Slot
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.prompt_encoder import PromptEncoder, PromptRows, reference_rows
from bestiary.variants.sphinx_v.weights import load_reference, to_reference
from data_modules.collate import collate_rows
from tests.variants.sphinx_tiny import DECODER, VISION

POINT, BOX = RegionKind.POINT, RegionKind.BOX


def rows(counts: list[int], kind: int = POINT, seed: int = 0) -> RegionRows:
    total = sum(counts)
    coords = np.random.default_rng(seed).random((total, 4), np.float32)
    return RegionRows(coords, np.full(total, kind), np.ones(total, bool), np.array(counts, np.int64))


def prompt_rows() -> PromptRows:
    torch.manual_seed(0)
    return PromptRows(out_dim=16, dim=8, num_slots=3)


def test_rows_come_as_start_slots_end_of_every_example() -> None:
    prompts, regions = prompt_rows(), rows([2, 1, 3])
    out, slots = prompts(regions), prompts.slots(regions)
    assert out.shape == (6 + 2 * 3, 16)
    start, end = prompts.start[0, 0], prompts.end[0, 0]
    expected = [start, *slots[:2], end, start, *slots[2:3], end, start, *slots[3:], end]
    assert torch.equal(out, torch.stack(expected))


def test_no_prompts_give_no_rows_and_zero_gradients() -> None:
    prompts = prompt_rows()
    prompts(rows([])).sum().backward()
    for name, parameter in prompts.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_point_ignores_the_second_corner_and_a_box_does_not() -> None:
    prompts = prompt_rows()
    for kind, is_same in ((POINT, True), (BOX, False)):
        one = rows([1], kind)
        other = RegionRows(
            np.concatenate([one.coords[:, :2], one.coords[:, 2:] / 2], 1), one.kinds, one.valid, one.counts
        )
        assert torch.equal(prompts.slots(one), prompts.slots(other)) is is_same


def test_kinds_may_be_mixed_in_one_sample() -> None:
    prompts = prompt_rows()
    points, boxes = rows([4], POINT), rows([4], BOX)
    mixed = RegionRows(points.coords, np.array([POINT, BOX, POINT, BOX]), points.valid, points.counts)
    out = prompts.slots(mixed)
    assert torch.equal(out[::2], prompts.slots(points)[::2])
    assert torch.equal(out[1::2], prompts.slots(boxes)[1::2])


def test_empty_slots_differ_from_used_ones_at_the_same_place() -> None:
    prompts = prompt_rows()
    for kind in (POINT, BOX):
        used = RegionRows(np.zeros((1, 4), np.float32), np.array([kind]), np.array([True]), np.array([1]))
        empty = RegionRows(used.coords, used.kinds, np.array([False]), used.counts)
        assert (prompts.slots(used) - prompts.slots(empty)).abs().max() > 1e-3


def test_the_position_code_is_sines_then_cosines_of_twice_the_coordinate() -> None:
    encoder = PromptEncoder(8)
    code = encoder.fourier(torch.tensor([[0.25, 0.5]]))[0]
    phase = 2 * math.pi * (torch.tensor([0.5, 1.0]) @ encoder.gaussian)
    assert torch.allclose(code, torch.cat([phase.sin(), phase.cos()]), atol=1e-6)


def test_autocast_does_not_round_the_phases() -> None:
    encoder, xy = PromptEncoder(8), torch.rand(5, 2)
    exact = encoder.fourier(xy)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.fourier(xy), exact)


def test_the_fourier_matrix_never_trains() -> None:
    frozen = [name for name, p in prompt_rows().named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.gaussian"]


def test_an_odd_prompt_width_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=7 must be even"):
        PromptEncoder(7)


POINT_SAMPLE = [[0.1, 0.2, -1, -1], [0, 0, -1, -1], [0.3, 0, -1, -1], [0, 0, -1, -1]]
MIXED_SAMPLE = [[0, 0, -1, -1], [0.1, 0.2, 0.3, 0.4], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_published_reading_decides_the_kind_per_sample() -> None:
    regions = reference_rows(torch.tensor([POINT_SAMPLE, MIXED_SAMPLE]), quirks=True)
    assert regions.kinds.tolist() == [POINT] * 4 + [BOX] * 4
    assert regions.valid.tolist() == [True, False, True, False, True, True, False, False]
    assert regions.coords[4].tolist() == [0, 0, -1, -1], "the missing corner is taken for a place"
    assert regions.coords[0].tolist() == pytest.approx([0.1, 0.2, 0, 0])


def test_the_sane_reading_decides_per_row_and_keeps_points_at_the_corner() -> None:
    regions = reference_rows(torch.tensor([POINT_SAMPLE, MIXED_SAMPLE]), quirks=False)
    assert regions.kinds.tolist() == [POINT] * 5 + [BOX] * 3
    assert regions.valid.tolist() == [True, True, True, False, True, True, False, False]
    assert regions.coords[4].tolist() == [0, 0, 0, 0]
    only_corner = reference_rows(torch.tensor([[[0.0, 0, -1, -1], [0, 0, -1, -1]]]), quirks=False)
    assert only_corner.valid.tolist() == [True, False]


def example(num_images: int, regions: RegionRows | None) -> Example:
    """BOS, the visual rows, four tokens of text of which two are learned."""
    num_region = 0 if regions is None else len(regions.valid) + 2
    gap = 126 * num_images + num_region
    slots = np.zeros(5 + gap, np.uint8)
    slots[1 : 1 + 126 * num_images], slots[1 + 126 * num_images : 1 + gap] = Slot.IMAGE, Slot.REGION
    labels = np.full(5 + gap, IGNORE, np.int64)
    labels[-2:] = 7
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 3, 48, 48)).astype(np.uint8)
    return Example(np.ones(5 + gap, np.int64), labels, slots, pixels, regions, 3, "k", "s", "d")


@pytest.mark.parametrize(
    ("num_images", "regions"),
    [(1, rows([3])), (1, rows([5], BOX)), (1, None), (0, None)],
    ids=["points", "more boxes than slots", "image alone", "text alone"],
)
def test_every_batch_gives_every_trainable_parameter_a_gradient(num_images: int, regions: RegionRows | None) -> None:
    torch.manual_seed(0)
    model = build_sphinx_v(vision=VISION, decoder=DECODER, prompt_dim=8, num_slots=3).train()
    model(collate_rows([[example(num_images, regions)]])).values.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


def test_published_names_cover_the_prompt_parts() -> None:
    model = build_sphinx_v(vision=VISION, decoder=DECODER, prompt_dim=8)
    published = to_reference(model.state_dict(), model)
    prompt_names = [name for name in published if fnmatch.fnmatchcase(name, "llma.*vp*")]
    assert len(prompt_names) == 2 + 9 + 4
    other = build_sphinx_v(vision=VISION, decoder=DECODER, prompt_dim=8)
    load_reference(other, published)
    assert other.regions is not None
    assert torch.equal(other.regions(rows([2])), model.regions(rows([2])))  # type: ignore[misc]
