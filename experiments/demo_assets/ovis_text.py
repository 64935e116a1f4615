"""Texts for the language model of Ovis' demo: maps in words, what is said about them, questions. No pictures.

A map is sixteen words, row by row, each the thing in a cell of a four by four grid or a point; it stands in brackets
where a picture's patches will stand between their two marks. Things, phrases and questions are those of the embedded
data, in layouts drawn here; pairs of names that only held-out pictures have never stand together.
"""

from __future__ import annotations

from random import Random

from PIL import Image

from data_modules.embedded.assets import icon_names, object_names
from data_modules.embedded.plain import DESCRIBE, LOOK_PLAIN
from data_modules.embedded.plain_tasks import SHORT_ANSWER, caption, draw_pair, questions, text_exchange
from data_modules.embedded.scene import Scene, Thing, draw_labels, draw_size, place
from data_modules.embedded.tasks import where

GRID = 4
"""Cells a side: the patch grid of the demo's vision encoder."""
EMPTY = "."
SEEN = 0.2
"""Share of a cell that a thing must cover to be named there; the cell of its middle always names it."""
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
"""As Ovis 1.0's Qwen format opens every conversation."""
QUESTIONS = 6
"""Questions about one map."""
LABELS = tuple((name, "object") for name in object_names()) + tuple((name, "icon") for name in icon_names())
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

Piece = tuple[str, bool]
"""Text, and whether it is learned."""


def draw_scene(rng: Random) -> Scene:
    """Two or three things somewhere on a picture that nobody draws."""
    kind, pool, sizes = rng.choice(
        [("object", object_names(), LOOK_PLAIN.object_u), ("icon", icon_names(), LOOK_PLAIN.icon_u)]
    )
    width, height = draw_size(rng, LOOK_PLAIN)
    unit = max(width, height) / 128
    while True:
        count = rng.randint(*LOOK_PLAIN.num_objects)
        extents = [(rng.uniform(0.7, 1) * longest, longest) for longest in (rng.uniform(*sizes) for _ in range(count))]
        boxes = [tuple(unit * side for side in rng.sample(pair, 2)) for pair in extents]
        corners = place(rng, (0, 0, width, height), [(w, h) for w, h in boxes], LOOK_PLAIN.gap_u * unit)
        if corners is not None:
            break
    labels = draw_labels(rng, [pool] * count, "train")
    things = tuple(
        Thing(label, kind, (x, y, x + w, y + h)) for label, (x, y), (w, h) in zip(labels, corners, boxes, strict=True)
    )
    return Scene(Image.new("1", (width, height)), things)


def map_things(scene: Scene) -> list[Thing | None]:
    """What the sixteen cells of a scene's map show, on the picture padded to a square."""
    width, height = scene.image.size
    side = max(width, height)
    dx, dy = (side - width) // 2, (side - height) // 2
    shown: list[Thing | None] = [None] * GRID**2
    best = [SEEN] * GRID**2
    for thing in scene.things:
        x0, y0, x1, y1 = (GRID * (v + d) / side for v, d in zip(thing.box, (dx, dy, dx, dy), strict=True))
        for cell in range(GRID**2):
            row, column = divmod(cell, GRID)
            cover = max(0.0, min(x1, column + 1) - max(x0, column)) * max(0.0, min(y1, row + 1) - max(y0, row))
            is_middle = column <= (x0 + x1) / 2 < column + 1 and row <= (y0 + y1) / 2 < row + 1
            if cover + is_middle > best[cell]:
                shown[cell], best[cell] = thing, cover + is_middle
    return shown


def map_words(scene: Scene) -> list[str]:
    """The sixteen words."""
    return [EMPTY if thing is None else thing.label for thing in map_things(scene)]


def map_places(scene: Scene) -> list[int | None]:
    """For every cell the number of the ninth of the picture that the middle of its thing lies in."""
    return [None if thing is None else PLACES.index(where(scene, thing)) for thing in map_things(scene)]


def map_text(scene: Scene) -> str:
    """The map in brackets."""
    return f"( {' '.join(map_words(scene))} )"


def turn(role: str, words: str, *, learned: bool = False) -> list[Piece]:
    """One turn of a conversation; of an answer its words and its end are learned."""
    return [(f"<|im_start|>{role}\n", False), (f"{words}<|im_end|>", learned), ("\n", False)]


FORMS = {"caption": 0.5, "description": 0.15, "questions": 0.3, "text": 0.05}
"""Kinds of texts and their shares."""


def text(rng: Random, form: str) -> tuple[list[Piece], Scene | None]:
    """One training text in pieces, and the scene whose map it begins with."""
    if form == "text":
        exchange = text_exchange(rng, *draw_pair(rng, LABELS, is_heldout=False))
        said = turn("user", exchange.question) + turn("assistant", exchange.answer, learned=True)
        return [(SYSTEM, False), *said], None
    scene = draw_scene(rng)
    shown = map_text(scene)
    if form == "caption":
        return [(f"{shown}'s caption: ", False), (caption(scene), True), ("<|endoftext|>", True)], scene
    asked = [(DESCRIBE, caption(scene))]
    if form == "questions":
        strangers = draw_scene(rng).things
        asked = [
            (SHORT_ANSWER.format(e.question) if rng.random() < 0.3 else e.question, e.answer)
            for e in questions(rng, scene, strangers, QUESTIONS)
        ]
    pieces: list[Piece] = [(SYSTEM, False)]
    for number, (question, answer) in enumerate(asked):
        pieces += turn("user", f"{shown} {question}" if number == 0 else question)
        pieces += turn("assistant", answer, learned=True)
    return pieces, scene
