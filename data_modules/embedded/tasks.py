"""What is asked about a picture: marks, questions and true answers in the wording of Draw-and-Understand.

Points are spoken of as `Mark n`, boxes and strokes as `Region n`; label answers have no brackets, the others have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from bestiary.schema import Region, Turn

from .scene import Scene, Thing

Kind = Literal["point", "box", "stroke"]
KINDS: tuple[Kind, ...] = ("point", "box", "stroke")

TASKS_OF_DOMAIN: Mapping[str, tuple[str, ...]] = {
    "natural": ("label", "caption", "relation", "qa"),
    "screenshot": ("label", "caption", "relation", "qa"),
    "multi_panel": ("label", "caption", "relation", "qa"),
    "document": ("ocr", "caption", "relation", "qa"),
}

INSTRUCTIONS = {
    "label": "Please identify the labels of each marked {noun} in the image.",
    "ocr": "Please provide the ocr results of each marked {noun} in the image.",
    "caption": "Please provide a brief description of each marked {noun} in the image.",
    "relation": "Please analyze the relationship between all marked {noun}s in the image.",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One marked thing."""

    thing: Thing
    region: Region

    @property
    def word(self) -> str:
        """`Mark n` or `Region n`."""
        return f"{'Mark' if self.region.kind == 'point' else 'Region'} {self.region.mark}"


@dataclass(frozen=True, slots=True)
class Talk:
    """The marks of a picture, and the conversation about them."""

    task: str
    marks: tuple[Mark, ...]
    turns: tuple[Turn, ...]


def point_on(rng: Random, thing: Thing) -> tuple[float, float]:
    """A point in the middle half of the box, on the thing's ink if it has any there; pixels."""
    x0, y0, x1, y1 = thing.box
    for _ in range(12):
        x, y = x0 + (x1 - x0) * rng.uniform(0.27, 0.73), y0 + (y1 - y0) * rng.uniform(0.27, 0.73)
        if thing.ink is None:
            break
        level = thing.ink.getpixel((min(int(x - x0), thing.ink.width - 1), min(int(y - y0), thing.ink.height - 1)))
        if isinstance(level, int) and level > 128:
            break
    return x, y


def loose_box(rng: Random, thing: Thing) -> tuple[float, float, float, float]:
    """The thing's box as a hand would draw it: every side off by up to 6 % of the length, mostly outwards."""
    x0, y0, x1, y1 = thing.box
    dx, dy = (x1 - x0) * 0.06, (y1 - y0) * 0.06
    return (
        x0 - dx * rng.uniform(-0.5, 1),
        y0 - dy * rng.uniform(-0.5, 1),
        x1 + dx * rng.uniform(-0.5, 1),
        y1 + dy * rng.uniform(-0.5, 1),
    )


def scribble(rng: Random, box: tuple[float, float, float, float]) -> list[float]:
    """A free-form stroke that just fills the box: a wobbly loop or a zigzag; x0, y0, x1, y1, ..."""
    if rng.random() < 0.6:
        count, start = rng.randint(10, 16), rng.uniform(0, math.tau)
        turns = [start + (1.05 * math.tau) * i / (count - 1) for i in range(count)]
        radii = [rng.uniform(0.88, 1.12) for _ in turns]
        points = [(r * math.cos(t), r * math.sin(t)) for t, r in zip(turns, radii, strict=True)]
    else:
        count = rng.randint(6, 10)
        points = [((-1) ** i * rng.uniform(0.7, 1.0), 2 * i / (count - 1) - 1) for i in range(count)]
        if rng.random() < 0.5:
            points = [(y, x) for x, y in points]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    flat: list[float] = []
    for x, y in points:
        flat.append(box[0] + (x - min(xs)) / (max(xs) - min(xs)) * (box[2] - box[0]))
        flat.append(box[1] + (y - min(ys)) / (max(ys) - min(ys)) * (box[3] - box[1]))
    return flat


def make_mark(rng: Random, scene: Scene, thing: Thing, kind: Kind, number: int) -> Mark:
    """Mark a thing; coordinates are clipped to the picture and rounded to 4 decimals."""
    if kind == "point":
        flat: Sequence[float] = point_on(rng, thing)
    else:
        box = loose_box(rng, thing)
        flat = box if kind == "box" else scribble(rng, box)
    sides = scene.image.width, scene.image.height
    coords = tuple(round(min(1.0, max(0.0, value / sides[i % 2])), 4) for i, value in enumerate(flat))
    return Mark(thing, Region(kind, coords, number))


