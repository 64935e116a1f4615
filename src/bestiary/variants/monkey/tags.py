"""Qwen-VL's tags in a text: pictures, names (`<ref>`), boxes and quadrilaterals; and what is wrong with them.

Places are whole numbers from 0 to 1000 of the picture's sides. Source: reference/monkey.md, sections 1.5, 3.2 and 6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.schema import IMAGE_TAG

SCALE = 1000  # section 3.2
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
PLACES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""What an answer marks names and places with."""
_PICTURE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_PAIRED = re.compile(r"<(/?)(ref|box|quad)>")
_PLACED = re.compile(r"<(box|quad)>(.*?)</\1>", re.DOTALL)
_POINT = re.compile(r"\((-?\d+),(-?\d+)\)")
_NUM_POINTS = {"box": 2, "quad": 4}
_REPLY = re.compile(r"(?:<ref>(?P<ref>.*?)</ref>)?<box>(?P<box>.*?)</box>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NamedBox:
    """A box of an answer, (x0, y0, x1, y1) of 1000, and the name right before it, if any."""

    box: tuple[int, int, int, int]
    ref: str | None = None


def split_at_pictures(text: str) -> list[str]:
    """The text between its pictures, one piece more than there are pictures.

    A picture is `<image>`, or `<img>path</img>` as the published files have it; what the path says is not read.
    ValueError for a picture tag that is stray, unclosed or inside another.
    """
    plain = _PICTURE.sub(lambda match: match[0] if IMAGE_START in match[1] else IMAGE_TAG, text)
    for tag in (IMAGE_START, IMAGE_END, IMAGE_PAD):
        if tag in plain:
            at = plain.index(tag)
            raise ValueError(
                f"{tag} has no partner at {plain[max(0, at - 20) : at + 20]!r}; close the tag, or write {IMAGE_TAG} "
                "where a picture stands"
            )
    return plain.split(IMAGE_TAG)


def check_places(text: str) -> None:
    """Raise for a ref, box or quad that is not closed in order, and for places that are none or outside 0..1000."""
    is_open: str | None = None
    for match in _PAIRED.finditer(text):
        closes, name = match[1] == "/", match[2]
        if closes != (is_open == name):
            raise ValueError(f"{match[0]} has no partner in {_around(text, match.start())}; open and close every tag")
        if is_open is not None and not closes:
            raise ValueError(f"{match[0]} inside <{is_open}> in {_around(text, match.start())}; close that first")
        is_open = None if closes else name
    if is_open is not None:
        raise ValueError(f"<{is_open}> is not closed in {_around(text, text.rindex(f'<{is_open}>'))}; add </{is_open}>")
    for match in _PLACED.finditer(text):
        _check_points(match[1], match[2])


def _check_points(name: str, inside: str) -> None:
    points = [(int(x), int(y)) for x, y in _POINT.findall(inside)]
    wanted = _NUM_POINTS[name]
    if len(points) != wanted or ",".join(f"({x},{y})" for x, y in points) != inside:
        raise ValueError(f"<{name}>{inside[:60]}</{name}> is no place; write {wanted} points as (x,y), whole numbers")
    if outside := [number for point in points for number in point if not 0 <= number <= SCALE]:
        raise ValueError(
            f"<{name}>{inside}</{name}> has {outside[0]}, outside 0..{SCALE}; "
            f"places are thousandths of the picture's sides"
        )


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 20) : at + 20])


def boxes_of(reply: str) -> list[NamedBox]:
    """The boxes of an answer, each with the name that stands right before it; what is no box is left out."""
    found = []
    for match in _REPLY.finditer(reply):
        points = _POINT.findall(match["box"])
        if len(points) == _NUM_POINTS["box"]:
            (x0, y0), (x1, y1) = ((int(x), int(y)) for x, y in points)
            ref = match["ref"]
            found.append(NamedBox((x0, y0, x1, y1), None if ref is None else ref.strip()))
    return found


def write_box(name: str, boxes: Sequence[Sequence[int]]) -> str:
    """A name and its boxes as text."""
    written = "".join(f"<box>({x0},{y0}),({x1},{y1})</box>" for x0, y0, x1, y1 in boxes)
    return f"<ref>{name}</ref>{written}"


def numbered_pictures(count: int) -> str:
    """What stands before a question about several pictures that it speaks of as "Picture 1" ... (section 6)."""
    return "".join(f"Picture {number}:{IMAGE_TAG}\n" for number in range(1, count + 1))
