from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import IGNORE, Example, Region, RegionKind, Sample, SampleError, Slot, Turn
from bestiary.variants.sphinx_v.processor import SphinxVProcessor

MODEL = str(Path(__file__).parents[1] / "goldens" / "sphinxv" / "data" / "tokenizer.model")
POINT = Region("point", (0.25, 0.5), 1)
BOX = Region("box", (0.1, 0.2, 0.6, 0.8), 1)
STROKE = Region("stroke", (0.1, 0.8, 0.6, 0.5, 0.3, 0.2), 1)


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


TURNS = (Turn("human", "What is in <Region 1>?"), Turn("assistant", "Region 1: a cat"))
SAMPLE = Sample("b/7", "src", "web", TURNS, images=(_png(200, 100),), regions=(BOX,))


def _make(**more: Any) -> SphinxVProcessor:
    settings: dict[str, Any] = {"canvas_px": 16, "image_rows": 12, "num_views": 5, "max_tokens": 400, "num_slots": 4}
    return SphinxVProcessor(tokenizer=MODEL, **settings | more)


def _with(*regions: Region) -> Sample:
    return replace(SAMPLE, regions=tuple(replace(region, mark=k) for k, region in enumerate(regions, 1)))


def _rows(example: Example) -> tuple[list[list[float]], list[int], list[bool], list[int]]:
    rows = example.regions
    assert rows is not None
    assert (rows.coords.dtype, rows.kinds.dtype, rows.valid.dtype) == (np.float32, np.int64, np.bool_)
    return (
        np.asarray(rows.coords).round(4).tolist(),
        np.asarray(rows.kinds).tolist(),
        np.asarray(rows.valid).tolist(),
        np.asarray(rows.counts).tolist(),
    )


def test_prompt_positions_stand_between_image_and_text() -> None:
    ours = _make()(SAMPLE)
    assert ours.slots[:20].tolist() == [0, *[Slot.IMAGE] * 12, *[Slot.REGION] * 6, 0]
    assert (ours.slots == Slot.REGION).sum() == _rows(ours)[3][0] + 2
    assert not ours.ids[1:19].any() and (ours.labels[:19] == IGNORE).all()


def test_without_prompts_there_are_no_prompt_positions() -> None:
    sample = replace(SAMPLE, regions=(), turns=(Turn("human", "What?"), Turn("assistant", "A cat")))
    ours = _make()(sample)
    assert ours.regions is None and not (ours.slots == Slot.REGION).any() and (ours.slots == Slot.IMAGE).sum() == 12
    bare = _make()(replace(sample, images=()))
    assert (bare.slots == Slot.TEXT).all() and bare.num_views == 0


