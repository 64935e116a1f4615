"""The step: the same global batch gives the same gradient for every split, and its numbers are the losses' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bestiary.mllm import TokenLosses
from bestiary.schema import Batch
from bestiary.training import report as reporting
from bestiary.training.module import MLLMModule, NonFiniteLossError, seed_step
from bestiary.training.report import NAMED_COUNTS, Names, count_step, sum_by_segment, sum_losses
from bestiary.training.run_dir import RunDir
from tests.training.tiny import DOMAINS, SOURCES, TinyData, tiny_model, tiny_stage, train


def weights_after(path: Path, micro: int) -> dict[str, torch.Tensor]:
    stage = tiny_stage(max_steps=3)
    _, module = train(path, stage=stage, data=TinyData(micro=micro), model=tiny_model(dropout=0.0))
    return module.model.state_dict()


def test_the_split_into_micro_batches_does_not_change_what_is_learned(tmp_path: Path) -> None:
    whole = weights_after(tmp_path / "4", 4)
    for micro in (1, 2):
        split = weights_after(tmp_path / str(micro), micro)
        for name, value in whole.items():
            assert torch.allclose(value, split[name], atol=1e-6), name


def test_the_loss_is_the_mean_over_all_target_tokens(tmp_path: Path) -> None:
    model = tiny_model(dropout=0.0).eval()
    values = torch.cat([model(batch).values for batch in TinyData().step_of(0)])
    train(tmp_path, stage=tiny_stage(max_steps=1), model=tiny_model(dropout=0.0))
    (line,) = RunDir(tmp_path).metrics.read()
    assert line["loss"] == pytest.approx(values.mean().item(), rel=1e-6)
    assert line["targets"] == len(values)


def test_losses_by_source_and_domain_come_from_the_same_tokens(tmp_path: Path) -> None:
    summary, module = train(tmp_path)
    report = module.report
    assert report is not None and summary.step == report.step == 6
    parts = [report.loss_by_source[name] * count for name, count in report.targets_by_source.items()]
    assert sum(parts) / report.counts["targets"] == pytest.approx(report.loss, rel=1e-12)
    assert set(report.loss_by_domain) <= set(DOMAINS)


def test_the_learning_rate_follows_the_schedule_and_the_encoder_stays(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, module = train(tmp_path, model=model)
    rates = [line["lr"] for line in RunDir(tmp_path).metrics.read()]
    assert rates == [module.learning_rate(step) for step in range(6)] and rates[0] == 0.0
    after = model.state_dict()
    assert torch.equal(before["encoder.0.weight"], after["encoder.0.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_training_learns(tmp_path: Path) -> None:
    stage = tiny_stage(max_steps=120, checkpoint_every=0)
    train(tmp_path, stage=stage, model=tiny_model(width=24, dropout=0.0))
    losses = [line["loss"] for line in RunDir(tmp_path).metrics.read()]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


class Poisoned(nn.Module):
    """A model whose loss is not a number for samples of one lane."""

    def __init__(self, lane: int, step: int) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.bad = f"/{lane}-{step}-"

    def forward(self, batch: Batch) -> TokenLosses:
        losses = self.inner(batch)
        is_bad = torch.tensor([self.bad in s.key for s in batch.segments])[losses.segment]
        return TokenLosses(torch.where(is_bad, torch.nan, losses.values), losses.segment)


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_samples(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 4: loss nan .*lane 2: (alpha|beta)/2-3-0\. ") as error:
        train(tmp_path, stage=tiny_stage(freeze=["*.encoder.*"]), model=Poisoned(lane=2, step=3))
    assert "lane 1" not in str(error.value)
    status = RunDir(tmp_path).status
    assert status.state == "failed" and "loss nan" in str(status.error)
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-000002"
    assert len(RunDir(tmp_path).metrics.read()) == 3


def test_an_unknown_source_raises_when_the_names_are_declared() -> None:
    with pytest.raises(ValueError, match="source 'alpha' is not among those declared for training: gamma"):
        count_step(TinyData().step_of(0), Names(["gamma"], what="source"), Names(what="domain"))


def test_names_grow_when_none_are_declared() -> None:
    sources, domains = Names(what="source"), Names(what="domain")
    counts = count_step(TinyData().step_of(0), sources, domains)
    assert set(sources.names) == set(SOURCES) and len(counts) == len(NAMED_COUNTS) + 3 * 2 + 2 + 1


def test_sums_by_label_hold_every_token_once() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    sums = sum_losses(values, torch.tensor([0, 1, 2, 2]), [1, 0, 1], 3)
    assert sums.tolist() == [2.0, 13.0, 0.0]
    assert sum_losses(values[:0], torch.zeros(0, dtype=torch.int64), [], 2).tolist() == [0.0, 0.0]


def test_sums_by_segment_are_those_of_a_plain_loop_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = torch.tensor([0, 0, 2, 3, 3, 3])
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0, 8.0, 16.0])
    for elements in (1, 12, 1000):
        monkeypatch.setattr(reporting, "MASK_ELEMENTS", elements)
        sums = sum_by_segment(values, segment, 5)
        assert sums[[0, 1, 3, 4]].tolist() == [3.0, 0.0, 28.0, 0.0] and sums[2].isnan()


def test_a_step_without_any_target_changes_nothing_but_the_count(tmp_path: Path) -> None:
    data = TinyData()
    plain = data.step_of

    def muted(step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        return [
            replace(
                batch,
                labels=torch.full_like(batch.labels, -100),
                segments=tuple(replace(s, num_targets=0) for s in batch.segments),
            )
            for batch in plain(step, rank, world)
        ]

    data.step_of = muted  # type: ignore[method-assign]
    train(tmp_path, stage=tiny_stage(max_steps=2), data=data)
    assert [line["loss"] for line in RunDir(tmp_path).metrics.read()] == [0.0, 0.0]


def test_the_noise_of_a_step_depends_on_seed_step_and_rank_only() -> None:
    def draw(*of: int) -> float:
        seed_step(*of)
        return torch.rand(1).item()

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({draw(1, 2, 0), draw(1, 3, 0), draw(2, 2, 0), draw(1, 2, 1)}) == 4


def test_activation_checkpointing_without_effect_raises() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing is set, but TinyLM"):
        MLLMModule(tiny_model(), tiny_stage(activation_checkpointing=True))
