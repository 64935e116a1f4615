"""The console script `bestiary`: look at runs, ask a trained model, write and check shards, make the data."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bestiary.cli_describe import add_describe
from bestiary.cli_ovis import add_ovis
from bestiary.cli_runs import add_runs
from bestiary.cli_shards import add_shards
from bestiary.cli_use import add_use
from bestiary.cli_weights import add_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, acts, returns the exit code; an error a user can cause is one line."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args.act(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough (`| head`); what is left must not be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bestiary", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_runs(commands)
    add_use(commands)
    add_shards(commands)
    add_weights(commands)
    add_ovis(commands)
    add_describe(commands)

    data = commands.add_parser("data", help="make the embedded data")
    data.add_argument("--root", type=Path, default=Path(".cache/data/embedded"))
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(act=_data)
    return parser


def _data(args: argparse.Namespace) -> None:
    from data_modules.embedded import build

    for name, folder in build(args.root, seed=args.seed).items():
        sys.stdout.write(f"{name}: {folder}\n")


if __name__ == "__main__":
    sys.exit(main())
