from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bestiary.vision.canvas import FULL, Picture, canvas_CHW, eighths_for_square
from bestiary.vision.geometry import MAX_SIDE_PX, PAD_RGB, square_canvas, square_of
from bestiary.vision.image import decode

REPO = Path(__file__).parents[2]
PHOTOS = sorted((REPO / "data_modules" / "embedded" / "assets").glob("photo-*.jpg"))
SHARED = Path(os.environ.get("BESTIARY_SHARED", REPO.parent / "shared")) / "data" / "mdvp_bench"
SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))


def _canvas_HWC(picture: Picture, side_px: int) -> np.ndarray:  # noqa: N802
    made = canvas_CHW(picture, side_px)
    assert made.shape == (3, side_px, side_px) and made.dtype == np.uint8 and made.flags.c_contiguous
    return made.transpose(1, 2, 0).astype(int)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(((one - other.astype(float)) ** 2).mean())
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([7, 48, 224]))
def test_a_whole_picture_gives_the_very_pixels_of_pad_and_resize(size: tuple[int, int], side_px: int) -> None:
    width, height = size
    rgb = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert (_canvas_HWC(Picture(rgb, width, height), side_px) == square_canvas(rgb, side_px)).all()


def test_what_cannot_be_written_or_is_no_whole_block_of_memory_is_read() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for odd in (rgb[:, ::-1], rgb[::2]):
        odd.setflags(write=False)
        assert (_canvas_HWC(Picture(odd, *odd.shape[1::-1]), 16) == square_canvas(odd, 16)).all()
    exact = Picture(rgb[:16, :16], 16, 16)
    assert (_canvas_HWC(exact, 16) == exact.pixels_HWC).all()


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 8))
def test_a_spare_byte_changes_nothing(size: tuple[int, int], eighths: int) -> None:
    width, height = size
    shape = (-(-height * eighths // FULL), -(-width * eighths // FULL), 4)
    pixels = np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)
    plain = _canvas_HWC(Picture(np.ascontiguousarray(pixels[:, :, :3]), width, height, eighths), 16)
    assert (_canvas_HWC(Picture(pixels, width, height, eighths), 16) == plain).all()


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
def test_photographs_are_within_two_grey_levels_of_pillow(photo: Path) -> None:
    picture = decode(photo.read_bytes())
    off = np.abs(_canvas_HWC(picture, 224) - square_canvas(picture.pixels_HWC, 224, exact_pil=True))
    assert off.max() <= 2 and off.mean() < 0.01


def _odd_crops(photo: Path) -> list[bytes]:
    """A photograph at sizes that are no multiple of anything."""
    rgb = Image.open(photo).convert("RGB")
    files = []
    for width, height in ((397, 241), (203, 265), (331, 254)):
        file = io.BytesIO()
        rgb.crop((0, 0, width, min(height, rgb.height))).save(file, "JPEG", quality=90, subsampling=2)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
def test_photographs_decoded_smaller_look_the_same_and_lie_where_they_lay(photo: Path) -> None:
    for data in (photo.read_bytes(), *_odd_crops(photo)):
        full = decode(data)
        for side_px in (48, 64, 96, 112):
            small = decode(data, eighths=lambda w, h, side_px=side_px: eighths_for_square(w, h, side_px))
            assert (small.width, small.height) == (full.width, full.height)
            if small.eighths < FULL:
                assert _psnr(_canvas_HWC(small, side_px), _canvas_HWC(full, side_px)) > 35, (small.eighths, side_px)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no benchmark pictures at {SHARED}; set BESTIARY_SHARED")
def test_benchmark_pictures_keep_the_same_bounds() -> None:
    decoded_smaller = 0
    for path in sorted(SHARED.glob("*/images/*.jpg")):
        data = path.read_bytes()
        full = decode(data)
        off = np.abs(_canvas_HWC(full, 448) - square_canvas(full.pixels_HWC, 448, exact_pil=True))
        assert off.max() <= 2 and off.mean() < 0.01, path
        for side_px in (128, 160, 224, 448):
            small = decode(data, eighths=lambda w, h, side_px=side_px: eighths_for_square(w, h, side_px))
            if small.eighths < FULL:
                decoded_smaller += 1
                assert _psnr(_canvas_HWC(small, side_px), _canvas_HWC(full, side_px)) > 35, path
    assert decoded_smaller > 50


@given(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), st.sampled_from([48, 224, 448]))
def test_no_picture_is_decoded_smaller_than_its_canvas_needs(size: tuple[int, int], side_px: int) -> None:
    eighths = eighths_for_square(*size, side_px)
    assert eighths in (1, 2, 3, 4, FULL)
    if max(size) < 2 * side_px:
        assert eighths == FULL
    side, _, _ = square_of(*size)
    assert all(-(-length * eighths // FULL) >= min(length, side_px * length // side) for length in size)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([5, 16, 33]))
def test_smaller_pictures_of_every_size_fill_their_canvas(size: tuple[int, int], side_px: int) -> None:
    width, height = size
    eighths = eighths_for_square(width, height, side_px)
    pixels = np.full((-(-height * eighths // FULL), -(-width * eighths // FULL), 3), 200, dtype=np.uint8)
    made = _canvas_HWC(Picture(pixels, width, height, eighths), side_px)
    # As much of the square is picture as of the full one: its edges share lines with the pad.
    full = square_canvas(np.full((height, width, 3), 200, dtype=np.uint8), side_px).astype(int)
    share = (made[:, :, 0] - PAD_RGB[0]).sum() - (full[:, :, 0] - PAD_RGB[0]).sum()
    assert abs(share) <= 0.25 * side_px * (200 - PAD_RGB[0])


def test_a_thin_strip_does_not_take_all_memory() -> None:
    with pytest.raises(ValueError, match=f"the image has {MAX_SIDE_PX + 1}x1 pixels, .* cut it"):
        canvas_CHW(Picture(np.zeros((1, MAX_SIDE_PX + 1, 3), dtype=np.uint8), MAX_SIDE_PX + 1, 1), 8)
