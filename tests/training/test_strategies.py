"""Several processes train what one process trains."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bestiary.config import Cluster
from bestiary.training.run_dir import RunDir
from bestiary.training.strategies import build_strategy, check_launch

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
        command = [sys.executable, "-m", "tests.training.tiny", str(path), "--devices", str(ranks)]
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
        build_strategy(Cluster(strategy="zero2"), clip_norm=0.0)


STRATEGIES = ["ddp", "fsdp2"] + (["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_learn_what_one_learns_and_resume(tmp_path: Path, strategy: str) -> None:
    run(tmp_path / "one", "--steps", "10", "--micro", "1")
    run(tmp_path / "two", "--steps", "5", "--micro", "1", "--strategy", strategy, ranks=2)
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-6)
    one, two = (RunDir(tmp_path / name).metrics.read()[0] for name in ("one", "two"))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert {k: two[k] for k in ("tokens", "targets", "samples")} == {
        k: one[k] for k in ("tokens", "targets", "samples")
    }
    # the schedule of a 5-step stage ends elsewhere, so the same stage is compared whole
    run(tmp_path / "whole", "--steps", "10", "--micro", "1", "--strategy", strategy, ranks=2)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    first, second = (load_file(tmp_path / n / "checkpoints/last/model.safetensors") for n in ("one", "whole"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=2e-3), name
    assert RunDir(tmp_path / "whole").samples.read() == RunDir(tmp_path / "one").samples.read()
