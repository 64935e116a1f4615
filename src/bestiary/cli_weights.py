"""`bestiary weights`: published checkpoints in, out, and what they hold."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_weights(commands: Any) -> None:
    """Adds `weights inspect|import|export` to the console script."""
    weights: argparse.ArgumentParser = commands.add_parser(
        "weights", help="look at published checkpoints, import them, give them back"
    )
    inner = weights.add_subparsers(required=True, metavar="ACT")
    inspect = inner.add_parser("inspect", help="layout, variant, size, dtype, and how much of it maps to our names")
    inspect.add_argument("path", type=Path, metavar="PATH", help="published folder, imported folder or manifest.json")
    inspect.set_defaults(act=_inspect)
    _add_import(inner)
    _add_export(inner)


def _add_import(parent: Any) -> None:
    take: argparse.ArgumentParser = parent.add_parser(
        "import",
        help="published shards to a folder that train.py takes as parent or in model.weights",
        description="Several folders load in sequence: a later one overrides an earlier one, a delta is added to it.",
    )
    take.add_argument("sources", type=Path, nargs="+", metavar="FOLDER", help="folder of consolidated.*.pth")
    take.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    take.add_argument("--config", type=Path, metavar="FILE", help="config.json or params.json from elsewhere")
    take.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model from elsewhere")
    take.add_argument(
        "--may-lack", action="append", default=[], metavar="GLOB", help="published names that may miss; repeatable"
    )
    take.add_argument(
        "--keep-unknown", action="store_true", help="keep tensors that no model of ours has, for the way back"
    )
    take.set_defaults(act=_import)


def _add_export(parent: Any) -> None:
    give: argparse.ArgumentParser = parent.add_parser("export", help="imported or trained weights to published shards")
    give.add_argument("path", type=Path, metavar="WEIGHTS", help="imported folder, run directory, checkpoint or file")
    give.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    give.add_argument("--layout", choices=("consolidated", "meta"), help="that of the import by default")
    give.add_argument("--shards", type=int, metavar="N", help="as many as the import had by default")
    give.add_argument(
        "--like", type=Path, metavar="IMPORTED", help="import that trained weights began as: its order, dtypes, files"
    )
    give.set_defaults(act=_export)


def _inspect(args: argparse.Namespace) -> None:
    from bestiary.weights.inspecting import inspect

    for label, text in inspect(args.path).lines:
        sys.stdout.write(f"{label:<11}{text}\n")


def _import(args: argparse.Namespace) -> None:
    from bestiary.weights.importing import Asked, import_weights

    asked = Asked(args.config, args.tokenizer, tuple(args.may_lack), args.keep_unknown)
    done = import_weights(args.sources, args.out, asked)
    sys.stdout.write(f"{args.out}: {done.family.name}, {done.num_parameters:,} parameters; {done.fit}\n")
    for label, names in (("missing", done.fit.missing), ("unexpected", done.fit.unexpected)):
        sys.stdout.writelines(f"  {label} {name}\n" for name in names)
    for name in done.unequal:
        sys.stderr.write(f"warning: {name} should be the same in every shard and is not; shard 0's was taken\n")
    if not done.has_tokenizer:
        sys.stderr.write("warning: no tokenizer.model beside the weights, so a run cannot check that it has theirs\n")


def _export(args: argparse.Namespace) -> None:
    from bestiary.weights.exporting import export_weights

    done = export_weights(args.path, args.out, layout=args.layout, num_shards=args.shards, like=args.like)
    shards = f"{len(done.files)} shard{'s' if len(done.files) > 1 else ''}"
    sys.stdout.write(f"{args.out}: {done.num_tensors:,} tensors in {shards}, {done.num_bytes / 1e6:,.1f} MB\n")
    if done.filled:
        sys.stdout.write(f"  {done.filled:,} tensors that the weights leave out taken from {args.like}\n")
    if done.cast:
        sys.stdout.write(f"  {done.cast:,} tensors brought to the published dtype\n")
