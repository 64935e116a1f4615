"""The console script `bestiary`: look at runs, ask a trained model, check shards, make the embedded data."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bestiary.schema import Region


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, acts, returns the exit code; an error a user can cause is one line."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args.act(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bestiary", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    runs = commands.add_parser("runs", help="list the runs below a folder, newest last")
    runs.add_argument("--root", type=Path, default=Path("runs"))
    runs.set_defaults(act=_runs)

    ask = commands.add_parser("ask", help="ask a trained run about a picture and its marked regions")
    ask.add_argument("run", type=Path, help="run directory")
    ask.add_argument("image", type=Path)
    ask.add_argument("question", help='for example "What is <Mark 1>?"')
    ask.add_argument("--point", action="append", default=[], metavar="X,Y", help="pixels of the picture; repeatable")
    ask.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="pixels; repeatable")
    ask.add_argument("--max-new-tokens", type=int, default=128)
    ask.set_defaults(act=_ask)

    check = commands.add_parser("check", help="verify the shards of a source against their checksums")
    check.add_argument("folder", type=Path, nargs="+")
    check.set_defaults(act=_check)

    data = commands.add_parser("data", help="make the embedded data")
    data.add_argument("--root", type=Path, default=Path(".cache/data/embedded"))
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(act=_data)
    return parser


def _runs(args: argparse.Namespace) -> None:
    found = sorted(args.root.glob("**/status.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run below {args.root}; start one with python train.py experiment=sphinxv_stage2")
    for path in found:
        status = json.loads(path.read_text(encoding="utf-8"))
        scores = [
            f"{report.parent.name} {json.loads(report.read_text(encoding='utf-8'))['metrics']['accuracy']['value']:.3f}"
            for report in sorted(path.parent.glob("eval/*/report.json"))
        ]
        line = f"{status['state']:<12} {status['stage']:<16} {status['step']:>7} steps  {path.parent}"
        sys.stdout.write("  ".join([line, *scores]) + "\n")


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


def _check(args: argparse.Namespace) -> None:
    from data_modules.shards import read_source

    problems = [f"{folder}: {line}" for folder in args.folder for line in read_source(folder).verify()]
    if problems:
        raise ValueError("; ".join(problems))
    sys.stdout.write(f"{len(args.folder)} sources are whole\n")


def _data(args: argparse.Namespace) -> None:
    from data_modules.embedded import build

    for name, folder in build(args.root, seed=args.seed).items():
        sys.stdout.write(f"{name}: {folder}\n")
