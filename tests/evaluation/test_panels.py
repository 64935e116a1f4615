from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bestiary.evaluation.panels import MARK_COLOURS, PanelRow, colour_of, draw_marks, open_picture, panel, to_png
from bestiary.evaluation.report import MarkResult
from bestiary.schema import Region, Sample, SampleError

from .scenes import picture

pytestmark = pytest.mark.slow  # many pictures are drawn


def has_colour(image: Image.Image, colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(image.crop(box)) == np.array(colour)).all(axis=-1).any())


def row(num_marks: int, text: str = "cup") -> PanelRow:
    marks = tuple(MarkResult(m, "point", text, text, None, m % 2 == 1, None) for m in range(1, num_marks + 1))
    return PanelRow(Image.new("RGB", (64, 48), (9, 9, 9)), "natural", "What?", text, text, None, True, marks)


@pytest.mark.parametrize("size", [(64, 64), (1200, 300), (3, 500)])
@pytest.mark.parametrize(
    "region",
    [
        Region("point", (0.75, 0.25), 2),
        Region("box", (0.6, 0.1, 0.9, 0.4), 2),
        Region("stroke", (0.6, 0.1, 0.9, 0.4, 0.7, 0.3), 2),
        Region("point", (1.0, 0.0), 2),
        Region("box", (0.5, 0.0, 1.0, 0.0), 2),
    ],
)
def test_a_mark_lies_where_its_region_is(size: tuple[int, int], region: Region) -> None:
    drawn = draw_marks(Image.new("RGB", size, (0, 0, 0)), [region])
    w, h = drawn.size
    assert has_colour(drawn, colour_of(2), (w // 2, 0, w, h // 2 + 1))
    if min(size) > 3:
        assert not has_colour(drawn, colour_of(2), (0, h // 2 + h // 6, w // 3, h))


def test_drawing_leaves_the_picture_alone() -> None:
    original = Image.new("RGB", (1000, 900), (0, 0, 0))
    before = original.tobytes()
    draw_marks(original, [Region("point", (0.5, 0.5), 1)])
    assert original.tobytes() == before


def test_a_panel_is_deterministic_and_keeps_its_width() -> None:
    rows = [row(n, "a very long label " * n) for n in (1, 4, 2, 9)]
    first, second = panel(rows), panel(rows)
    assert to_png(first) == to_png(second)
    assert first.width == panel([row(1)] * 3).width > panel([row(1)]).width


@pytest.mark.parametrize("text", ["", "x" * 3000, "one\ntwo\nthree", "ünïcode 漢字 \x00", "  "])
def test_any_text_fits(text: str) -> None:
    whole = PanelRow(Image.new("RGB", (64, 48)), text, text, text, text, None, False)
    assert panel([row(2, text), whole]).height < 1400


def test_every_mark_number_has_a_colour() -> None:
    assert colour_of(1) == MARK_COLOURS[0] == colour_of(len(MARK_COLOURS) + 1)


def test_a_question_without_a_picture_takes_no_square_of_the_panel() -> None:
    blank = draw_marks(open_picture(Sample("k", "s", "d", ())), ())
    text_alone = PanelRow(blank, "text", "Who?", "me", "me", None, True)
    assert panel([text_alone]).height < 200 < panel([row(1)]).height


def test_a_picture_is_opened_in_rgb_and_a_broken_one_names_its_sample() -> None:
    buffer = io.BytesIO()
    Image.new("LA", (5, 4)).save(buffer, format="PNG")
    sample = Sample("k1", "s", "d", (), (buffer.getvalue(),))
    assert (open_picture(sample).mode, open_picture(sample).size) == ("RGB", (5, 4))
    assert open_picture(Sample("k2", "s", "d", ())).mode == "RGB"
    with pytest.raises(SampleError, match="k3"):
        open_picture(Sample("k3", "s", "d", (), (picture(["cup"])[:60],)))
