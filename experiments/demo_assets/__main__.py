"""Makes all assets of the demos, one after another: tokenizer, encoders, prompt fit, stage 1; then Ovis' own and
Monkey's (`make demo-assets`).

About 75 minutes on two cores. Every step can be run alone; see README.md.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from .model import ROOT

RUN_DIR = Path("runs/demo_assets_stage1")


def main() -> None:
    """Run the steps from `--begin` on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    steps = {
        "tokenizer": ["-m", "experiments.demo_assets.tokenizer"],
        "encoders": ["-m", "experiments.demo_assets.encoders"],
        "prompt_fit": ["-m", "experiments.demo_assets.prompt_fit"],
        "stage1": ["train.py", "experiment=sphinxv_stage1", f"run_dir={RUN_DIR}"],
        "export": ["-m", "experiments.demo_assets.export", str(RUN_DIR)],
        "ovis_encoder": ["-m", "experiments.demo_assets.ovis_encoder"],
        "ovis_llm": ["-m", "experiments.demo_assets.ovis_llm"],
        "monkey_vocabulary": ["-m", "experiments.demo_assets.monkey_vocabulary"],
        "monkey_base": ["-m", "experiments.demo_assets.monkey_base"],
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--begin", choices=list(steps), default="tokenizer")
    names = list(steps)
    for name in names[names.index(parser.parse_args().begin) :]:
        logging.info("== %s", name)
        subprocess.run([sys.executable, *steps[name]], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
