"""`bestiary describe`: detailed captions on several levels for a folder of pictures or for shards."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.cli_describe_summary import add_summary, check_summary, make_summaries

if TYPE_CHECKING:
    from bestiary.cli_describe_output import Output
    from bestiary.cli_describe_pictures import Pictures
    from bestiary.description.cache import Cache
    from bestiary.description.engine import Engine
    from bestiary.description.tally import Tally

EVERY_S = 10.0
"""Between two lines of progress where there is no terminal."""
BAD_BUDGET = 0.01


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def add_describe(commands: Any) -> None:
    """Adds `describe` to the console script."""
    describe: argparse.ArgumentParser = commands.add_parser(
        "describe",
        help="detailed captions from several experts, as shards to train on",
        description="Every answer is kept as soon as it is there: repeat the same command after a kill, a full disk or "
        "an endpoint that was down, and it goes on where it was.",
        formatter_class=_Help,
    )
    describe.add_argument(
        "pictures", metavar="PICTURES", help="folder of JPEG, PNG and WebP files, or of shards; a URL"
    )
    describe.add_argument("out", type=Path, metavar="OUT", help="folder of the shards, the page and the cache")
    describe.add_argument("--format", default="bestiary", metavar="F", help="of somebody's tars: caption or llava")
    describe.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of the part")
    describe.add_argument(
        "--part", default="0/1", metavar="I/N", help="this part of N; run without it once all are done"
    )
    describe.add_argument(
        "--workers", type=int, metavar="N", help="threads of experts; as many as cores without models"
    )
    describe.add_argument(
        "--bad-budget",
        type=float,
        default=BAD_BUDGET,
        metavar="B",
        help="bad pictures allowed: a share, from 1 on a count",
    )
    describe.add_argument(
        "--cache", type=Path, metavar="DIR", help="kept answers, shared by all parts; default OUT/cache"
    )
    _add_experts(describe.add_argument_group("experts"))
    add_summary(describe.add_argument_group("summary"))
    _add_output(describe.add_argument_group("output"))
    describe.set_defaults(act=_describe)


def _add_experts(group: Any) -> None:
    group.add_argument("--experts", default="ocr", metavar="A,B", help="of captions, regions, segments, ocr")
    told = "a folder in transformers' form, for"
    group.add_argument("--captioner", type=Path, metavar="DIR", help=f"BLIP-2, {told} captions and segments")
    group.add_argument("--matcher", type=Path, metavar="DIR", help=f"BLIP-2's matcher, {told} regions and segments")
    group.add_argument("--regions", type=Path, metavar="DIR", help=f"Florence-2, {told} regions")
    group.add_argument("--masks", type=Path, metavar="DIR", help=f"Segment Anything, {told} segments")
    group.add_argument("--device", default="cpu", help="of the models: cpu, cuda, cuda:1 ...")
    group.add_argument("--dtype", default="float32", help="of the models: float32, bfloat16 or float16")
    group.add_argument(
        "--published-overlap",
        action="store_true",
        help="equal captions of segments are compared as published, with its flaw",
    )


def _add_output(group: Any) -> None:
    from bestiary.description.prompts import QUESTION

    group.add_argument("--source", default="described", metavar="NAME", help="name of the source")
    group.add_argument("--domain", default="natural", metavar="D", help="domain of all samples")
    group.add_argument("--licence", default="", help="what source.json says of the data")
    group.add_argument("--question", default=QUESTION, help="what a model will be asked")
    group.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most")
    group.add_argument(
        "--published-files", action="store_true", help="write ann_all.json and detailed_caption.json, too"
    )
    group.add_argument("--page", type=int, default=24, metavar="N", help="pictures on the page; 0 for no page")


def _describe(args: argparse.Namespace) -> None:
    from bestiary.cli_describe_output import write_all
    from bestiary.cli_describe_pictures import open_pictures, part_of
    from bestiary.description.cache import Cache
    from bestiary.description.endpoint import EndpointError

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: describe at least one picture")
    part = part_of(args.part)
    folder = args.out / part.folder
    cache_folder = args.cache or args.out / "cache"
    for path in (folder, cache_folder):
        _check_folder(path)
    output = _output(args, folder)
    check_summary(args)
    _check_overlap(args)
    pictures = open_pictures(args.pictures, part, format=args.format, limit=args.limit)
    if not pictures.total and part.total == 1:
        raise ValueError(f"{args.pictures} holds no JPEG, PNG or WebP picture; give the folder that they are in")
    cache = Cache(cache_folder)
    with _alone(folder):
        stop = threading.Event()
        engine = _engine(args, cache, _allowed(args.bad_budget, pictures.total), stop)
        try:
            with _progress(pictures.total) as watch:
                engine.run(pictures, watch)
        except EndpointError as error:
            raise ValueError(str(error)) from error
        finally:
            _write_refused(folder, engine.tally)
        tally = engine.tally
        if tally.pending == 0 and tally.seen > tally.refused:
            written = write_all(output, engine.results(pictures), identity=tally.identity, facts=_facts(tally))
        else:
            written = []
    _show(tally, pictures, written, output)
    if tally.pending:
        raise ValueError(
            f"{tally.pending} of {tally.seen} pictures have no summary yet, so no shards are written; run the same "
            f"command again. The last: {tally.last_postponed}"
        )


def _check_folder(path: Path) -> None:
    """Raise where a file stands in the way of a folder."""
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{there} is a file where describe needs a folder; name another, or move the file away")


def _check_overlap(args: argparse.Namespace) -> None:
    from bestiary.description.experts import chosen

    if args.published_overlap and "segments" not in chosen(args.experts):
        raise ValueError("--published-overlap has no effect without segments in --experts; add them, or leave it out")


def _allowed(budget: float, total: int) -> int:
    """Bad pictures that are allowed: of a share, rounded up."""
    if not math.isfinite(budget) or budget < 0 or (budget >= 1 and budget != int(budget)):
        raise ValueError(f"--bad-budget {budget} is neither a share below 1 nor a whole number")
    return int(budget) if budget >= 1 else math.ceil(budget * total)


def _output(args: argparse.Namespace, folder: Path) -> Output:
    from bestiary.cli_describe_output import Output

    return Output(
        folder,
        source=args.source,
        domain=args.domain,
        licence=args.licence,
        question=args.question,
        samples_per_shard=args.samples_per_shard,
        published=args.published_files,
        num_shown=args.page,
        with_shards=args.summary != "none",
    )


def _engine(args: argparse.Namespace, cache: Cache, allowed: int, stop: threading.Event) -> Engine:
    from bestiary.description.engine import Engine
    from bestiary.description.experts import Folders, chosen, load
    from bestiary.description.levels import Describer
    from bestiary.description.tally import Tally

    names = chosen(args.experts)
    folders = Folders(args.captioner, args.matcher, args.regions, args.masks)
    has_models = folders != Folders()
    workers = args.workers if args.workers is not None else 1 if has_models else _cores()
    return Engine(
        lambda: Describer(load(names, folders, device=args.device, dtype=args.dtype), cache),
        make_summaries(args, cache, stop),
        Tally(allowed),
        overlap="published" if args.published_overlap else "exact",
        workers=workers,
        requests=args.requests,
        stop=stop,
    )


def _cores() -> int:
    from data_modules.writing.plan import available_cores

    return available_cores()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs in one folder would write over one another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "describe.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another describe is at work in {folder}; wait for it, or take --part I/N") from error
        yield


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Tally], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(tally: Tally) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY_S:
                last = time.monotonic()
                sys.stderr.write(f"{tally.seen:,} of {total:,} pictures  {_counts(tally)}\n")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=total)
        yield lambda tally: bar.update(task, completed=tally.seen, description=_counts(tally))


def _counts(tally: Tally) -> str:
    counts = {
        "described": tally.described,
        "cached": tally.cached,
        "nothing said": tally.silent,
        "without summary": tally.pending,
        "refused": tally.refused,
    }
    return "  ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def _facts(tally: Tally) -> dict[str, Any]:
    return {
        "pictures": tally.seen,
        "described": tally.described + tally.cached,
        "nothing_said": tally.silent,
        "refused": dict(tally.reasons),
    }


def _write_refused(folder: Path, tally: Tally) -> None:
    """One line a refused picture; no file where there is none."""
    from data_modules.writer import write_atomically

    path = folder / "refused.jsonl"
    path.unlink(missing_ok=True)
    if tally.problems:
        lines = [
            json.dumps({"name": name, "reason": reason, "problem": problem}) for name, reason, problem in tally.problems
        ]
        write_atomically(path, ("\n".join(lines) + "\n").encode())


def _show(tally: Tally, pictures: Pictures, written: list[Path], output: Output) -> None:
    """The final table, and where things are."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("pictures")
    table.add_column("", justify="right")
    rows = [
        ("seen", tally.seen),
        ("described now", tally.described),
        ("described before (cached)", tally.cached),
        ("nothing said", tally.silent),
        ("without summary yet", tally.pending),
        *((f"refused: {reason}", number) for reason, number in sorted(tally.reasons.items())),
        *((f"passed over: {kind}", number) for kind, number in sorted(pictures.passed_over.items())),
    ]
    for what, number in rows:
        if number or what == "seen":
            table.add_row(what, f"{number:,}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False).print(table)
    if not tally.pending:
        places = written or [path for path in (output.shards, output.page) if path.exists()]
        state = "" if written or not places else "nothing has changed: "
        sys.stdout.write(f"{state}{', '.join(map(str, places)) or 'nothing to write'}\n")
