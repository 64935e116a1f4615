"""Samples back into the published records they were made of.

Normalised on the way: speakers by their first names of the format, numbers in words as text, pixels to twelve digits.
"""

from __future__ import annotations

from typing import Any

from bestiary.schema import Region, Sample, Turn

ADDED = ("file", "file_record", "image_size", "task", "benchmark", "prompt", "metric", "max_new_tokens", "gt_box")
"""What adapters add to a record's own fields."""


def _others(sample: Sample, *added: str) -> dict[str, Any]:
    return {name: value for name, value in sample.meta.items() if name not in (*ADDED, *added)}


def conversation(turns: tuple[Turn, ...], human: str = "human", assistant: str = "gpt") -> list[dict[str, str]]:
    """Turns as published messages."""
    return [{"from": human if turn.role == "human" else assistant, "value": turn.text} for turn in turns]


def llava(sample: Sample) -> dict[str, Any]:
    """LLaVA's record; also SPHINX's dialog and Ovis' conversation."""
    system = sample.meta.get("system")
    told = [] if system is None else [{"from": "system", "value": system}]
    others = _others(sample, "system", "type", "data_format")
    return others | {"conversations": told + conversation(sample.turns)}


def single_turn(sample: Sample) -> dict[str, Any]:
    """SPHINX's instruction, input and output."""
    question, answer = (turn.text for turn in sample.turns)
    return _others(sample, "type", "prompt_type") | {"instruction": question, "output": answer}


def caption(sample: Sample) -> dict[str, Any]:
    """A row of Ovis' captions."""
    return _others(sample, "data_format") | {"caption": sample.turns[-1].text}


def pixels(regions: tuple[Region, ...], size: list[int]) -> dict[str, list[list[float]]]:
    """Marks as published, `points` or `bbox`."""
    width, height = size
    found: dict[str, list[list[float]]] = {}
    for region in regions:
        x0, y0, x1, y1 = region.box
        place = [x0 * width, y0 * height]
        if region.kind == "box":
            place += [(x1 - x0) * width, (y1 - y0) * height]
        found.setdefault("points" if region.kind == "point" else "bbox", []).append(place)
    return found


def mdvp(sample: Sample) -> dict[str, Any]:
    """SPHINX-V's annotation."""
    return (
        _others(sample, "type")
        | {"conversations": conversation(sample.turns)}
        | pixels(sample.regions, sample.meta["image_size"])
    )


def asked(sample: Sample) -> dict[str, Any]:
    """A record of MDVP-Bench or of another benchmark."""
    marks = pixels(sample.regions, sample.meta["image_size"]) if sample.regions else {}
    truth = {"gt_answers": sample.turns[1].text} if "gt_answers" not in sample.meta else {}
    return _others(sample, "config") | {"question": sample.turns[0].text} | truth | marks


def qwen_vl(sample: Sample) -> dict[str, Any]:
    """Qwen-VL's conversation."""
    paths = iter(sample.meta.get("image_paths", ()))
    turns = []
    for turn in sample.turns:
        head, *tails = turn.text.split("<image>")
        turns.append(Turn(turn.role, head + "".join(f"<img>{next(paths)}</img>{tail}" for tail in tails)))
    others = _others(sample, "image_paths", "boxes", "quads")
    return others | {"conversations": conversation(tuple(turns), "user", "assistant")}