def noun(marks: Sequence[Mark]) -> str:
    """What the instruction calls the marks."""
    words = {"point" if mark.region.kind == "point" else "region" for mark in marks}
    return words.pop() if len(words) == 1 else "point and region"


def phrase(thing: Thing) -> str:
    """The thing with an indefinite article: `a dog`, `a lock icon`, `the text K7A`."""
    match thing.kind:
        case "text":
            return f"the text {thing.label}"
        case "chart":
            return f"a chart with {'a ' if not thing.label.endswith('s') else ''}{thing.label}"
        case "digit":
            return f"a handwritten {thing.label}"
        case kind:
            article = "an" if thing.label[0] in "aeiou" else "a"
            if thing.label == "user":
                article = "a"
            return f"{article} {thing.label}{' icon' if kind == 'icon' else ''}"


def definite(thing: Thing) -> str:
    """The thing with a definite article: `the dog`, `the lock icon`, `the red bars`."""
    match thing.kind:
        case "text":
            return f"the text {thing.label}"
        case "icon":
            return f"the {thing.label} icon"
        case "digit":
            return f"the digit {thing.label}"
        case _:
            return f"the {thing.label}"


def where(scene: Scene, thing: Thing) -> str:
    """Which ninth of the picture the middle of the thing lies in."""
    x, y = thing.center[0] / scene.image.width, thing.center[1] / scene.image.height
    words = [("top", "", "bottom")[min(2, int(y * 3))], ("left", "", "right")[min(2, int(x * 3))]]
    return " ".join(word for word in words if word) or "center"


def dominance(a: Thing, b: Thing) -> float:
    """How clearly b lies along one axis from a: 0 (diagonal) to 1 (along an axis)."""
    dx, dy = abs(a.center[0] - b.center[0]), abs(a.center[1] - b.center[1])
    return abs(dx - dy) / max(dx, dy, 1e-9)


