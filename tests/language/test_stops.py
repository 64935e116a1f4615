"""Where an answer ends, and which tokens top_p keeps, at the edges of the rules."""

from __future__ import annotations

import torch

from bestiary.language.generation import Sampling, check_stops, cut_stop, draw


def test_of_two_stops_that_fit_the_longer_is_cut_off() -> None:
    output = [5, 1, 2]
    assert cut_stop(output, check_stops([[2], [1, 2]])) and output == [5]


def test_a_token_stays_when_the_mass_before_it_is_just_top_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    sampling = Sampling(temperature=1.0, top_p=0.5)
    drawn = {int(draw(logits, sampling, [torch.Generator().manual_seed(seed)])) for seed in range(40)}
    assert drawn == {0, 1}
