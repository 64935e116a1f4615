"""`bestiary ask` and `bestiary chat`: a trained run, or published weights, about a picture and its marked regions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.quick_imports import quick_imports

if TYPE_CHECKING:
    from bestiary.inference.pictures import Mark
    from bestiary.inference.session import Chat, Session

_SIZES = {"point": (2, "2 numbers"), "box": (4, "4 numbers"), "stroke": (0, "4, 6, 8 ... numbers")}


def add_use(commands: Any) -> None:
    """Adds `ask` and `chat` to the console script."""
    ask: argparse.ArgumentParser = commands.add_parser("ask", help="ask a model about a picture and its marked regions")
    _add_source(ask)
    ask.add_argument("image", type=Path, help="JPEG, PNG or WebP; without a picture: chat")
    ask.add_argument(
        "--image", dest="more", action="append", default=[], type=Path, metavar="FILE", help="a further one; repeatable"
    )
    ask.add_argument("question", help='for example "What is <Mark 1>?"')
    _add_marks(ask)
    _add_settings(ask)
    ask.set_defaults(act=_ask)
    chat: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="ask it several questions, one a line",
        description="Each line of the standard input is a question that knows those before it; /undo forgets the last.",
    )
    _add_source(chat)
    chat.add_argument("--image", type=Path, help="the picture it is about; without one text alone")
    _add_marks(chat)
    _add_settings(chat)
    chat.set_defaults(act=_chat)


def mark_of(kind: str) -> Callable[[str], Mark]:
    """Reads a mark of that kind from numbers with commas between them."""

    def read(text: str) -> Mark:
        from bestiary.inference import pictures

        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        size, told = _SIZES[kind]
        if len(numbers) != size and (size or len(numbers) < 4 or len(numbers) % 2):
            raise argparse.ArgumentTypeError(f"{text!r} is not {told} with commas between them")
        mark: Mark = getattr(pictures, kind)(*numbers)
        return mark

    return read


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, help="run directory; an imported folder with a model.yaml; with --model other weights"
    )
    parser.add_argument("--model", metavar="NAME", help="the weights' model in conf/model, or a yaml of one's own")
    parser.add_argument("--scale", default="paper", help="the model's size, with --model (default: paper)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")


def _add_marks(parser: argparse.ArgumentParser) -> None:
    for kind, form in (("point", "X,Y"), ("box", "X0,Y0,X1,Y1"), ("stroke", "X0,Y0,X1,Y1,...")):
        parser.add_argument(
            f"--{kind}",
            dest="marks",
            action="append",
            default=[],
            type=mark_of(kind),
            metavar=form,
            help="pixels; repeatable, numbered in order",
        )
    parser.add_argument("--fractions", action="store_true", help="marks are fractions of the picture, not pixels")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", action="store_true", help="keep tags of names and boxes in the answer (Monkey)")
    parser.add_argument("--verbatim", action="store_true", help="put no words of the model's own around it (Monkey)")
    parser.add_argument("--beams", type=int, default=1, help="search with so many hypotheses (temperature 0)")


def _session(args: argparse.Namespace, images: Sequence[Path]) -> Session:
    """The model of the command line; the pictures are looked at first, because only here their names are known."""
    with quick_imports():
        from bestiary.inference.pictures import check_file
        from bestiary.inference.session import Session, Settings

    for image in images:
        check_file(image)
    chosen = {"seed": args.seed, "num_beams": args.beams, "places": args.places, "verbatim": args.verbatim}
    settings = Settings(args.max_new_tokens, args.temperature, args.top_p, **chosen)
    if args.model is None and not (args.run / "model.yaml").is_file():
        if args.run.is_file():
            raise ValueError(f"{args.run} is a file of weights; say what they are: --model NAME, and --scale")
        return Session.from_run(args.run, device=args.device, settings=settings)
    return Session.from_weights(args.run, model=args.model, scale=args.scale, device=args.device, settings=settings)


def _ask(args: argparse.Namespace) -> None:
    images = [args.image, *args.more]
    answer = _session(args, images).respond(images, args.question, args.marks, frame=_frame(args))
    sys.stdout.write(f"{answer}\n")


def _chat(args: argparse.Namespace) -> None:
    images = [] if args.image is None else [args.image]
    chat = _session(args, images).start(args.image, args.marks, frame=_frame(args))
    for line in sys.stdin:
        try:
            _answer(chat, line.strip())
        except ValueError as error:  # a bad question must not end the conversation
            sys.stderr.write(f"error: {error}\n")


def _answer(chat: Chat, line: str) -> None:
    if line == "/undo":
        chat.undo()
    elif line:
        for piece in chat.pieces(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


def _frame(args: argparse.Namespace) -> Any:
    return "fractions" if args.fractions else "pixels"
