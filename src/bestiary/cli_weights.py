"""`bestiary weights`: published checkpoints in, out, and what they hold."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_weights(commands: Any) -> None:
    """Adds `weights inspect|import|export|mix|merge|adapter` to the console script."""
    weights: argparse.ArgumentParser = commands.add_parser(
        "weights", help="look at published checkpoints, import them, give them back"
    )
    inner = weights.add_subparsers(required=True, metavar="ACT")
    inspect = inner.add_parser("inspect", help="layout, variant, size, dtype, and how much of it maps to our names")
    inspect.add_argument("path", type=Path, metavar="PATH", help="published folder, imported folder or manifest.json")
    inspect.set_defaults(act=_inspect)
    _add_import(inner)
    _add_export(inner)
    _add_mix(inner)
    _add_merge(inner)


def _add_import(parent: Any) -> None:
    take: argparse.ArgumentParser = parent.add_parser(
        "import",
        help="published shards to a folder that train.py takes as parent or in model.weights",
        description="Several folders load in sequence: a later one overrides an earlier one, a delta is added to it.",
    )
    take.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder of consolidated.*.pth, an Ovis, Monkey or Qwen-VL; or one Hugging Face folder or file of a part",
    )
    take.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    take.add_argument("--config", type=Path, metavar="FILE", help="config.json or params.json from elsewhere")
    take.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model or qwen.tiktoken from elsewhere")
    take.add_argument("--for", dest="model", metavar="MODEL", help="whose part it is: sphinx (default) or ovis")
    take.add_argument(
        "--may-lack",
        action="append",
        default=[],
        metavar="GLOB",
        help="published names (or ours) that may miss; repeatable",
    )
    take.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="GLOB",
        help="published names not to take (adapters for other windows); repeatable",
    )
    take.add_argument(
        "--keep-unknown", action="store_true", help="keep tensors that no model of ours has, for the way back"
    )
    take.set_defaults(act=_import)


def _add_export(parent: Any) -> None:
    give: argparse.ArgumentParser = parent.add_parser("export", help="imported or trained weights to published shards")
    give.add_argument("path", type=Path, metavar="WEIGHTS", help="imported folder, run directory, checkpoint or file")
    give.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    give.add_argument("--layout", metavar="LAYOUT", help="another format; that of the import by default")
    give.add_argument("--shards", type=int, metavar="N", help="as many as the import had by default")
    give.add_argument(
        "--like", type=Path, metavar="IMPORTED", help="import that trained weights began as: its order, dtypes, files"
    )
    give.add_argument(
        "--delta-from", type=Path, metavar="BASE", help="write only the difference to this imported folder"
    )
    give.add_argument(
        "--delta-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the difference; float16 is the reference's and loses small ones",
    )
    give.set_defaults(act=_export)


def _add_mix(parent: Any) -> None:
    join: argparse.ArgumentParser = parent.add_parser(
        "mix",
        help="two runs of one stage as one: beta * A + (1 - beta) * B",
        description="OUT is a folder that parent= takes; between two run directories eval.py takes it, too.",
    )
    join.add_argument("a", type=Path, metavar="A", help="run directory, checkpoint, imported folder or file")
    join.add_argument("b", type=Path, metavar="B", help="another of the same stage and sizes")
    join.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    join.add_argument("--beta", type=float, required=True, metavar="BETA", help="share of A: 1 is A, 0 is B")
    join.add_argument(
        "--part",
        type=_part,
        action="append",
        default=[],
        metavar="GLOB=BETA",
        help="another share for the names of a glob (decoder.*=0.3); repeatable, the last that matches wins",
    )
    join.set_defaults(act=_mix)


def _add_merge(parent: Any) -> None:
    merge: argparse.ArgumentParser = parent.add_parser(
        "merge",
        help="a run with tuning=lora or bias_norm, which saved what trained, as whole weights",
        description="Of whole weights with adapters in their decoder (monkey_lora_3090): plain weights without them.",
    )
    adapter: argparse.ArgumentParser = parent.add_parser(
        "adapter",
        help="what a run trained without its base; of a LoRA run its adapters in peft's layout",
        description="Of a run with whole weights: a run directory of the tensors that its base does not hold.",
    )
    for one in (merge, adapter):
        one.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoint folders")
        one.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
        one.add_argument("--base", type=Path, metavar="WEIGHTS", help="where the weights are now that it began from")
    merge.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of all weights; what the run held")
    merge.set_defaults(act=_merge)
    adapter.set_defaults(act=_adapter)


def _merge(args: argparse.Namespace) -> None:
    import torch

    from bestiary.weights.merging import merge

    done = merge(args.run, args.out, base=args.base, dtype=getattr(torch, args.dtype) if args.dtype else None)
    counts = f"adapters added to {done.adapted:,}, {done.trained:,} others trained"
    sys.stdout.write(f"{args.out}: {done.num_tensors:,} tensors, {counts}\n")


def _adapter(args: argparse.Namespace) -> None:
    from bestiary.saved_tuning import saves_all
    from bestiary.weights.merging import export_adapter, opened_run

    if saves_all(opened_run(args.run)[1].tuning):
        _trained(args)
        return
    if args.base is not None:
        raise ValueError("--base has no effect on adapters in peft's layout, which know no base; leave it out")
    done = export_adapter(args.run, args.out)
    sys.stdout.write(f"{args.out}: adapters of {done.num_layers:,} layers\n")
    if done.left:
        sys.stderr.write(
            f"warning: {done.left:,} other tensors that the run trained are not in it; see weights merge\n"
        )


def _trained(args: argparse.Namespace) -> None:
    from bestiary.weights.trained import export_trained

    done = export_trained(args.run, args.out, base=args.base)
    size = f"{done.num_tensors:,} tensors that trained, {done.num_bytes / 1e6:,.1f} MB"
    sys.stdout.write(f"{args.out}: {size}; {done.left:,} stay with the base\n")


def _part(text: str) -> tuple[str, float]:
    glob, _, beta = text.rpartition("=")
    try:
        return glob, float(beta)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no GLOB=BETA; write for instance 'decoder.*=0.3'") from None


def _inspect(args: argparse.Namespace) -> None:
    from bestiary.weights.inspecting import inspect

    found = inspect(args.path)
    for label, text in found.lines:
        sys.stdout.write(f"{label:<11}{text}\n")
    if found.lost:
        sys.stdout.flush()
        raise ValueError(f"{args.path}: {found.lost:,} names are missing, unexpected or of another shape or cut")


def _import(args: argparse.Namespace) -> None:
    from bestiary.weights.importing import Asked, import_weights
    from bestiary.weights.parts import is_part

    if any(is_part(path) for path in args.sources):
        _import_part(args)
        return
    asked = Asked(args.config, args.tokenizer, tuple(args.may_lack), args.keep_unknown, tuple(args.leave_out))
    done = import_weights(args.sources, args.out, asked)
    sys.stdout.write(f"{args.out}: {done.model.name}, {done.num_parameters:,} parameters; {done.fit}\n")
    if done.model.begins:
        sys.stdout.write(f"  this is the beginning of {done.model.begins}\n")
    _show_names(done.fit)
    for name in done.unequal:
        sys.stderr.write(f"warning: {name} should be the same in every shard and is not; shard 0's was taken\n")
    if not done.has_tokenizer:
        sys.stderr.write("warning: no tokenizer beside the weights, so a run cannot check that it has theirs\n")


def _import_part(args: argparse.Namespace) -> None:
    from bestiary.weights.parts import import_part

    if len(args.sources) > 1:
        raise ValueError(f"{len(args.sources)} folders, of which one holds a single part; import parts one by one")
    if args.config is not None:
        raise ValueError("--config is for consolidated shards; a part's config.json lies beside its weights")
    if args.leave_out:
        raise ValueError("--leave-out is for whole models; a part takes what it has a place for")
    [source] = args.sources
    asked = {"may_lack": args.may_lack, "keep_unknown": args.keep_unknown, "model": args.model}
    done = import_part(source, args.out, tokenizer=args.tokenizer, **asked)
    sys.stdout.write(f"{args.out}: {done.name} for {done.target}, {done.num_parameters:,} parameters; {done.fit}\n")
    _show_names(done.fit)
    groups = sorted({name.partition(".")[0] for name in done.fit.dropped})
    sys.stdout.writelines(f"  dropped {group}.*\n" for group in groups)
    sys.stdout.write(f"a model takes it with model.weights=[{args.out}]\n")
    sys.stdout.writelines(f"  of sizes {setting}\n" for setting in done.settings)


def _show_names(found: Any) -> None:
    for label, names in (("missing", found.missing), ("unexpected", found.unexpected)):
        sys.stdout.writelines(f"  {label} {name}\n" for name in names)


def _export(args: argparse.Namespace) -> None:
    import torch

    from bestiary.weights.exporting import export_weights

    delta = {"delta_from": args.delta_from, "delta_dtype": getattr(torch, args.delta_dtype)}
    done = export_weights(args.path, args.out, layout=args.layout, num_shards=args.shards, like=args.like, **delta)
    shards = f"{len(done.files)} shard{'s' if len(done.files) > 1 else ''}"
    sys.stdout.write(f"{args.out}: {done.num_tensors:,} tensors in {shards}, {done.num_bytes / 1e6:,.1f} MB\n")
    if done.filled:
        sys.stdout.write(
            f"  {done.filled:,} tensors that the weights leave out taken from {args.like or args.delta_from}\n"
        )
    if done.cast:
        sys.stdout.write(f"  {done.cast:,} tensors brought to the published dtype\n")
    if done.difference is not None:
        found = done.difference
        share = f"{found.num_inexact:,} of {found.num_values:,} values"
        sys.stdout.write(f"  base + difference is not bit-equal in {share}; the worst is off by {found.largest:.3g}\n")


def _mix(args: argparse.Namespace) -> None:
    from bestiary.weights.mixing import mix

    done = mix(args.a, args.b, args.out, beta=args.beta, parts=args.part)
    counts = f"{done.mixed:,} mixed, {done.equal:,} equal in both"
    sys.stdout.write(f"{args.out}: stage {done.stage or 'unknown'}, {done.num_tensors:,} tensors, {counts}\n")
