"""Embedded data without marks: what SPHINX's and Ovis' stages train on, and held-out sources to score.

Every source holds all asked domains in turn (sample n shows domain n mod their number), so a task is one source. Things
are fewer and larger than in the marked data, because a picture may reach the model in one small view.

Training samples are conversations as SPHINX is trained on them, instruction and all; a caption or a document is one
assistant turn, Ovis' captions stand behind their template (`meta["data_format"]`). Held-out questions are as the
adapter `benchmark` writes them: the bare question as the turn, in `meta` how to ask and score it (`prompt`, `metric`,
`max_new_tokens`) with the truth (`gt_answers`; a box in pixels of the picture, `gt_box` and the answer's text in
fractions of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from bestiary.schema import Sample, Turn

from . import small_text
from .assets import CHART_NAMES, DIGIT_NAMES, Split, icon_names, object_names
from .build import COST_MS, Job, fingerprint, write_sources
from .generate import DOMAINS, Domain, encode, scene
from .plain_tasks import (
    GROUNDED,
    REFERRING,
    SHORT_ANSWER,
    Exchange,
    box_text,
    caption,
    document,
    draw_pair,
    grounded_caption,
    questions,
    text_exchange,
)
from .scene import LOOK, Scene, Thing
from .tasks import definite

LOOK_PLAIN = replace(LOOK, num_objects=(2, 3), object_u=(40, 58), icon_u=(34, 46), letters_u=(24, 30))
"""Two or three large things: in a single view of half the canvas they are as large as the marked ones in a quarter."""
TEXT_DOMAIN = "text"
HELDOUT = "_heldout"
DESCRIBE = "Describe the image."
CAPTION_TEMPLATE = "<image>'s caption: "
"""Of Ovis' first stage (reference/ovis.md 2)."""
TURNS_OF_A_PICTURE = 3
"""Questions about one training picture; the picture costs more positions than they do."""


def _scene(domain: Domain, seed: int, index: int, split: Split) -> Scene:
    return scene(domain, seed, index, split, look=LOOK_PLAIN)


@dataclass(frozen=True, slots=True)
class PlainPart:
    """One task. size, heldout_size: samples over all domains. first_index: as in `build.Part`.

    make: (its random numbers, split, the picture) -> turns and facts of a sample with a picture; None = a text.
    draw: (domain, seed, index, split) -> the picture.
    """

    size: int
    heldout_size: int
    first_index: int
    make: Callable[[Random, Split, Scene, Scene], tuple[tuple[Turn, ...], dict[str, Any]]] | None = None
    draw: Callable[[Domain, int, int, Split], Scene] = _scene


