"""`bestiary ovis words`: what an Ovis sees in a picture, as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_ovis(commands: Any) -> None:
    """Adds `ovis` to the console script."""
    ovis: argparse.ArgumentParser = commands.add_parser("ovis", help="look into a trained Ovis")
    inner = ovis.add_subparsers(required=True, metavar="COMMAND")
    words: argparse.ArgumentParser = inner.add_parser(
        "words",
        help="the visual words of a picture",
        description="Writes a picture: per patch the most probable words and their entropy, and the text near them.",
    )
    words.add_argument("run", type=Path, metavar="RUN", help="run directory, or an imported folder with a model.yaml")
    words.add_argument("image", type=Path, metavar="IMAGE")
    words.add_argument("--out", type=Path, default=Path("words.png"), help="the picture to write (words.png)")
    words.add_argument("--top", type=int, default=3, help="words a patch (3)")
    words.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    words.set_defaults(act=_words)


def _words(args: argparse.Namespace) -> None:
    from bestiary.inference.pictures import encoded
    from bestiary.saved_run import NODE, load_named, load_saved_run
    from bestiary.variants.ovis.words import lines, look
    from bestiary.variants.ovis.words_picture import draw

    image = encoded(args.image)
    load = load_named if (args.run / NODE).is_file() else load_saved_run
    pieces = load(args.run, device=args.device)
    found = look(pieces.model, pieces.processor, image, top=args.top)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw(found).save(args.out)
    except ValueError as error:  # of a suffix Pillow does not know
        raise ValueError(f"--out {args.out}: {error}; name a .png file") from error
    sys.stdout.writelines(f"{line}\n" for line in lines(found))
    sys.stdout.write(f"picture: {args.out}\n")
