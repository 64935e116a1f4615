"""Cuts the vision encoder of Ovis' demo out of SPHINX-V's: its CLIP tower under the names of Ovis' backbone.

python -m experiments.demo_assets.ovis_encoder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from .ovis_llm import ASSETS

TOWER, BACKBONE = "vision.clip.tower.", "vision.backbone."


def main() -> None:
    """Write the one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--encoders", type=Path, default=Path("src/bestiary/variants/sphinx_v/assets/encoders.safetensors")
    )
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    tower = {
        f"{BACKBONE}{name.removeprefix(TOWER)}": tensor
        for name, tensor in load_file(args.encoders).items()
        if name.startswith(TOWER)
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tower, args.out / "clip.safetensors")


if __name__ == "__main__":
    main()
