"""What watches a run sees what happened."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from bestiary.config import Logger
from bestiary.training.callbacks.progress import ProgressView
from bestiary.training.callbacks.wandb_watch import flat, is_logged_in
from bestiary.training.flops import StepFlops, estimate, measured_flops, with_images
from bestiary.training.run_dir import RunDir
from bestiary.training.signals import StopRequests, exit_code
from tests.training.tiny import TinyData, tiny_model, tiny_row, tiny_stage, train


def scores(step: int) -> dict[str, Any]:
    return {"metrics": {"regions/accuracy": step / 10, "regions/nothing": None}}


def test_every_step_has_a_line_with_all_that_is_promised(tmp_path: Path) -> None:
    train(tmp_path)
    first, *_, last = RunDir(tmp_path).metrics.read()
    wanted = {"step", "loss", "loss_by_domain", "lr", "grad_norm", "tokens", "fill", "samples_seen", "mix_samples"}
    assert wanted <= first.keys()
    assert {"tokens_per_s", "mfu", "step_s", "wait_s"} <= last.keys() and last["step"] == 6
    assert sum(last["mix_tokens"].values()) == pytest.approx(1, abs=1e-5)


class Remote(TinyData):
    """A stream that fetches."""

    def fetched(self) -> dict[str, int]:
        return {"hits": 2, "retries": 1}


def test_what_remote_data_cost_stands_in_every_line_and_only_there(tmp_path: Path) -> None:
    train(tmp_path / "remote", stage=tiny_stage(max_steps=2), data=Remote())
    assert [r["remote"] for r in RunDir(tmp_path / "remote").metrics.read()] == 2 * [{"hits": 2, "retries": 1}]
    train(tmp_path / "local", stage=tiny_stage(max_steps=1))
    assert "remote" not in RunDir(tmp_path / "local").metrics.read()[0]


class Rotten(TinyData):
    """A stream that left too much out."""

    def check_damage(self, states: Sequence[bytes]) -> None:
        raise ValueError(f"too much damage in {len(states)} lanes")


def test_too_much_damage_stops_a_run_behind_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too much damage in 4 lanes"):
        train(tmp_path, stage=tiny_stage(max_steps=6, checkpoint_every=2), data=Rotten())
    status = RunDir(tmp_path).status
    assert (status.state, status.step) == ("failed", 2) and "too much damage" in str(status.error)
    summary, _ = train(tmp_path, stage=tiny_stage(max_steps=6, checkpoint_every=2), resume=True)
    assert summary.step == 6


def test_the_flight_recorder_names_every_sample_of_every_step(tmp_path: Path) -> None:
    train(tmp_path)
    records = RunDir(tmp_path).samples.read()
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert all([s.lane for s in r.samples] == [0, 1, 1, 2, 3, 3] for r in records)
    made = [[example.key for lane in range(4) for example in tiny_row(lane, step)] for step in range(6)]
    assert [[s.key for s in r.samples] for r in records] == made


def test_evaluation_runs_at_its_rhythm_and_at_the_end_in_eval_mode(tmp_path: Path) -> None:
    model = tiny_model()
    seen: list[tuple[int, bool]] = []

    def evaluate(step: int) -> dict[str, Any]:
        seen.append((step, model.training))
        torch.rand(5)  # an evaluation may draw random numbers without changing the run
        return scores(step)

    summary, _ = train(tmp_path / "a", stage=tiny_stage(max_steps=5, eval_every=2), model=model, evaluate=evaluate)
    assert seen == [(2, False), (4, False), (5, False)]
    assert summary.metrics["regions/accuracy"] == 0.5
    assert [line["step"] for line in RunDir(tmp_path / "a").evaluations.read()] == [2, 4, 5]
    train(tmp_path / "b", stage=tiny_stage(max_steps=5))
    losses = [[line["loss"] for line in RunDir(tmp_path / name).metrics.read()] for name in "ab"]
    assert losses[0] == losses[1]


def test_the_bar_shows_loss_speed_and_fill_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    view = ProgressView(name="stage", start=0, max_steps=2, console=console)
    with view:
        report = Report()
        view(report, {"tokens_per_s": 1234.0})  # type: ignore[arg-type]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loss 0.5000" in text and "1,234 tok/s" in text and "fill 75%" in text


def test_without_a_terminal_plain_lines_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with ProgressView(name="stage", start=0, max_steps=2, console=Console(file=io.StringIO())) as view:
        view(Report(), {})  # type: ignore[arg-type]
        view(Report(step=2, loss=0.25), {"tokens_per_s": 10.0})  # type: ignore[arg-type]
    assert "stage 1/2 loss 0.5000  - tok/s" in caplog.text and "stage 2/2 loss 0.2500" in caplog.text


class Report:
    """The fields of a StepReport that a progress view reads."""

    def __init__(self, step: int = 1, loss: float = 0.5) -> None:
        self.step, self.loss, self.fill = step, loss, 0.75


def test_flops_follow_parameters_targets_and_lengths() -> None:
    model = tiny_model()
    model.encoder.requires_grad_(False)
    flops = estimate(model)
    width = 8
    # encoder (frozen): 4 a parameter; block and head: 6; the embedding table is looked up, not multiplied
    assert flops.per_token == 4 * width * width + 6 * (width * width + width * 17)
    step = StepFlops(per_token=2.0, per_target=3.0, per_image=5.0, per_square=7.0)
    report = type("R", (), {"counts": {"tokens": 1, "targets": 10, "images": 100, "squares": 1000}})
    assert step.of(report) == 2 + 30 + 500 + 7000  # type: ignore[arg-type]


def test_a_picture_costs_what_its_encoder_multiplies() -> None:
    class WithVision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = Rows()

    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(4, 6)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.proj(pixels.float().mean(1))

    flops = with_images(StepFlops(1.0, 1.0, 0.0, 1.0), WithVision(), torch.zeros(1, 3, 5, 4, dtype=torch.uint8))
    assert flops.per_image == 3 * 2 * 5 * 4 * 6


def test_the_device_is_measured() -> None:
    assert measured_flops(torch.device("cpu"), torch.float32, size=128, repeats=1) > 1e8


def test_exit_codes_are_those_of_a_shell() -> None:
    assert [exit_code(s) for s in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 130, 143, 143]


def test_handlers_leave_as_they_came() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.counts() == (0, 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_wandb_is_offline_unless_logged_in(tmp_path: Path) -> None:
    nobody = {"NETRC": str(tmp_path / "none")}
    assert not is_logged_in(nobody)
    assert is_logged_in(nobody | {"WANDB_API_KEY": "x"})
    assert not is_logged_in(nobody | {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"})
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert is_logged_in({"NETRC": str(tmp_path / "netrc")})


def test_wandb_names_have_sections() -> None:
    assert flat({"loss": 1.0, "loss_by_domain": {"web": 2.0}, "lr": 3.0}) == {
        "train/loss": 1.0,
        "domain_loss/web": 2.0,
        "optim/lr": 3.0,
    }


@pytest.mark.slow
def test_a_wandb_run_reads_back_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "panel.png")

    def evaluate(step: int) -> dict[str, Any]:
        table = (["picture", "question", "answer"], [[picture, "what?", "red"]])
        return scores(step) | {"panels": {"regions": tmp_path / "panel.png"}, "tables": {"regions": table}}

    logger = Logger(wandb=True, progress=False, project="p", group="g")
    config = {"seed": 3, "shards": [{"path": "https://me:hunter2@host/set?sig=hunter3"}]}
    train(tmp_path / "run", stage=tiny_stage(max_steps=4), logger=logger, evaluate=evaluate, config=config)
    identity = RunDir(tmp_path / "run").status.wandb_id
    remixed = TinyData(version=2, on_change="remix", weights={"beta": 0.5})
    train(tmp_path / "run", stage=tiny_stage(max_steps=6), data=remixed, logger=logger, resume=True, evaluate=evaluate)
    assert identity and RunDir(tmp_path / "run").status.wandb_id == identity
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) in (1, 2)
    told = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(files[-1])],
        capture_output=True,
        text=True,
        check=True,
    )
    text = json.dumps(json.loads(told.stdout))
    assert "train/loss" in text and "regions/accuracy" in text and "perf/mfu" in text
    assert all(name in text for name in ("mix_asked/alpha", "mix_targets/alpha", "train/weighted_loss"))
    assert not any(b"hunter" in path.read_bytes() for path in files)
    assert any(b"https://***@host/set?***" in path.read_bytes() for path in files)
    assert b"step 4:\nversion 1 -> 2" in files[-1].read_bytes(), "the notes of the run say what changed"
