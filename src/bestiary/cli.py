"""The console script `bestiary`: look at runs, ask a trained model, write and check shards, make the data."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bestiary.cli_runs import add_runs
from bestiary.cli_shards import add_shards
from bestiary.cli_weights import add_weights
from bestiary.schema import Region


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

    ask = commands.add_parser("ask", help="ask a trained run about a picture and its marked regions")
    ask.add_argument("run", type=Path, help="run directory")
    ask.add_argument("image", type=Path)
    ask.add_argument("question", help='for example "What is <Mark 1>?"')
    ask.add_argument("--point", action="append", default=[], metavar="X,Y", help="pixels of the picture; repeatable")
    ask.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="pixels; repeatable")
    ask.add_argument("--max-new-tokens", type=int, default=128)
    ask.set_defaults(act=_ask)

    add_shards(commands)
    add_weights(commands)

    data = commands.add_parser("data", help="make the embedded data")
    data.add_argument("--root", type=Path, default=Path(".cache/data/embedded"))
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(act=_data)
    return parser


def _ask(args: argparse.Namespace) -> None:
    from PIL import Image

    from bestiary.compose import load_run
    from bestiary.inference.session import Session
    from bestiary.training import assembly

    image = Image.open(args.image)
    regions = regions_of(args.point, args.box, width=image.width, height=image.height)
    pieces = assembly.load_pieces(load_run(args.run), args.run, accelerator="cpu", threads=0)
    session = Session(pieces.model, pieces.processor)
    answer = session.respond(image, args.question, regions, max_new_tokens=args.max_new_tokens)
    sys.stdout.write(f"{answer}\n")


def regions_of(points: Sequence[str], boxes: Sequence[str], *, width: int, height: int) -> list[Region]:
    """Regions in fractions of the picture from pixel strings; marks are numbered in order, points first."""
    regions: list[Region] = []
    for text, size in [*((p, 2) for p in points), *((b, 4) for b in boxes)]:
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != size:
            raise ValueError(f"{text!r} is not {size} numbers with commas between them")
        coords = tuple(n / (height if i % 2 else width) for i, n in enumerate(numbers))
        regions.append(Region("point" if size == 2 else "box", coords, len(regions) + 1))
    return regions


def _data(args: argparse.Namespace) -> None:
    from data_modules.embedded import build

    for name, folder in build(args.root, seed=args.seed).items():
        sys.stdout.write(f"{name}: {folder}\n")
