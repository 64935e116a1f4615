"""The schedule is a pure function of progress."""

from __future__ import annotations

import math

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


def test_the_other_shape_warms_up_by_the_logarithm_of_the_step_and_never_falls() -> None:
    rates = [lr_at_step(step, 11250, lr=1e-5, warmup=0.02, shape="log_then_constant") for step in range(11250)]
    assert rates[0] == 0.0 and rates[14] == pytest.approx(0.5e-5)  # log 15 / log 225 (reference/monkey.md 3.1)
    assert rates[:225] == sorted(rates[:225]) and rates[223] < 1e-5
    assert set(rates[225:]) == {1e-5} and math.isclose(rates[224], 1e-5)
    assert lr_at_step(0, 10, lr=0.5, shape="log_then_constant") == 0.5
