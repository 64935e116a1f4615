from __future__ import annotations

import pytest

from bestiary.evaluation.boxes import COLOURS, Mention, box_of, grounding, mark_up, mentions, square_to_pixels
from bestiary.vision.geometry import original_to_square, pixels_to_original


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("A <p>red car</p> [0.1,0.2,0.3,0.4].", [("red car", ((0.1, 0.2, 0.3, 0.4),))]),
        ("<p>dogs</p>[0,0,0.5,1 ; .5, .6]", [("dogs", ((0.0, 0.0, 0.5, 1.0), (0.5, 0.6)))]),
        ("[0.5,0.2] then <p>b</p> [1,0,1,1]", [("", ((0.5, 0.2),)), ("b", ((1.0, 0.0, 1.0, 1.0),))]),
        ("as [1] says, [0.1,0.2,0.3] and [0.1;0.2] are no boxes, nor is []", []),
        ("0.1,0.2,0.3,0.4", []),
        ("[a,b,c,d] [0.1,,0.2] [0.1,0.2", []),
        ("", []),
    ],
)
def test_brackets_of_boxes_and_points_are_read_in_order_and_others_are_text(
    answer: str, read: list[tuple[str, tuple[tuple[float, ...], ...]]]
) -> None:
    assert [(m.name, m.places) for m in mentions(answer)] == read


def test_colours_go_on_in_reading_order_and_start_again() -> None:
    found = mentions(" ".join(f"[0.{n},0.5]" for n in range(7)))
    assert [m.colour for m in found] == [*COLOURS, *COLOURS[:2]]


def test_marked_up_answers_are_harmless_html() -> None:
    found, marked = mark_up('<script>x</script> <p>a "b" & c</p> [0.1,0.2] <b>')
    assert [m.name for m in found] == ['a "b" & c']
    assert marked == (
        "&lt;script&gt;x&lt;/script&gt; "
        f'<span style="color:{COLOURS[0]}">a &quot;b&quot; &amp; c [0.1,0.2]</span> &lt;b&gt;'
    )


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (64, 64), (1, 7)])
def test_pixels_are_those_of_the_image_not_of_its_square(size: tuple[int, int]) -> None:
    place = (3.0, 1.25, 0.5, 6.0)
    square = original_to_square(pixels_to_original(place, *size), *size)
    assert square_to_pixels(square, *size) == pytest.approx(place)
    assert Mention("", (square,), "red").pixels(*size) == (pytest.approx(place),)


def test_the_first_box_is_taken_and_points_before_it_are_not() -> None:
    assert box_of("from [0.1,0.2] to [0.1,0.2,0.3,0.4], not [0,0,1,1]") == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("answer", ["0.1,0.2,0.3,0.4", "none\nat all", "[0.1,0.2]", "x" * 500])
def test_an_answer_without_a_box_says_so_in_one_line(answer: str) -> None:
    with pytest.raises(ValueError, match=r"no box in the answer '.*four numbers in brackets") as caught:
        box_of(answer)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 200


def test_a_grounding_is_right_from_half_an_overlap_on() -> None:
    exact = grounding("[0.25,0.25,0.75,0.75]", (25, 0, 75, 50), 100, 50)
    assert exact.truth == (25, 25, 75, 75) and exact.iou == pytest.approx(1.0) and exact.is_correct()
    half = grounding("[0.25,0.25,0.75,0.5]", (25, 0, 75, 50), 100, 50)
    assert half.iou == pytest.approx(0.5) and half.is_correct() and not half.is_correct(0.51)


def test_a_number_in_brackets_before_the_box_costs_nothing_but_in_the_published_rule() -> None:
    answer, truth = "in [1] it is at [0,0,1,1]", (0, 0, 10, 10)
    assert grounding(answer, truth, 10, 10).iou == pytest.approx(1.0)
    assert grounding(answer, truth, 10, 10, reference_quirks=True).iou == 0.0


def test_no_box_and_empty_boxes_score_zero() -> None:
    assert grounding("none", (1, 2, 3, 4), 10, 20).predicted is None
    assert grounding("none", (1, 2, 3, 4), 10, 20).iou == 0.0
    assert grounding("[0,0,0,0]", (0, 0, 0, 0), 10, 10).iou == 0.0
