"""SPHINX's image transforms against pixels of the published ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bestiary.vision.encoders import normalise
from bestiary.vision.geometry import (
    PAD_RGB,
    center_crop_size,
    pad_to_square,
    random_crop,
    random_resized_crop,
    resized_center_crop,
    square_canvas,
)
from bestiary.vision.image import decode_rgb
from tests.parity.cases import cases, has, read_json, read_tensors


def _is_transform_case(folder: Path) -> bool:
    return has("io.safetensors", "meta.json")(folder) and "pad_color" in (folder / "meta.json").read_text()


CASES = cases("sphinx", _is_transform_case)


def _each(case: Path) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The facts and the tensors of every image of a case, the tensors' names without the image's number."""
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(case / "io.safetensors").items()}
    for fact in read_json(case / "meta.json")["cases"]:
        prefix = f"{fact['index']}."
        yield fact, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", CASES)
def test_decoded_files_are_the_published_input(case: Path) -> None:
    for fact, tensors in _each(case):
        rgb = decode_rgb((case / f"img{fact['index']}.png").read_bytes())
        assert (rgb == tensors["input_u8"]).all()
        assert rgb.shape == (fact["h"], fact["w"], 3)


@pytest.mark.parametrize("case", CASES)
def test_pad_and_resize_are_exact(case: Path) -> None:
    for fact, tensors in _each(case):
        size, rgb = fact["size"], tensors["input_u8"]
        assert tuple(fact["pad_color"]) == PAD_RGB
        assert pad_to_square(rgb).shape == (fact["padded_side"], fact["padded_side"], 3)
        expected = tensors[f"padded_resize_u8_{size}"]
        assert (square_canvas(rgb, size, exact_pil=True) == expected).all()


@pytest.mark.parametrize("case", CASES)
def test_fast_resize_stays_within_two_grey_levels(case: Path) -> None:
    for fact, tensors in _each(case):
        size = fact["size"]
        off = square_canvas(tensors["input_u8"], size).astype(int) - tensors[f"padded_resize_u8_{size}"]
        assert np.abs(off).max() <= 2


@pytest.mark.parametrize("case", CASES)
def test_normalised_pixels_agree(case: Path) -> None:
    for fact, tensors in _each(case):
        canvas_HWC = square_canvas(tensors["input_u8"], fact["size"], exact_pil=True)
        pixels_CHW = normalise(torch.from_numpy(canvas_HWC).permute(2, 0, 1)[None])[0].numpy()
        for name, expected in tensors.items():
            if not name.startswith("padded_resize_float"):
                continue
            stride = int(found[1]) if (found := re.search(r"_rows_stride(\d+)", name)) else 1
            np.testing.assert_allclose(pixels_CHW[:, ::stride], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_center_crop_is_exact(case: Path) -> None:
    for fact, tensors in _each(case):
        if "center_crop_resize_hw" in fact:
            assert list(center_crop_size(fact["h"], fact["w"], fact["size"])) == fact["center_crop_resize_hw"]
        for name, expected in tensors.items():
            if found := re.fullmatch(r"resized_center_crop_u8_(\d+)", name):
                ours = resized_center_crop(tensors["input_u8"], int(found[1]), exact_pil=True)
                assert (ours == expected).all()


@pytest.mark.parametrize("case", CASES)
def test_random_crop_is_exact_for_the_same_seed(case: Path) -> None:
    for fact, tensors in _each(case):
        for key, value in fact.items():
            if found := re.fullmatch(r"rrc_params_top_left_h_w_seed(\d+)", key):
                rng = torch.Generator().manual_seed(int(found[1]))
                assert random_crop(fact["h"], fact["w"], rng) == tuple(value)
        for key, expected in tensors.items():
            if found := re.fullmatch(r"random_resized_crop_u8_(\d+)_seed(\d+)", key):
                rng = torch.Generator().manual_seed(int(found[2]))
                ours = random_resized_crop(tensors["input_u8"], int(found[1]), rng, exact_pil=True)
                assert (ours == expected).all()
