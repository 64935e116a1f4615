from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.vision import geometry as geo

SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))


@given(SIZES, st.integers(0, 6), st.data())
def test_pixels_of_up_to_six_decimals_survive_fractions_exactly(
    size: tuple[int, int], digits: int, data: st.DataObject
) -> None:
    width, height = size
    pixels = tuple(data.draw(st.integers(0, side * 10**digits)) / 10**digits for side in (width, height))
    assert geo.original_to_pixels(geo.pixels_to_original(pixels, width, height), width, height) == pixels


def test_boxes_in_pixels_give_the_same_row_through_fractions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        width, height = (int(v) for v in rng.integers(20, 4000, 2))
        digits = int(rng.integers(0, 5))
        x, y = (round(float(rng.uniform(0, 0.8 * side)), digits) for side in (width, height))
        w, h = (round(float(rng.uniform(0.5, 0.2 * side)), digits) for side in (width, height))
        fractions = geo.pixels_to_original((x, y, x + w, y + h), width, height)
        again = geo.box_to_xywh_px(fractions, width, height)  # type: ignore[arg-type]
        assert again == (x, y, w, h)
        assert geo.box_row(again, width, height) == geo.box_row((x, y, w, h), width, height)


@given(SIZES, st.floats(0, 1), st.floats(0, 1))
def test_square_and_original_frames_undo_each_other(size: tuple[int, int], x: float, y: float) -> None:
    there = geo.original_to_square((x, y), *size)
    np.testing.assert_allclose(geo.square_to_original(there, *size), (x, y), atol=1e-6)
    assert all(-1e-9 <= c <= 1 + 1e-9 for c in there)


@pytest.mark.parametrize(("height", "width"), [(3, 8), (8, 3), (4, 7), (5, 5)])
def test_padding_puts_the_image_where_the_coordinates_say(height: int, width: int) -> None:
    rgb = np.zeros((height, width, 3), dtype=np.uint8)
    square = geo.pad_to_square(rgb)
    side, left, top = geo.square_of(width, height)
    assert square.shape == (side, side, 3)
    assert not square[top : top + height, left : left + width].any()
    assert (square.reshape(-1, 3) == geo.PAD_RGB).all(axis=1).sum() == side * side - height * width
    assert not rgb.any()


def test_a_thin_strip_does_not_take_all_memory() -> None:
    with pytest.raises(ValueError, match="cut it"):
        geo.pad_to_square(np.zeros((1, geo.MAX_SIDE_PX + 1, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), [(300, 200), (37, 100), (60, 61), (1, 9)])
def test_fast_and_exact_resize_stay_within_two_grey_levels(height: int, width: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    fast, exact = (geo.square_canvas(rgb, 64, exact_pil=exact).astype(int) for exact in (False, True))
    assert fast.shape == (64, 64, 3)
    assert np.abs(fast - exact).max() <= 2


def test_resize_reads_what_cannot_be_written() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    rgb.setflags(write=False)
    assert geo.resize(rgb, 10, 10).shape == (10, 10, 3)
    assert geo.resize(rgb[:, ::-1], 10, 10).shape == (10, 10, 3)


@pytest.mark.parametrize("draws", [np.random.default_rng, np.random.RandomState])
def test_jitter_stays_within_its_limits_and_repeats(draws: type[np.random.RandomState]) -> None:
    box = (50.0, 40.0, 83.0, 24.0)
    shaken = [geo.jitter_box(box, draws(seed)) for seed in range(300)]
    assert shaken == [geo.jitter_box(box, draws(seed)) for seed in range(300)]
    moved = np.array(shaken) - box
    assert set(moved[:, 0]) == set(range(-10, 11)) and set(moved[:, 1]) == set(range(-3, 4))
    assert np.abs(moved[:, 2:] / box[2:]).max() <= 0.15
    assert len(set(shaken)) == 300


def test_drawn_layers_give_the_box_around_their_paint() -> None:
    layers = np.zeros((3, 10, 20, 4), dtype=np.uint8)
    layers[0, 2:5, 7] = 255
    layers[2, 9, 3:19, 3] = 1
    assert geo.stroke_boxes(layers) == [(7, 2, 7, 4), (3, 9, 18, 9)]


def test_two_clicks_on_any_corners_are_a_box() -> None:
    assert geo.click_boxes([(5, 1), (2, 9), (4, 4)]) == [(2, 1, 5, 9), (4, 4)]


def test_random_crops_lie_inside() -> None:
    import torch

    rng = torch.Generator().manual_seed(0)
    for height, width in [(50, 60), (100, 20), (20, 100), (1, 1)] * 20:
        top, left, crop_h, crop_w = geo.random_crop(height, width, rng)
        assert 0 <= top <= height - crop_h and 0 <= left <= width - crop_w and crop_h > 0 and crop_w > 0


def test_coordinates_import_no_tensor_library() -> None:
    import subprocess
    import sys

    code = "import bestiary.vision.geometry, sys; print({'torch', 'PIL'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
