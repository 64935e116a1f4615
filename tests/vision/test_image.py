from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from bestiary.vision.image import decode_rgb

RGB = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)


def _encode(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_files_come_back(form: str) -> None:
    decoded = decode_rgb(_encode(Image.fromarray(RGB), form))
    assert (decoded == RGB).all() and decoded.dtype == np.uint8 and decoded.flags.writeable


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpegs_are_what_pillow_reads(mode: str, subsampling: int) -> None:
    data = _encode(Image.fromarray(RGB).convert(mode), "JPEG", quality=90, subsampling=subsampling)
    assert (decode_rgb(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    assert decode_rgb(_encode(Image.fromarray(RGB).convert(mode), "PNG")).shape == RGB.shape


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    grey = (np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)
    decoded = decode_rgb(_encode(Image.fromarray(grey), "PNG"))
    assert (decoded == (grey >> 8)[:, :, None]).all()


def test_32_bit_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="convert it to 8-bit RGB"):
        decode_rgb(_encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_cut_file_is_damaged(form: str) -> None:
    data = _encode(Image.fromarray(RGB), form)
    with pytest.raises(ValueError, match=rf"the image is damaged \({len(data) // 2} bytes"):
        decode_rgb(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\xff\xd8", b"\xff\xd8\xff\xe0" + bytes(50), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(data)} bytes"):
        decode_rgb(data)


@pytest.mark.parametrize("data", [_encode(Image.fromarray(RGB), "PNG"), simplejpeg.encode_jpeg(RGB)])
def test_bombs_are_refused_before_decoding(data: bytes) -> None:
    with pytest.raises(ValueError, match="34x21 pixels, more than 713"):
        decode_rgb(data, max_pixels=713)
    assert decode_rgb(data, max_pixels=714).shape == RGB.shape


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(200))
def test_flipped_bytes_give_pixels_or_one_kind_of_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    form = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")[seed % 6]
    data = bytearray(_encode(Image.fromarray(RGB), form))
    for at in rng.integers(0, len(data), 6):
        data[at] = int(rng.integers(0, 256))
    try:
        assert decode_rgb(bytes(data), max_pixels=10_000_000).ndim == 3
    except ValueError as error:
        assert "image" in str(error)
