"""What is said about a picture without marks, and without any picture: captions, questions, boxes, small texts.

Prompts and forms are SPHINX's (reference/sphinx.md 9): a short answer is asked for with SHORT_ANSWER, a box with
REFERRING, and boxes in answers are fractions of the picture padded to a square, here with two decimals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from .scene import Scene, Thing, is_heldout_pair
from .tasks import definite, phrase, where

SHORT_ANSWER = "{}\nAnswer the question using a single word or phrase."
"""Prompt of every short-answer set (reference/sphinx.md 9, eval_mm)."""
REFERRING = "Please provide the bounding box coordinate of the region this sentence describes: {}."
"""Prompt of RefCOCO, RefCOCO+ and RefCOCOg (reference/sphinx.md 9, eval_mm)."""
GROUNDED = "Please describe the image with the box of each region."
"""Ours: the published prompt of the grounding captions is not in the evaluation's configuration."""
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
NAMES = {"object": "an object", "icon": "an icon", "text": "a text", "digit": "a digit", "chart": "a chart"}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question, without any instruction, and its answer. kind: of which sort it is."""

    kind: str
    question: str
    answer: str


def square_box(scene: Scene, thing: Thing) -> tuple[float, ...]:
    """The thing's box in fractions of the picture padded to a square (offsets rounded down, as the reference pads)."""
    width, height = scene.image.size
    side = max(width, height)
    pads = (side - width) // 2, (side - height) // 2
    return tuple((value + pads[i % 2]) / side for i, value in enumerate(thing.box))


def box_text(scene: Scene, thing: Thing) -> str:
    """`[x1,y1,x2,y2]` with two decimals."""
    return f"[{','.join(f'{value:.2f}' for value in square_box(scene, thing))}]"


def in_reading_order(scene: Scene) -> list[Thing]:
    """The things row by row; two are in one row when their middles are less than a fifth of the picture apart."""
    rows: list[list[Thing]] = []
    for thing in sorted(scene.things, key=lambda thing: thing.center[1]):
        if rows and thing.center[1] - rows[-1][0].center[1] < 0.2 * scene.image.height:
            rows[-1].append(thing)
        else:
            rows.append([thing])
    return [thing for row in rows for thing in sorted(row, key=lambda thing: thing.center[0])]


def caption(scene: Scene) -> str:
    """What is where, in reading order: `a dog, top left; a cup, bottom right`."""
    return "; ".join(f"{phrase(thing)}, {where(scene, thing)}" for thing in in_reading_order(scene))


def grounded_caption(scene: Scene) -> str:
    """What is where, each phrase with its box: `<p>a dog</p>[0.12,0.30,0.45,0.71] ...`."""
    return " ".join(f"<p>{phrase(thing)}</p>{box_text(scene, thing)}" for thing in in_reading_order(scene))


# Short answers


def ask_exists(rng: Random, scene: Scene, strangers: Sequence[Thing]) -> Exchange:
    """Whether the picture has a thing; half the time it is a thing of another picture of the domain."""
    labels = {thing.label for thing in scene.things}
    absent = [thing for thing in strangers if thing.label not in labels]
    asked = rng.choice(absent) if absent and rng.random() < 0.5 else rng.choice(scene.things)
    return Exchange("exists", f"Is there {phrase(asked)} in the image?", "Yes" if asked.label in labels else "No")


def ask_where(rng: Random, scene: Scene, strangers: Sequence[Thing]) -> Exchange:
    """In which ninth of the picture a thing lies."""
    thing = rng.choice(scene.things)
    return Exchange("where", f"Where is {definite(thing)} in the image?", where(scene, thing))


def ask_what(rng: Random, scene: Scene, strangers: Sequence[Thing]) -> Exchange:
    """What lies in a ninth of the picture that holds one thing; asks where if there is none such."""
    places = [where(scene, thing) for thing in scene.things]
    alone = [thing for thing, place in zip(scene.things, places, strict=True) if places.count(place) == 1]
    if not alone:
        return ask_where(rng, scene, strangers)
    thing = rng.choice(alone)
    question = "What does the text in the {} say?" if thing.kind == "text" else "What is in the {} of the image?"
    return Exchange("what", question.format(where(scene, thing)), thing.label)


def ask_count(rng: Random, scene: Scene, strangers: Sequence[Thing]) -> Exchange:
    """How many things the picture has."""
    return Exchange("count", "How many regions are in the image?", COUNTS[len(scene.things)])


ASKS: tuple[Callable[[Random, Scene, Sequence[Thing]], Exchange], ...] = (
    ask_exists, ask_exists, ask_where, ask_what, ask_what, ask_count
)  # fmt: skip


def questions(rng: Random, scene: Scene, strangers: Sequence[Thing], count: int) -> list[Exchange]:
    """Different questions about a picture. strangers: things of another picture, for questions to be denied."""
    found: list[Exchange] = []
    for _ in range(20):
        exchange = rng.choice(ASKS)(rng, scene, strangers)
        if all(exchange.question != other.question for other in found):
            found.append(exchange)
        if len(found) == count:
            break
    return found


# Texts without a picture


def draw_pair(rng: Random, labels: Sequence[tuple[str, str]], *, is_heldout: bool) -> tuple[Thing, Thing]:
    """Two things, seen by name alone, whose labels may stand together in the split. labels: (label, kind)."""
    while True:
        a, b = (Thing(label, kind, (0, 0, 1, 1)) for label, kind in rng.sample(labels, 2))
        if is_heldout_pair(a.label, b.label) == is_heldout:
            return a, b


def verb(thing: Thing) -> str:
    """`is`, or `are` for bars."""
    return "are" if thing.kind == "chart" and thing.label.endswith("s") else "is"


def statement(a: Thing, side: str, b: Thing) -> str:
    """`the dog is left of the cup`."""
    return f"{definite(a)} {verb(a)} {side} {definite(b)}"


def document(rng: Random, a: Thing, b: Thing) -> str:
    """A text of what follows from where two things lie and from what they are."""
    side = rng.choice(tuple(OPPOSITES))
    told = [statement(a, side, b), statement(b, OPPOSITES[side], a)]
    facts = [f"{definite(thing)} {verb(thing)} {NAMES[thing.kind]}" for thing in rng.sample((a, b), 2)]
    return "; ".join([*told, *facts]) + "."


def text_exchange(rng: Random, a: Thing, b: Thing) -> Exchange:
    """A question about two things that the question itself tells of: which lies where, or how they lie."""
    side = rng.choice(tuple(OPPOSITES))
    told = statement(a, side, b)
    if rng.random() < 0.5:
        thing, place = (a, side) if rng.random() < 0.5 else (b, OPPOSITES[side])
        other = b if thing is a else a
        return Exchange("which", f"{told}. What is {place} {definite(other)}?", thing.label)
    return Exchange("side", f"{told}. Where is {definite(b)}?", f"{OPPOSITES[side]} {definite(a)}")
