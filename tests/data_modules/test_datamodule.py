"""The data module under a real Lightning trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from bestiary.schema import Batch
from data_modules.datamodule import StreamDataModule
from data_modules.shards import write_samples
from data_modules.sources import StreamError
from tests.data_modules.making import CharProcessor, sample, source


class Recorder(lightning.LightningModule):
    """Trains one number and remembers what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...], tuple[str, ...]]] = []
        self.states: dict[int, bytes] = {}

    def training_step(self, batches: Sequence[Batch], step: int) -> torch.Tensor:
        for batch in batches:
            self.seen.append((batch.step, batch.lanes, tuple(segment.key for segment in batch.segments)))
            self.states.update(zip(batch.lanes, batch.states, strict=True))
        return self.weight * batches[0].num_targets

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: StreamDataModule, max_steps: int) -> Recorder:
    module = Recorder()
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def make(folder: Path, **changes: Any) -> StreamDataModule:
    if not (folder / "source.json").exists():
        source(folder, "toys", 23)
    given: dict[str, Any] = {"seed": 1, "num_lanes": 5, "max_tokens": 64, "micro_batch": 2, **changes}
    return StreamDataModule(sources={"toys": {"path": folder}}, processor=CharProcessor(), **given)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_is_fed_whole_steps_and_goes_on_from_states(tmp_path: Path) -> None:
    whole = fit(make(tmp_path), 6).seen
    assert [(step, lanes) for step, lanes, _ in whole[:4]] == [(0, (0, 1)), (0, (2, 3)), (0, (4,)), (1, (0, 1))]
    first = make(tmp_path)
    half = fit(first, 2)
    second = make(tmp_path, num_workers=1)
    assert second.load_states(half.states, first.fingerprint()) == 2
    assert half.seen + fit(second, 4).seen == whole


def test_ranks_split_the_lanes_and_an_empty_rank_is_refused(tmp_path: Path) -> None:
    assert [make(tmp_path, rank=rank, world_size=2).lanes for rank in (0, 1)] == [range(0, 2), range(2, 5)]
    with pytest.raises(StreamError, match="leave rank 0 of 6 without any"):
        make(tmp_path, rank=0, world_size=6).lanes  # noqa: B018


def test_building_opens_nothing_and_missing_sources_are_listed(tmp_path: Path) -> None:
    data = StreamDataModule(
        sources={"gone": {"path": tmp_path / "gone", "weight": 1.0, "domain": "web"}},
        processor=CharProcessor(),
        seed=0,
        num_lanes=2,
        max_tokens=64,
    )
    assert len(data.missing_sources()) == 1
    assert "(missing)" in data.resolved_table()
    with pytest.raises(StreamError, match="source 'gone'"):
        data.train_dataloader()
    assert "expected fill" in make(tmp_path / "here").resolved_table(10)
    assert make(tmp_path / "here").domains == ["natural"]


def test_a_source_without_a_declared_domain_may_hold_several(tmp_path: Path) -> None:
    samples = [sample("both", n, domain=("natural", "text")[n % 2]) for n in range(10)]
    write_samples(tmp_path, samples, source="both")
    data = make(tmp_path)
    assert data.domains == ["natural", "text"]
    assert "natural,text" in data.resolved_table(10)


def test_a_source_s_loss_weight_reaches_every_segment(tmp_path: Path) -> None:
    source(tmp_path / "a", "a", 10)
    source(tmp_path / "b", "b", 10)
    data = StreamDataModule(
        sources={"a": {"path": tmp_path / "a", "loss_weight": 0.25}, "renamed": {"path": tmp_path / "b"}},
        processor=CharProcessor(),
        seed=1,
        num_lanes=4,
        max_tokens=64,
    )
    (batch,) = next(iter(data.train_dataloader()))
    weights = {(segment.source, segment.loss_weight) for segment in batch.segments}
    assert weights == {("a", 0.25), ("renamed", 1.0)}
    assert data.fingerprint()["sources"]["a"]["loss_weight"] == 0.25


def test_options_of_the_configuration_reach_the_stream(tmp_path: Path) -> None:
    source(tmp_path / "toys", "toys", 23)
    (tmp_path / "skip").write_text("toys\ttoys-00003\n", encoding="utf-8")
    data = StreamDataModule(
        sources={"toys": {"path": tmp_path / "toys", "chunk": 2, "max_epochs": 40}},
        processor=CharProcessor(),
        seed=1,
        num_lanes=5,
        max_tokens=64,
        unit="tokens",
        temperature=2.0,
        skip=tmp_path / "skip",
        cache_root=tmp_path / "cache",
        cache_gb=0.5,
        max_steps=50,
    )
    assert data.stream.plan.skipped == (frozenset({3}),)
    told = data.fingerprint()
    assert (told["mix"]["unit"], told["sources"]["toys"]["chunk"], list(told["skip"])) == ("tokens", 2, ["toys"])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "wrong", [{"num_workers": -1}, {"cache_gb": -1.0}, {"cache_gb": float("inf")}, {"micro_batch": -2}]
)
def test_negative_and_infinite_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(StreamError, match="must not be negative"):
        make(tmp_path, **wrong)