def test_coordinates_are_of_the_padded_square_to_three_decimals() -> None:
    coords, kinds, valid, counts = _rows(_make()(_with(BOX, POINT)))
    half = [[0.1, 0.35, 0.6, 0.65], [0.25, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(coords, half, atol=1e-6)
    assert kinds == [RegionKind.BOX, RegionKind.POINT, RegionKind.BOX, RegionKind.BOX]
    assert valid == [True, True, False, False] and counts == [4]


def test_empty_slots_are_of_the_first_prompts_kind() -> None:
    assert _rows(_make()(_with(POINT, BOX)))[1] == [RegionKind.POINT, RegionKind.BOX, *[RegionKind.POINT] * 2]


def test_more_prompts_than_slots_get_that_many_slots() -> None:
    ours = _make()(_with(*[POINT] * 7))
    coords, _, valid, counts = _rows(ours)
    assert (len(coords), counts, all(valid)) == (7, [7], True)
    assert (ours.slots == Slot.REGION).sum() == 9
    quirky = _make(reference_quirks=True)(_with(*[POINT] * 7))
    assert _rows(quirky)[3] == [4] and (quirky.slots == Slot.REGION).sum() == 6
    assert _make().lengths(_with(*[POINT] * 7)) == (len(ours), 5, ours.num_targets)


def test_a_stroke_is_its_box() -> None:
    assert _rows(_make()(_with(STROKE))) == _rows(_make()(_with(BOX)))


def test_prompts_are_taken_by_mark_not_by_place() -> None:
    swapped = replace(SAMPLE, regions=(replace(POINT, mark=2), BOX))
    assert _rows(_make()(swapped)) == _rows(_make()(_with(BOX, POINT)))


def test_a_point_in_the_corner_is_a_point() -> None:
    corner = replace(SAMPLE, images=(_png(50, 50),), regions=(Region("point", (0.0, 0.0), 1),))
    assert _rows(_make()(corner))[2] == [True, False, False, False]
    assert _rows(_make(reference_quirks=True)(corner))[2] == [False] * 4


def test_quirks_read_a_mixed_sample_as_boxes() -> None:
    coords, kinds, valid, _ = _rows(_make(reference_quirks=True)(_with(POINT, BOX)))
    np.testing.assert_allclose(coords, [[0.25, 0.5, -1, -1], [0.1, 0.35, 0.6, 0.65], *[[0, 0, -1, -1]] * 2], atol=1e-6)
    assert kinds == [RegionKind.BOX] * 4 and valid == [True] * 4
    assert _rows(_make(reference_quirks=True)(_with(BOX, POINT)))[2] == [True, True, False, False]


@pytest.mark.parametrize("draws", [np.random.default_rng, np.random.RandomState])
def test_training_shakes_boxes_and_strokes_only_when_asked(draws: Any) -> None:
    sample, still = _with(BOX, STROKE, POINT), _make()
    calm = np.array(_rows(still(sample))[0])
    shaken = np.array(_rows(still(sample, rng=draws(1)))[0])
    assert (calm[:2] != shaken[:2]).any(axis=1).tolist() == [True, True] and (calm[2:] == shaken[2:]).all()
    assert (shaken == np.array(_rows(still(sample, rng=draws(1)))[0])).all()
    assert (np.array(_rows(_make(jitter=False)(sample, rng=draws(1)))[0]) == calm).all()
    assert (np.array(_rows(still.prompt(sample))[0]) == calm).all()


def test_nothing_of_the_sample_changes_and_calls_repeat() -> None:
    before = pickle.dumps(SAMPLE)
    for quirks in (False, True):
        processor = _make(reference_quirks=quirks)
        first = _rows(processor(SAMPLE))
        assert first == _rows(pickle.loads(pickle.dumps(processor))(SAMPLE))
        assert first == _rows(processor.prompt(SAMPLE))
    assert pickle.dumps(SAMPLE) == before


NAN = float("nan")
BAD = {
    r"region 1 \(box 0.1 0.2 1.2 0.8\) lies outside": {"regions": (Region("box", (0.1, 0.2, 1.2, 0.8), 1),)},
    r"region 1 \(point -0.1 0.5\) lies outside": {"regions": (Region("point", (-0.1, 0.5), 1),)},
    r"region 1 \(point 0.5 1.0001\) lies outside": {"regions": (Region("point", (0.5, 1.0001), 1),)},
    r"region 1 \(point -0.0001 0.5\) lies outside": {"regions": (Region("point", (-0.0001, 0.5), 1),)},
    r"\(box 0.1 0.2 0.1 0.8\) has no size": {"regions": (Region("box", (0.1, 0.2, 0.1, 0.8), 1),)},
    r"\(box 0.6 0.2 0.1 0.8\) has no size or a negative one": {"regions": (Region("box", (0.6, 0.2, 0.1, 0.8), 1),)},
    r"\(stroke 0.1 0.2 0.1 0.2\) has no length": {"regions": (Region("stroke", (0.1, 0.2, 0.1, 0.2), 1),)},
    r"\(point nan 0.5\) is not finite": {"regions": (Region("point", (NAN, 0.5), 1),)},
    r"\(box 0.1 0.2 inf 0.8\) is not finite": {"regions": (Region("box", (0.1, 0.2, float("inf"), 0.8), 1),)},
    r"\(point 0.1 0.2 0.3\) has 3 numbers": {"regions": (Region("point", (0.1, 0.2, 0.3), 1),)},
    r"\(mask 0.1 0.2\) has 2 numbers": {"regions": (Region("mask", (0.1, 0.2), 1),)},  # type: ignore[arg-type]
    r"regions have the marks \[1, 1\]; number them 1 to 2": {"regions": (BOX, BOX)},
    r"regions have the marks \[2\]": {"regions": (replace(BOX, mark=2),)},
    "1 regions but no image": {"images": ()},
    "'<Region 1>' but the sample has no regions": {"regions": ()},
    "'<Mark 2>' but the sample has the marks 1 to 1": {"turns": (Turn("human", "<Mark 2>?"), TURNS[1])},
    "'Region 3:' but the sample has": {"turns": (Turn("human", "Is Region 3: a dog?"), TURNS[1])},
    "'<Region 0>' but the sample has": {"turns": (Turn("human", "<Region 0>?"), TURNS[1])},
    "the conversation is empty": {"turns": ()},
    "the image is none": {"images": (b"nothing",)},
}


@pytest.mark.parametrize("problem", BAD)
@pytest.mark.parametrize("call", ["__call__", "prompt"])
def test_bad_samples_are_named_in_one_line(problem: str, call: str) -> None:
    with pytest.raises(SampleError, match=problem) as info:
        getattr(_make(), call)(replace(SAMPLE, **BAD[problem]))
    assert str(info.value).startswith("sample b/7: ") and "\n" not in str(info.value)


def test_quirks_leave_numbers_in_the_text_alone() -> None:
    sample = replace(SAMPLE, turns=(Turn("human", "What is in <Region 9>?"), TURNS[1]))
    assert _rows(_make(reference_quirks=True)(sample)) == _rows(_make()(SAMPLE))


def test_edges_of_the_image_are_inside() -> None:
    edges = _with(Region("box", (0.0, 0.0, 1.0, 1.0), 1), Region("point", (1.0, 1.0), 1))
    assert _rows(_make()(edges))[0][:2] == [[0.0, 0.25, 1.0, 0.75], [1.0, 0.75, 0.0, 0.0]]


def test_a_row_must_hold_an_image_its_prompts_and_words() -> None:
    with pytest.raises(ValueError, match="an image takes 106 positions"):
        _make(num_slots=92, max_tokens=180)
