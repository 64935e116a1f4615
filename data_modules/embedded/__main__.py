"""Command line: `python -m data_modules.embedded --root DIR [--seed N] [--size stage1=400 ...] [--processes N]`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .build import PARTS, build

log = logging.getLogger(__name__)


def size(text: str) -> tuple[str, int]:
    """`stage1=400` as a pair."""
    name, equals, number = text.partition("=")
    if not equals or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, for example stage1=400")
    return name, int(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the embedded data."""
    parser = argparse.ArgumentParser(
        prog="python -m data_modules.embedded", description="Write the embedded data as shards."
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that gets one folder per source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=None, help="default: one a core")
    parts = ", ".join(f"{name} {part.size}" for name, part in PARTS.items())
    parser.add_argument("--size", type=size, action="append", default=[], help=f"NAME=NUMBER; per domain: {parts}")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folders = build(args.root, seed=args.seed, sizes=dict(args.size), processes=args.processes)
    except ValueError as error:
        parser.error(str(error))
    for name, folder in folders.items():
        log.info("%s: %s", name, folder)


if __name__ == "__main__":
    main()
