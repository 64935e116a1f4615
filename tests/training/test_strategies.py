"""Several processes train what one process trains."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bestiary.config import Cluster
from bestiary.training.run_dir import RunDir
from bestiary.training.strategies import build_strategy, check_launch, check_machine

ROOT = Path(__file__).parents[2]


def run(path: Path, *options: str, ranks: int = 1, check: bool = True) -> None:
    """Start the tiny program on `ranks` processes as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
            **(launched(rank, ranks, port) if ranks > 1 else {}),
        }
        command = [sys.executable, "-m", "tests.training.killed", str(path), "--devices", str(ranks)]
        command += ["--sleep", "0", "--dropout", "0", *options]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * ranks or not check


def launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in RunDir(path).metrics.read()]


def test_processes_nobody_started_are_asked_for() -> None:
    with pytest.raises(ValueError, match="torchrun --nnodes 1 --nproc_per_node 2"):
        check_launch(Cluster(devices=2), {})
    check_launch(Cluster(devices=2), {"WORLD_SIZE": "2"})
    check_launch(Cluster(), {})


def test_an_unknown_strategy_names_the_known() -> None:
    with pytest.raises(ValueError, match="zero2"):
        build_strategy(Cluster(strategy="zero9"), clip_norm=0.0)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_names_its_extra() -> None:
    with pytest.raises(ValueError, match=r"pip install 'bestiary\[deepspeed\]'"):
        check_machine(Cluster(strategy="zero2"))


def test_a_machine_without_gpus_or_half_precision_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"cluster.accelerator=gpu but torch sees no GPU; use cluster=cpu"):
        check_machine(Cluster(accelerator="gpu"))
    with pytest.raises(ValueError, match="is not possible with DeepSpeed on CPUs; take bf16-mixed"):
        check_machine(Cluster(strategy="zero2", precision="16-mixed"))
    with pytest.raises(ValueError, match="torchrun"):
        check_machine(Cluster(nodes=2))
    check_machine(Cluster(strategy="zero3", precision="bf16-mixed"))


STRATEGIES = ["ddp", "fsdp2"] + (["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_learn_what_one_learns_and_resume(tmp_path: Path, strategy: str) -> None:
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    run(one, "--steps", "10", "--micro", "1", "--beta-weight", "0.3")
    run(two, "--steps", "10", "--micro", "1", "--beta-weight", "0.3", "--strategy", strategy, ranks=2)
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    first, second = (load_file(path / "checkpoints/last/model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.allclose(value, second[name], atol=2e-3) for name, value in first.items())
    for mine, other in zip(RunDir(two).samples.read(), RunDir(one).samples.read(), strict=True):
        assert [replace(s, loss=None) for s in mine.samples] == [replace(s, loss=None) for s in other.samples]
        assert [s.loss for s in mine.samples] == pytest.approx([s.loss for s in other.samples], rel=1e-3)
    weighted = [[line["weighted_loss"] for line in RunDir(path).metrics.read()] for path in (one, two)]
    assert weighted[0] == pytest.approx(weighted[1], rel=2e-4)
    # One process's checkpoint of step 5 goes on here on two ranks: checkpoints do not know their layout.
    for source, ranks in ((two, 2), (one, 2)):
        shutil.copytree(source, again, symlinks=True)
        shutil.rmtree(again / "checkpoints" / "step-000010")
        options = ("--micro", "1", "--beta-weight", "0.3", "--strategy", strategy, "--resume")
        run(again, "--steps", "10", *options, ranks=ranks)
        assert RunDir(again).status.restarts == 1
        assert losses(again)[5:] == pytest.approx(losses(two)[5:], rel=2e-4)
        shutil.rmtree(again)