def side_of(a: Thing, b: Thing) -> str:
    """Where a lies as seen from b."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def listing(task: str, marks: Sequence[Mark], scene: Scene) -> str:
    """One line for each mark."""
    if task == "caption":
        return "\n".join(f"<{m.word}>: {phrase(m.thing)}, {where(scene, m.thing)}" for m in marks)
    return "\n".join(f"{m.word}: {m.thing.label}" for m in marks)


def relation(marks: Sequence[Mark]) -> str:
    """How the first mark lies to the second, and whether it is clearly larger or smaller."""
    a, b = marks[0], marks[1]
    verb = "are" if a.thing.kind == "chart" and a.thing.label.endswith("s") else "is"
    text = f"<{a.word}> <{b.word}>: {definite(a.thing)} {verb} {side_of(a.thing, b.thing)} {definite(b.thing)}"
    if a.thing.kind == b.thing.kind != "text" and not 1 / 1.8 < a.thing.area / b.thing.area < 1.8:
        text += " and larger" if a.thing.area > b.thing.area else " and smaller"
    return text


Question = tuple[str, str]


def ask_what(rng: Random, marks: Sequence[Mark], scene: Scene) -> Question:
    """What is it, or what does it say."""
    mark = rng.choice(marks)
    if mark.thing.kind == "text":
        return f"What does <{mark.word}> say?", mark.thing.label
    return f"What is <{mark.word}>?", mark.thing.label


def ask_where(rng: Random, marks: Sequence[Mark], scene: Scene) -> Question:
    """In which part of the picture."""
    mark = rng.choice(marks)
    return f"Where is <{mark.word}> in the image?", where(scene, mark.thing)


def ask_is(rng: Random, marks: Sequence[Mark], scene: Scene) -> Question:
    """Is it the named thing; half the time it is another thing of the picture."""
    mark = rng.choice(marks)
    others = [thing for thing in scene.things if thing.label != mark.thing.label]
    named = rng.choice(others) if rng.random() < 0.5 and others else mark.thing
    return f"Is <{mark.word}> {phrase(named)}?", "Yes" if named is mark.thing else "No"


def ask_which(rng: Random, marks: Sequence[Mark], scene: Scene) -> Question:
    """Which of the marks is the named thing."""
    mark = rng.choice(marks)
    word = "mark" if mark.region.kind == "point" else "region"
    if len({m.region.kind == "point" for m in marks}) > 1:
        word = "one"
    return f"Which {word} is {definite(mark.thing)}?", f"<{mark.word}>"


def ask_side(rng: Random, marks: Sequence[Mark], scene: Scene) -> Question:
    """Does one mark lie on the named side of another."""
    a, b = clear_pair(rng, marks)
    true = side_of(a.thing, b.thing)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[true]
    asked = true if rng.random() < 0.5 else opposite
    return f"Is <{a.word}> {asked} <{b.word}>?", "Yes" if asked == true else "No"


def clear_pair(rng: Random, marks: Sequence[Mark]) -> tuple[Mark, Mark]:
    """Two of the marks, in random order, that lie clearly along one axis, or else as clearly as there are."""
    pairs = [(a, b) for i, a in enumerate(marks) for b in marks[:i]]
    clear = [pair for pair in pairs if dominance(pair[0].thing, pair[1].thing) > 0.3]
    pair = rng.choice(clear) if clear else max(pairs, key=lambda p: dominance(p[0].thing, p[1].thing))
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


ASK_ONE: tuple[Callable[..., Question], ...] = (ask_what, ask_what, ask_where, ask_is)
ASK_MORE: tuple[Callable[..., Question], ...] = (ask_which, ask_side)


def question_turns(rng: Random, marks: Sequence[Mark], scene: Scene, two_turns: float) -> list[Turn]:
    """One question and its answer, sometimes a second one."""
    asks = ASK_ONE + (ASK_MORE if len(marks) > 1 else ())
    turns: list[Turn] = []
    while True:
        question, answer = rng.choice(asks)(rng, marks, scene)
        if any(turn.text == question for turn in turns):
            continue
        turns += [Turn("human", question), Turn("assistant", answer)]
        if len(turns) == 4 or rng.random() >= two_turns:
            return turns


def pick_things(rng: Random, scene: Scene, count: int, task: str) -> list[Thing]:
    """Which things to mark, in the order of their numbers; for a relation two that lie clearly to one another."""
    things = rng.sample(scene.things, min(count, len(scene.things)))
    if task != "relation":
        return things
    pairs = [[a, b] for a in scene.things for b in scene.things if a is not b]
    clear = [pair for pair in pairs if dominance(*pair) > 0.3]
    return rng.choice(clear) if clear else max(pairs, key=lambda pair: dominance(*pair))


def talk(
    rng: Random,
    scene: Scene,
    *,
    task: str,
    num_marks: int,
    kinds: Sequence[Kind],
    mixed: float,
    two_turns: float,
) -> Talk:
    """Mark things of a scene and talk about them.

    mixed: probability that every mark of the sample draws its own kind; otherwise one kind a sample.
    """
    things = pick_things(rng, scene, num_marks, task)
    one_kind = rng.choice(kinds)
    own = rng.random() < mixed
    marks = tuple(
        make_mark(rng, scene, thing, rng.choice(kinds) if own else one_kind, number)
        for number, thing in enumerate(things, 1)
    )
    if task == "qa":
        return Talk(task, marks, tuple(question_turns(rng, marks, scene, two_turns)))
    answer = relation(marks) if task == "relation" else listing(task, marks, scene)
    question = INSTRUCTIONS[task].format(noun=noun(marks))
    return Talk(task, marks, (Turn("human", question), Turn("assistant", answer)))


def facts(told: Talk, scene: Scene, split: str) -> dict[str, Any]:
    """What `Sample.meta` holds; boxes are fractions of the picture."""
    width, height = scene.image.size

    def fractions(thing: Thing) -> list[float]:
        return [round(value / (height if i % 2 else width), 4) for i, value in enumerate(thing.box)]

    places = {id(thing): place for place, thing in enumerate(scene.things)}
    return {
        "task": told.task,
        "split": split,
        "width": width,
        "height": height,
        "kinds": [mark.region.kind for mark in told.marks],
        "labels": {str(mark.region.mark): mark.thing.label for mark in told.marks},
        "marked": [places[id(mark.thing)] for mark in told.marks],
        "objects": [{"label": t.label, "kind": t.kind, "box": fractions(t)} for t in scene.things],
    }
