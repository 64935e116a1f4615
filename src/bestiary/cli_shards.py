"""`bestiary shards`: write sources of shards from published annotations, check them, count them, look at them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary import addresses

if TYPE_CHECKING:
    from data_modules.inspection.stats import Measure
    from data_modules.shards import ShardSet
    from data_modules.writing import Report

MAX_PROBLEMS = 200
"""Lines of `check` for one source; the rest is counted."""


def add_shards(commands: Any) -> None:
    """Adds `shards write|check|stats|preview|index` to the console script, and `check` as their short form."""
    shards: argparse.ArgumentParser = commands.add_parser("shards", help="write, check, count and look at shards")
    inner = shards.add_subparsers(required=True, metavar="ACT")
    _add_write(inner)
    for parent, name in ((inner, "check"), (commands, "check")):
        _add_check(parent.add_parser(name, help="verify sources against their hashes and their index"))
    _add_stats(inner)
    _add_preview(inner)
    index = inner.add_parser("index", help="index WebDataset tars of others once, so that training starts at once")
    index.add_argument("pattern", help="folder of tars, one tar, or a pattern as part-{00000..00099}.tar; path or URL")
    _add_meaning(index)
    index.set_defaults(act=_index)


def _add_write(parent: Any) -> None:
    write: argparse.ArgumentParser = parent.add_parser(
        "write",
        help="turn published annotations into shards",
        description="Repeat the same command after a kill: it goes on where it was, or finds everything done.",
    )
    write.add_argument("format", metavar="FORMAT", help="kind of the annotations; 'list' names the known ones")
    write.add_argument("annotations", type=Path, metavar="ANNOTATIONS", nargs="?", help="file or folder")
    write.add_argument("--images", type=Path, metavar="DIR", help="folder that the annotations' picture names start in")
    write.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards")
    write.add_argument("--source", metavar="NAME", help="name of the source")
    write.add_argument("--domain", metavar="D", help="domain of samples that name none, such as natural or document")
    write.add_argument("--licence", default="", help="what source.json says of the data")
    write.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="records dealt to one shard")
    write.add_argument("--workers", type=int, metavar="N", help="processes; as many as cores by default")
    write.add_argument("--max-rejected", type=float, metavar="SHARE", help="rejected records allowed; 0.01 by default")
    write.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    write.add_argument("--overwrite", action="store_true", help="replace what the folder holds, and start from nothing")
    write.add_argument("--option", action="append", default=[], metavar="K=V", help="of the format; repeatable")
    write.set_defaults(act=_write)


def _add_check(check: argparse.ArgumentParser) -> None:
    _add_sources(check)
    check.add_argument("--decode", action="store_true", help="decode every picture, too")
    check.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    check.set_defaults(act=_check)


def _add_stats(parent: Any) -> None:
    stats: argparse.ArgumentParser = parent.add_parser("stats", help="count samples, lengths, pictures and marks")
    _add_sources(stats)
    stats.add_argument("--out", type=Path, metavar="DIR", help="folder of stats.json and stats.png")
    stats.add_argument(
        "--processor", type=Path, metavar="PATH", help="run directory (or tokenizer file): count tokens, too"
    )
    stats.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    stats.set_defaults(act=_stats)


def _add_preview(parent: Any) -> None:
    preview: argparse.ArgumentParser = parent.add_parser("preview", help="a page of samples with their marks drawn")
    _add_sources(preview)
    preview.add_argument("--out", type=Path, required=True, metavar="PAGE.html")
    preview.add_argument("--num", type=int, default=24, metavar="N", help="samples, drawn by --seed")
    preview.add_argument("--seed", type=int, default=0)
    preview.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="these samples instead")
    preview.set_defaults(act=_preview)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder or URL of shards")
    _add_meaning(parser)


def _add_meaning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="bestiary", metavar="F", help="of somebody else's tars: caption or llava")
    parser.add_argument("--domain", metavar="D", help="domain of samples that name none, in somebody else's tars")


def _write(args: argparse.Namespace) -> None:
    from data_modules.adapters import described, make_adapter
    from data_modules.adapters.reading import refuse_pipe
    from data_modules.writing import Plan, write_source
    from data_modules.writing.plan import MAX_REJECTED, available_cores
    from data_modules.writing.progress import shown

    if args.format == "list":
        for name, summary, options in described():
            sys.stdout.write(f"{name:<12} {summary}\n")
            if options:
                defaults = " ".join(f"{option}={value}" for option, value in options.items())
                sys.stdout.write(f"{'':<12} --option {defaults}\n")
        return
    for name in ("annotations", "out", "source"):
        if getattr(args, name) is None:
            raise ValueError(f"{'ANNOTATIONS' if name == 'annotations' else f'--{name}'} is missing; give it")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name the folder that the shards go into")
    _check_parents(args.out)
    refuse_pipe(args.annotations)
    adapter = make_adapter(
        args.format,
        args.annotations,
        args.images,
        source=args.source,
        domain=args.domain,
        options=_options(args.option),
    )
    plan = Plan(
        folder=args.out,
        source=args.source,
        licence=args.licence,
        samples_per_shard=args.samples_per_shard,
        workers=available_cores() if args.workers is None else args.workers,
        max_rejected=MAX_REJECTED if args.max_rejected is None else args.max_rejected,
        overwrite=args.overwrite,
        limit=args.limit,
    )
    try:
        with shown(sys.stderr) as watch:
            report = write_source(adapter, plan, watch=watch)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; run the same command again to go on with {args.out}\n")
        raise SystemExit(130) from None
    sys.stdout.write(_written(report))


def _options(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--option {text!r}; write it as name=value")
        options[name] = value
    return options


def _written(report: Report) -> str:
    again = {"written": "", "unchanged": " (finished already, nothing to do)"}[report.state]
    lines = [
        f"{report.folder}: {_count(report.samples, 'sample')} in {_count(report.shards, 'shard')}, "
        f"{report.bytes / 1e6:,.1f} MB{again}"
    ]
    if report.resumed:
        lines.append(f"  {report.resumed:,} of {report.records:,} records were done by an earlier attempt")
    if report.rejected:
        lines.append(
            f"  {report.rejected:,} rejected of {report.records:,} records, see {report.folder}/rejected.jsonl"
        )
        ordered = sorted(report.kinds.items(), key=lambda item: -item[1])
        lines += [f"  {count:>9,}  {kind}" for kind, count in ordered]
    return "\n".join(lines) + "\n"


def _opened(args: argparse.Namespace) -> Iterator[tuple[str, ShardSet]]:
    for location in args.sources:
        yield location, _open(location, args)


def _open(location: str, args: argparse.Namespace) -> ShardSet:
    from data_modules.shards import open_source

    shards = open_source(location, format=args.format, domain=args.domain)
    if args.domain is not None and (not shards.is_foreign or args.format == "bestiary"):
        raise ValueError(
            f"{addresses.shown(location)}: its samples name their domains themselves; leave out --domain {args.domain}"
        )
    return shards


def _check(args: argparse.Namespace) -> None:
    from data_modules.inspection.check import check_source

    _check_workers(args)
    num_problems = num_sources = num_samples = num_foreign = 0
    unread = ""
    for location, shards in _opened_or_problem(args):
        num_sources += 1
        place = addresses.shown(location)
        if isinstance(shards, str):
            sys.stderr.write(f"{place}: {shards}\n" if place not in shards else f"{shards}\n")
            num_problems += 1
            continue
        found = 0
        for found, problem in enumerate(check_source(shards, decode=args.decode, workers=args.workers), start=1):
            if found <= MAX_PROBLEMS:
                sys.stderr.write(f"{problem}\n")
        if found > MAX_PROBLEMS:
            sys.stderr.write(f"{place}: {found - MAX_PROBLEMS} more problems\n")
        num_problems += found
        num_samples += len(shards)
        num_foreign += shards.is_foreign
        if found and (not shards.domains or (args.format != "bestiary" and found >= len(shards))):
            unread = f"; nothing of {place} can be read with --format {args.format} (bestiary, caption, llava)"
    if num_problems:
        counts = f"{_count(num_problems, 'problem')} in {_count(num_sources, 'source')}"
        raise ValueError(f"{counts}{unread}; write or copy the shards named above again")
    whole = "source is" if num_sources == 1 else "sources are"
    since = "; tars of others are as they were when they were indexed" if num_foreign else ""
    sys.stdout.write(f"{num_sources} {whole} whole, {num_samples:,} samples{since}\n")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _opened_or_problem(args: argparse.Namespace) -> Iterator[tuple[str, ShardSet | str]]:
    for location in args.sources:
        try:
            yield location, _open(location, args)
        except (ValueError, OSError) as error:
            yield location, str(error)


def _stats(args: argparse.Namespace) -> None:
    from data_modules.inspection.stats import Tally, gather, refusals, table

    _check_workers(args)
    if args.out is not None:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out} is a file; name the folder that stats.json and stats.png go into")
        _check_parents(args.out)
        if find_spec("matplotlib") is None:  # said before an hour of counting
            raise ValueError("stats --out draws with matplotlib, which is not installed; pip install 'bestiary[plots]'")
        from data_modules.inspection.plots import draw
    measure = None if args.processor is None else _measure(args.processor)
    tallies: dict[str, Tally] = {}
    for location, shards in _opened(args):
        name = shards.name if shards.name not in tallies else addresses.shown(location)
        if name in tallies:  # one address with two signatures, or given twice
            name = f"{name} ({len(tallies) + 1})"
        tallies[name] = gather(shards, measure=measure, workers=args.workers)
    _show_table(table(tallies))
    sys.stdout.writelines(f"{line}\n" for line in refusals(tallies))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {name: tally.summary() for name, tally in tallies.items()}
        (args.out / "stats.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(tallies, args.out / "stats.png")
        sys.stdout.write(f"{args.out / 'stats.json'}, {args.out / 'stats.png'}\n")


def _check_workers(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}; it must be at least 1")


def _check_parents(out: Path) -> None:
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--out {out}: {parent} is a file, no folder; name another place")


def _show_table(rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, title="medians of characters, tokens and picture sizes")
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("source", "domains") else "right", overflow="fold")
    for row in rows[1:]:
        shown.add_row(*(cell.replace("[", "\\[") for cell in row))
    width = None if sys.stdout.isatty() else 140
    Console(file=sys.stdout, width=width, highlight=False).print(shown)


def _measure(path: Path) -> Measure:
    if not path.exists():
        raise ValueError(f"--processor {path} does not exist; name a run directory or a tokenizer file")
    if path.is_file():
        from bestiary.text.tokenizer import load_tokenizer

        return TextLengths(load_tokenizer(path).encode)
    from bestiary.compose import load_run
    from bestiary.saved_run import build_pieces

    processor = build_pieces(load_run(path), on_meta=True).processor
    lengths: Measure | None = getattr(processor, "lengths", None)
    if lengths is None:
        raise ValueError(f"--processor {path}: its processor cannot tell lengths; name a tokenizer file instead")
    return lengths


class TextLengths:
    """Counts the text alone, turn by turn: no template, no pictures. encode: text to ids."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self.encode = encode

    def __call__(self, sample: Any) -> Any:
        """Tokens of all turns; targets are those of the answers."""
        from bestiary.schema import Lengths

        counts = [(turn.role, len(self.encode(turn.text))) for turn in sample.turns]
        targets = sum(count for role, count in counts if role == "assistant")
        return Lengths(tokens=sum(count for _, count in counts), views=len(sample.images), targets=targets)


def _preview(args: argparse.Namespace) -> None:
    from data_modules.inspection.choosing import choose
    from data_modules.inspection.preview import page
    from data_modules.writer import write_atomically

    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name the page itself, such as {args.out / 'preview.html'}")
    _check_parents(args.out)
    opened = list(_opened(args))
    shown = choose([shards for _, shards in opened], num=args.num, seed=args.seed, keys=args.keys)
    names = ", ".join(dict.fromkeys(shards.name for _, shards in opened))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, page(shown, title=names).encode())
    sys.stdout.write(f"{args.out}: {len(shown)} samples; open it in a browser\n")


def _index(args: argparse.Namespace) -> None:
    from data_modules.shards import open_source

    shards = open_source(args.pattern, format=args.format, domain=args.domain)
    size = sum(shard.bytes for shard in shards.shards)
    sys.stdout.write(
        f"{addresses.shown(args.pattern)}: {_count(len(shards), 'sample')} in {_count(len(shards.shards), 'shard')}, "
        f"{size / 1e6:,.1f} MB, domains {', '.join(shards.domains)}\n"
    )
