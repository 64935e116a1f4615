"""The experts by the names a user gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from bestiary.description.levels import Experts

NAMES = ("captions", "regions", "segments", "ocr")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where published models lie, in transformers' form; None where no expert needs one.

    captioner, matcher: of BLIP-2. regions: of Florence-2. masks: of Segment Anything.
    """

    captioner: Path | None = None
    matcher: Path | None = None
    regions: Path | None = None
    masks: Path | None = None


def chosen(text: str) -> tuple[str, ...]:
    """The names in "ocr,captions"; ValueError names the nearest of an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"expert {name!r} is unknown{meant}; there are {', '.join(NAMES)}")
    if not names:
        raise ValueError(f"no expert is chosen; name some of {', '.join(NAMES)}")
    return names


def load(names: Sequence[str], folders: Folders, *, device: str = "cpu", dtype: str = "float32") -> Experts:
    """The named experts; regions and segments with the matcher that scores them.

    ValueError where one of them needs a folder that is not given, and where one is given that none needs.
    """
    _check(names, folders)
    texts = None
    if "ocr" in names:
        from bestiary.description.ocr import RapidReader

        texts = RapidReader()
    if folders == Folders():
        return Experts(texts=texts)
    from bestiary.description.blip2 import SEGMENT_CAPTION, Blip2Captioner, Blip2Matcher
    from bestiary.description.florence import FlorenceRegions
    from bestiary.description.model_folder import ModelFolder
    from bestiary.description.sam import SamMasks

    def opened(path: Path | None) -> ModelFolder | None:
        return None if path is None else ModelFolder(path, device=device, dtype=dtype)

    captioner, matcher, regions, masks = map(
        opened, (folders.captioner, folders.matcher, folders.regions, folders.masks)
    )
    return Experts(
        captions=Blip2Captioner(captioner) if captioner and "captions" in names else None,
        regions=FlorenceRegions(regions) if regions else None,
        masks=SamMasks(masks) if masks else None,
        segment_captions=Blip2Captioner(captioner, settings=SEGMENT_CAPTION) if captioner and masks else None,
        matcher=Blip2Matcher(matcher) if matcher else None,
        texts=texts,
    )


_NEEDS = {"captions": ("captioner",), "regions": ("regions", "matcher"), "segments": ("masks", "captioner", "matcher")}


def _check(names: Sequence[str], folders: Folders) -> None:
    needed = {folder: name for name in names for folder in _NEEDS.get(name, ())}
    for folder in fields(Folders):
        path = getattr(folders, folder.name)
        if path is None and folder.name in needed:
            raise ValueError(
                f"expert {needed[folder.name]!r} needs --{folder.name} FOLDER: a published model in transformers' form"
            )
        if path is not None and folder.name not in needed:
            raise ValueError(f"--{folder.name} {path} has no effect: none of {', '.join(names)} uses it; leave it out")