def _caption(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    return (Turn("assistant", caption(picture)),), {}


def _ovis_caption(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    return (Turn("human", CAPTION_TEMPLATE), Turn("assistant", caption(picture))), {"data_format": "caption"}


def _description(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    return (Turn("human", DESCRIBE), Turn("assistant", caption(picture))), {}


def _vqa(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    asked = questions(rng, picture, other.things, 1 if split == "heldout" else TURNS_OF_A_PICTURE)
    if split == "heldout":
        [exchange] = asked
        return _turns(exchange), {"task": exchange.kind} | _how(SHORT_ANSWER, "accuracy", 10, exchange.answer)
    return tuple(turn for e in asked for turn in _turns(replace(e, question=SHORT_ANSWER.format(e.question)))), {}


def _rec(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    things = rng.sample(picture.things, min(len(picture.things), 1 if split == "heldout" else TURNS_OF_A_PICTURE))
    if split == "heldout":
        width, height = picture.image.size
        px = [float(value) for value in things[0].box]
        box = [round(value / (height if i % 2 else width), 6) for i, value in enumerate(px)]
        turns = (
            Turn("human", definite(things[0])),
            Turn("assistant", f"[{','.join(f'{value:.3f}' for value in box)}]"),
        )
        facts = _how(REFERRING, "rec", 30, px)
        return turns, facts | {"question_id": f"height{height}_width{width}", "gt_box": box}
    asked = [
        (Turn("human", REFERRING.format(definite(thing))), Turn("assistant", box_text(picture, thing)))
        for thing in things
    ]
    return tuple(turn for pair in asked for turn in pair), {}


def _grounded(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    answer = grounded_caption(picture)
    return (Turn("human", GROUNDED), Turn("assistant", answer)), _how("{}", "grounded_caption", 128, answer)


def _small_text(rng: Random, split: Split, picture: Scene, other: Scene) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    asked = [
        (small_text.QUESTION.format(place), thing)
        for place, thing in zip(small_text.QUARTERS, picture.things, strict=True)
    ]
    if split == "heldout":
        question, thing = rng.choice(asked)
        return _turns(Exchange(thing.kind, question, thing.label)), {"task": thing.kind} | _how(
            "{}", "accuracy", 10, thing.label
        )
    rng.shuffle(asked)
    return tuple(turn for question, thing in asked for turn in _turns(Exchange(thing.kind, question, thing.label))), {}


PARTS: Mapping[str, PlainPart] = {
    "sphinx_caption": PlainPart(4000, 96, 20_000_000, _caption),
    "sphinx_documents": PlainPart(2000, 48, 30_000_000),
    "sphinx_vqa": PlainPart(4000, 240, 40_000_000, _vqa),
    "sphinx_rec": PlainPart(4000, 160, 50_000_000, _rec),
    "sphinx_grounded": PlainPart(1000, 48, 60_000_000, _grounded),
    "sphinx_dialogs": PlainPart(1000, 48, 70_000_000),
    "ovis_caption": PlainPart(6000, 96, 80_000_000, _ovis_caption),
    "ovis_description": PlainPart(6000, 96, 90_000_000, _description),
    "ovis_questions": PlainPart(6000, 240, 100_000_000, _vqa),
    "monkey_texts": PlainPart(3000, 320, 110_000_000, _small_text, small_text.scene),
}


def plain_source_names() -> tuple[str, ...]:
    """Names of all sources: a task, or a task with `_heldout`."""
    return tuple(f"{name}{suffix}" for name in PARTS for suffix in ("", HELDOUT))


def build_plain(
    root: Path,
    *,
    sources: Sequence[str],
    domains: Sequence[Domain] = DOMAINS,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    processes: int | None = None,
) -> dict[str, Path]:
    """Write sources into `root/<source>` unless they are there already; returns the folders by source.

    sources: tasks, each with its held-out source, or a held-out source alone. domains: those that pictures are of.
    sizes: samples by source. processes: None = one a core.
    """
    choices_of = ((sources, plain_source_names()), (domains, DOMAINS))
    if unknown := [name for names, known in choices_of for name in names if name not in known]:
        choices = f"{', '.join(PARTS)} (or one of them with {HELDOUT}), and of {', '.join(DOMAINS)}"
        raise ValueError(f"{unknown[0]!r} is unknown; choose of {choices}")
    counts = {name: size for task in sources for name, size in _sizes(task).items()}
    for name, size in (sizes or {}).items():
        if name not in counts or size < 1:
            raise ValueError(f"sizes[{name!r}] is {size}; give 1 or more to some of {', '.join(counts)}")
    counts |= sizes or {}
    make = _Maker(tuple(domains))
    cost_ms = sum(COST_MS[domain] for domain in domains) / len(domains)
    jobs = [
        Job(name, seed, count, make, cost_ms * count, fingerprint(name, seed, count, domains=",".join(domains)))
        for name, count in counts.items()
    ]
    return write_sources(Path(root), jobs, processes=processes)


@dataclass(frozen=True, slots=True)
class _Maker:
    """`plain_sample` of some domains, as a value that another process can be sent."""

    domains: tuple[Domain, ...]

    def __call__(self, source: str, seed: int, number: int) -> Sample:
        return plain_sample(source, seed, number, domains=self.domains)


def plain_sample(source: str, seed: int, number: int, *, domains: Sequence[Domain] = DOMAINS) -> Sample:
    """Sample `number` of a source: the row that `build_plain` writes there."""
    task = source.removesuffix(HELDOUT)
    split: Split = "heldout" if source.endswith(HELDOUT) else "train"
    part = PARTS[task]
    domain, index = domains[number % len(domains)], part.first_index + number
    rng = Random(f"plain/{source}/{seed}/{number}")
    facts: dict[str, Any] = {"task": task.removeprefix("sphinx_"), "split": split}
    if part.make is None:
        turns, more = _text(rng, task, split)
        key = f"{source}-{seed}-{number:08d}"
        return Sample(key=key, source=source, domain=TEXT_DOMAIN, turns=turns, meta=facts | more | _id(more, number))
    picture = part.draw(domain, seed, index, split)
    other = part.draw(domain, seed, index + 1_000_000, split) if part.make is _vqa else picture
    turns, more = part.make(rng, split, picture, other)
    return Sample(
        key=f"{source}-{domain}-{seed}-{number:08d}",
        source=source,
        domain=domain,
        turns=turns,
        images=(encode(picture.image, LOOK_PLAIN.jpeg_quality),),
        meta=facts | more | _id(more, number) | _truth(picture),
    )


def _text(rng: Random, task: str, split: Split) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    """Turns and facts of a sample without a picture."""
    a, b = draw_pair(rng, _all_labels(), is_heldout=split == "heldout")
    if task == "sphinx_documents":
        return (Turn("assistant", document(rng, a, b)),), {}
    exchange = text_exchange(rng, a, b)
    facts = {"task": exchange.kind} | _how("{}", "accuracy", 16, exchange.answer) if split == "heldout" else {}
    return _turns(exchange), facts


def _turns(exchange: Exchange) -> tuple[Turn, Turn]:
    return Turn("human", exchange.question), Turn("assistant", exchange.answer)


def _how(prompt: str, metric: str, max_new_tokens: int, truth: Any) -> dict[str, Any]:
    """How a held-out question is asked and scored, in the words of annotation_config.json."""
    return {"prompt": prompt, "metric": metric, "max_new_tokens": max_new_tokens, "gt_answers": truth}


def _id(facts: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A number for a held-out question that has no published form of one."""
    return {"question_id": number} if "gt_answers" in facts and "question_id" not in facts else {}


def _truth(picture: Scene) -> dict[str, Any]:
    """Size of the picture and all its things, boxes in fractions of it."""
    width, height = picture.image.size

    def box(thing: Thing) -> list[float]:
        return [round(value / (height if i % 2 else width), 4) for i, value in enumerate(thing.box)]

    things = [{"label": thing.label, "kind": thing.kind, "box": box(thing)} for thing in picture.things]
    return {"width": width, "height": height, "objects": things}


@lru_cache(maxsize=1)
def _all_labels() -> tuple[tuple[str, str], ...]:
    """Every label with its kind, strings apart."""
    kinds = {"object": object_names(), "icon": icon_names(), "digit": DIGIT_NAMES, "chart": CHART_NAMES}
    return tuple((label, kind) for kind, labels in kinds.items() for label in labels)


def _sizes(source: str) -> dict[str, int]:
    task = source.removesuffix(HELDOUT)
    if source != task:
        return {source: PARTS[task].heldout_size}
    return {task: PARTS[task].size, f"{task}{HELDOUT}": PARTS[task].heldout_size}
