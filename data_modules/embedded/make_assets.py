"""Makes the committed files of `assets/` from the packages they come from; never needed to build or train.

The origins are listed in `assets/ATTRIBUTIONS.md`. Two steps in an empty virtual environment:

    pip install numpy pillow fonttools matplotlib==3.11.2 scikit-image==0.26.0 scikit-learn==1.9.1 qtawesome==1.4.2
    npm pack emoji-datasource-twitter@16.0.0 @fontsource/roboto@5.3.0 @fontsource/ibm-plex-mono@5.3.0
    python -m data_modules.embedded.make_assets --npm <folder of the .tgz files> --out data_modules/embedded/assets
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import json
import logging
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

SIDE_PX = 64
"""Side of one object picture on the sheet: the size the origin ships."""
SHEET_COLUMNS = 6
PHOTO_PX = 400
"""Longest side of a background photo."""

# our one-word name -> short_name of the emoji data set
OBJECTS = {
    "dog": "dog",
    "apple": "apple",
    "car": "car",
    "tree": "evergreen_tree",
    "ball": "soccer",
    "pig": "pig",
    "banana": "banana",
    "boat": "boat",
    "cake": "birthday",
    "umbrella": "umbrella",
    "frog": "frog",
    "pizza": "pizza",
    "plane": "airplane",
    "guitar": "guitar",
    "crown": "crown",
    "panda": "panda_face",
    "grape": "grapes",
    "bike": "bike",
    "mushroom": "mushroom",
    "robot": "robot_face",
    "lion": "lion_face",
    "carrot": "carrot",
    "gift": "gift",
    "penguin": "penguin",
    "fish": "tropical_fish",
    "burger": "hamburger",
    "drum": "drum_with_drumsticks",
    "butterfly": "butterfly",
    "hat": "tophat",
    "cactus": "cactus",
    "whale": "whale",
    "donut": "doughnut",
    "bee": "bee",
    "teapot": "teapot",
    "crab": "crab",
    "melon": "watermelon",
}

# our name -> name in the charmap of Material Design Icons 6.9.96
ICONS = {
    "home": "home",
    "user": "account",
    "gear": "cog",
    "mail": "email",
    "search": "magnify",
    "bell": "bell",
    "lock": "lock",
    "cart": "cart",
    "calendar": "calendar",
    "camera": "camera",
    "mic": "microphone",
    "play": "play",
    "pause": "pause",
    "wifi": "wifi",
    "cloud": "cloud",
    "folder": "folder",
    "pin": "map-marker",
    "flag": "flag",
    "music": "music-note",
    "like": "thumb-up",
    "clock": "clock-outline",
    "shield": "shield",
    "printer": "printer",
    "star": "star",
    "heart": "heart",
    "eye": "eye",
    "phone": "phone",
    "key": "key",
    "headset": "headphones",
    "puzzle": "puzzle",
    "leaf": "leaf",
    "trash": "trash-can",
    "wrench": "wrench",
    "bluetooth": "bluetooth",
    "truck": "truck",
    "power": "power",
}

# file in the data folder of scikit-image (or, "sklearn:", in the image folder of scikit-learn) -> our file
PHOTOS = {
    "camera.png": "camera",
    "astronaut.png": "astronaut",
    "brick.png": "brick",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "chelsea.png": "chelsea",
    "coffee.png": "coffee",
    "coins.png": "coins",
    "rocket.jpg": "rocket",
    "hubble_deep_field.jpg": "hubble",
    "sklearn:china.jpg": "china",
    "sklearn:flower.jpg": "flower",
}

FORM = "095565098984"
"""A run of digits that stands once, 30 places from the start, on every form of the digits set."""


def package_dir(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"package {name} is not installed; the docstring of this file lists what to install")
    return Path(spec.origin).parent


def dump(path: Path, value: Any) -> None:
    """Write JSON with one stable layout."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def make_objects(npm: Path, out: Path) -> None:
    """Sheet of named object pictures (Twemoji) and their names in sheet order."""
    with tarfile.open(next(npm.glob("emoji-datasource-twitter-*.tgz"))) as tar:

        def read(member: str) -> bytes:
            handle = tar.extractfile(f"package/{member}")
            assert handle is not None, member
            return handle.read()

        entries = {entry["short_name"]: entry for entry in json.loads(read("emoji.json"))}
        rows = math.ceil(len(OBJECTS) / SHEET_COLUMNS)
        sheet = Image.new("RGBA", (SHEET_COLUMNS * SIDE_PX, rows * SIDE_PX))
        for place, short_name in enumerate(OBJECTS.values()):
            picture = Image.open(io.BytesIO(read(f"img/twitter/64/{entries[short_name]['image']}"))).convert("RGBA")
            sheet.paste(picture, (place % SHEET_COLUMNS * SIDE_PX, place // SHEET_COLUMNS * SIDE_PX))
    sheet.save(out / "objects.png", optimize=True)
    points = {name: entries[short]["unified"] for name, short in OBJECTS.items()}
    dump(out / "objects.json", {"side_px": SIDE_PX, "columns": SHEET_COLUMNS, "code_points": points})


def make_icons(out: Path) -> None:
    """A font with the chosen icons only, and their code points."""
    fonts = package_dir("qtawesome") / "fonts"
    charmap = json.loads((fonts / "materialdesignicons6-webfont-charmap-6.9.96.json").read_text())
    points = {name: int(charmap[icon], 16) for name, icon in ICONS.items()}
    subset_font(
        fonts / "materialdesignicons6-webfont-6.9.96.ttf", out / "icons.ttf", list(points.values()), "Embedded Icons"
    )
    dump(out / "icons.json", {"code_points": points})


def subset_font(source: Path | io.BytesIO, target: Path, points: list[int], name: str) -> None:
    """Keep the given code points; the subset gets a name of its own, as reserved font names ask."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    font = TTFont(source, recalcTimestamp=False)
    options = subset.Options(hinting=False, layout_features=[], name_IDs=[0, 1, 2, 3, 4, 6, 13, 14], glyph_names=False)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=points)
    cutter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 3, 4):
            record.string = name
        elif record.nameID == 6:
            record.string = name.replace(" ", "")
    font.flavor = None
    font.save(target)


def make_fonts(npm: Path, out: Path) -> None:
    """Printable ASCII of five text fonts."""
    ascii_points = list(range(32, 127))
    dejavu = package_dir("matplotlib") / "mpl-data" / "fonts" / "ttf"
    for stem, name in (("DejaVuSans-Bold", "sans"), ("DejaVuSansMono-Bold", "mono"), ("DejaVuSerif-Bold", "serif")):
        subset_font(dejavu / f"{stem}.ttf", out / f"font-{name}.ttf", ascii_points, f"Embedded {name.title()}")
    for family, weight, name in (("roboto", 700, "grotesk"), ("ibm-plex-mono", 600, "typewriter")):
        with tarfile.open(next(npm.glob(f"fontsource-{family}-*.tgz"))) as tar:
            handle = tar.extractfile(f"package/files/{family}-latin-{weight}-normal.woff")
            assert handle is not None, family
            subset_font(io.BytesIO(handle.read()), out / f"font-{name}.ttf", ascii_points, f"Embedded {name.title()}")


def copy_licences(npm: Path, out: Path) -> None:
    """The font licences, which ask to travel with the fonts."""
    dejavu = package_dir("matplotlib") / "mpl-data" / "fonts" / "ttf" / "LICENSE_DEJAVU"
    (out / "LICENSE-DejaVu.txt").write_bytes(dejavu.read_bytes())
    texts = []
    for family in ("roboto", "ibm-plex-mono"):
        with tarfile.open(next(npm.glob(f"fontsource-{family}-*.tgz"))) as tar:
            handle = tar.extractfile("package/LICENSE")
            assert handle is not None, family
            texts.append(handle.read().decode())
    heads = [text.split("\n", 1)[0] for text in texts]
    (out / "LICENSE-OFL.txt").write_text("\n".join([*heads[:-1], texts[-1]]))


def make_digits(out: Path) -> None:
    """Sheet of the 1,797 digits, grey 0..255 (ink white), with label and form of each in file order."""
    folder = package_dir("sklearn") / "datasets" / "data"
    with gzip.open(folder / "digits.csv.gz") as handle:
        table = np.loadtxt(handle, delimiter=",")
    pixels, labels = table[:, :64].reshape(-1, 8, 8), "".join(str(int(label)) for label in table[:, 64])
    columns = 64
    rows = math.ceil(len(pixels) / columns)
    sheet = np.zeros((rows * 8, columns * 8), np.uint8)
    for place, digit in enumerate(pixels):
        y, x = place // columns * 8, place % columns * 8
        sheet[y : y + 8, x : x + 8] = np.minimum(digit * 16, 255)
    Image.fromarray(sheet).save(out / "digits.png", optimize=True)
    starts = [i - 30 for i in range(len(labels)) if labels.startswith(FORM, i)]
    dump(out / "digits.json", {"side_px": 8, "columns": columns, "labels": labels, "form_starts": starts})


def make_photos(out: Path) -> None:
    """Background photos, at most `PHOTO_PX` long, JPEG."""
    skimage, sklearn = package_dir("skimage") / "data", package_dir("sklearn") / "datasets" / "images"
    for file, name in PHOTOS.items():
        path = sklearn / file.removeprefix("sklearn:") if file.startswith("sklearn:") else skimage / file
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
        photo.save(out / f"photo-{name}.jpg", quality=85, optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, required=True, help="folder with the packed npm packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    make_objects(args.npm, args.out)
    make_icons(args.out)
    make_fonts(args.npm, args.out)
    copy_licences(args.npm, args.out)
    make_digits(args.out)
    make_photos(args.out)
    log.info("assets: %d bytes", sum(path.stat().st_size for path in args.out.iterdir()))


if __name__ == "__main__":
    main()
