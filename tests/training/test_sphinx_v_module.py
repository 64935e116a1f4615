"""SPHINX-V's module lets no visual prompt get lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bestiary.schema import Batch, RegionRows, Slot
from bestiary.variants.sphinx_v.module import SphinxVModule
from tests.training.tiny import TinyData, tiny_model, tiny_stage


def with_prompts(waiting: int, counts: list[int]) -> Batch:
    """A batch whose first row holds `waiting` REGION positions and prompts of these counts."""
    batch = TinyData().step_of(0)[0]
    slots = batch.slots.clone()
    slots[0, :waiting] = Slot.REGION
    rows = sum(counts)
    regions = RegionRows(
        torch.zeros(rows, 4), torch.zeros(rows), torch.ones(rows, dtype=torch.bool), torch.tensor(counts)
    )
    return replace(batch, slots=slots, regions=regions if counts else None)


@pytest.mark.parametrize(("waiting", "counts"), [(0, []), (3, [1]), (5, [3]), (6, [1, 1])])
def test_prompts_that_fit_their_positions_pass(waiting: int, counts: list[int]) -> None:
    SphinxVModule(tiny_model(), tiny_stage()).check(with_prompts(waiting, counts))


@pytest.mark.parametrize(("waiting", "counts"), [(3, []), (0, [1]), (4, [1])])
def test_a_lost_prompt_is_named(waiting: int, counts: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{waiting} REGION positions but .*samples .*/0-0-0"):
        SphinxVModule(tiny_model(), tiny_stage()).check(with_prompts(waiting, counts))
