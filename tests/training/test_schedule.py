"""The schedule is a pure function of progress."""

from __future__ import annotations

import pytest

from bestiary.training.schedule import lr_at_micro_step, lr_at_step, warmup_cosine


def test_warm_up_starts_at_zero_and_reaches_the_peak() -> None:
    rates = [lr_at_step(step, 100, lr=1.0, warmup=0.1) for step in range(11)]
    assert rates[0] == 0.0
    assert rates == pytest.approx([step / 10 for step in range(11)])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_at_step(0, 10, lr=0.5) == 0.5


def test_the_rate_falls_to_its_minimum_and_stays() -> None:
    rates = [warmup_cosine(p / 20, lr=1.0, warmup=0.0, end=1.0, min_lr=0.1) for p in range(30)]
    assert rates == sorted(rates, reverse=True)
    assert rates[20:] == [0.1] * 10


def test_steps_equal_the_epoch_form_of_one_epoch() -> None:
    for step in range(50):
        epochs = lr_at_micro_step(step * 4, iters_per_epoch=200, accum_iter=4, lr=2e-5, warmup_epochs=0.03, epochs=1.0)
        assert lr_at_step(step, 50, lr=2e-5, warmup=0.03) == pytest.approx(epochs, rel=1e-12)
