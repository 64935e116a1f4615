"""Every command printed in a document runs: those of `make` in `.ci/run`, all others here, as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data_modules/README.md",
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
BY_CI = {"make setup", "make demo", "make test", "make check"}
LONG = {"make demo-assets", "make bench"}
"""Take long; tests/test_demo_assets.py and tests/test_throughput.py run their steps at a tiny size."""
ELSEWHERE = (
    *("python train.py -m ", "python train.py experiment=sphinxv_stage2 scale=paper dry_run=true"),
    "bestiary describe PICTURES ",
)
"""Beginnings of commands that tests/test_train.py runs, a sweep and the plan of the paper's recipe, and of one with a
server that tests/test_cli_describe.py runs."""


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
            found += [(document.name, line) for line in lines if line and not line.startswith("#")]
    return found


def test_documents_hold_commands_and_ci_runs_the_make_ones() -> None:
    listed = {command for _, command in commands()}
    assert "make demo" in listed and "make test" in listed
    script = (ROOT / ".ci/run").read_text() + (ROOT / "Makefile").read_text()
    assert "make demo" in script and "make check" in script and "check: lint test" in script
    assert not {c for c in listed if c.startswith("make ")} - BY_CI - LONG


@pytest.fixture(scope="module")
def fresh_run() -> None:
    """The documents' run directories must not be there yet, as for a newcomer."""
    for name in ("readme", "first", "second", "lora", "lora-merged", "lora-adapter", "words"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_run")
@pytest.mark.parametrize(
    "command", [c for _, c in commands() if not c.startswith(("make ", "git ", "cd ", *ELSEWHERE))]
)
def test_a_documented_command_runs(command: str) -> None:
    words = shlex.split(command)
    tools = Path(sys.executable).parent
    words[0] = sys.executable if words[0] == "python" else str(tools / words[0])
    environment = {**os.environ, "WANDB_MODE": "offline", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:  # after the commands above, whose runs it takes
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0 and done.stdout, f"{block}\n{done.stderr[-2000:]}"
