"""Writes a run's newest checkpoint as one half-precision safetensors file that stage 2 can start from.

python -m experiments.demo_assets.export runs/demo_assets_stage1
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path

import torch

from bestiary.saved_run import load_saved_run
from bestiary.saved_weights import open_weights
from bestiary.training.parents import export_weights

log = logging.getLogger("demo_assets")


def main() -> None:
    """Read the run, write the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/bestiary/variants/sphinx_v/assets/stage1.safetensors"))
    args = parser.parse_args()
    pieces = load_saved_run(args.run)
    made = open_weights(args.run)
    export_weights(
        pieces.model, args.out, stage=made.stage, identity=pieces.identity, step=made.step, dtype=torch.float16
    )
    write_sums(args.out.parent)
    log.info("%s: stage %s, step %d, %.1f MB", args.out, made.stage, made.step, args.out.stat().st_size / 1e6)


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the weights and the tokenizer in a folder, in the form of `sha256sum -c`."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.model"), *folder.glob("*.tiktoken")])
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
