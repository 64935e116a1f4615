from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from bestiary.vision import image as image_module
from bestiary.vision.canvas import eighths_for_square
from bestiary.vision.image import decode, decode_rgb

PHOTO = Path(__file__).parents[2] / "data_modules" / "embedded" / "assets" / "photo-china.jpg"

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


def test_inverted_cmyk_is_what_pillow_reads() -> None:
    """Adobe's marker says the inks are stored inverted; its colour transform is 0 (CMYK) or 2 (YCCK)."""
    plain = _encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=90)
    for transform in (0, 2):
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
        body = plain[plain.index(b"\xff\xdb") :]
        data = b"\xff\xd8" + adobe + body
        assert (decode_rgb(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_8_bit_mode_becomes_rgb_and_transparency_is_dropped(mode: str) -> None:
    data = _encode(Image.fromarray(RGB).convert(mode), "PNG")
    assert (decode_rgb(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_of_16_bits_the_upper_8_count(colour: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (6, 7, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    upper = (values[:, :, : 3 if channels > 2 else 1] >> 8).astype(np.uint8)
    assert (decode_rgb(_png(7, 6, 16, colour, rows)) == upper).all()


def test_transparency_of_a_palette_is_dropped_and_pillows_warning_is_heard() -> None:
    data = _encode(Image.fromarray(RGB).convert("P"), "PNG", transparency=bytes(range(9)))
    with pytest.warns(UserWarning, match="Transparency"):
        assert decode_rgb(data).shape == RGB.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="the image is damaged"):
            decode_rgb(data)


def test_orientation_tags_are_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for form in ("JPEG", "PNG", "WEBP"):
        assert decode_rgb(_encode(Image.fromarray(RGB), form, exif=exif)).shape == RGB.shape


@pytest.mark.parametrize("name", ["icc_profile", "exif"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_profiles_and_tags_are_nobodys_business(form: str, name: str) -> None:
    data = _encode(Image.fromarray(RGB), form, **{name: b"Exif\0\0MM\0*\xff\xff\xff\xff" * 20})
    assert decode_rgb(data).shape == RGB.shape


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_moving_pictures_are_refused_and_single_frames_are_not(form: str) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    with pytest.raises(ValueError, match="is animated or has pages; write the one frame"):
        decode_rgb(_encode(frames[0], form, save_all=True, append_images=frames[1:]))
    assert decode_rgb(_encode(frames[0], form, save_all=True)).shape == RGB.shape


def test_a_slice_of_a_mapped_file_is_as_good_as_bytes() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        data = _encode(Image.fromarray(RGB), form)
        assert (decode_rgb(memoryview(b"ab" + data)[2:]) == decode_rgb(data)).all()
    with pytest.raises(ValueError, match="the image is none"):
        decode_rgb(memoryview(b"no picture"))


def test_a_large_jpeg_is_decoded_no_larger_than_asked_and_tells_its_stored_size() -> None:
    asked = []

    def eighths(width: int, height: int) -> int:
        asked.append((width, height))
        return 3

    picture = decode(PHOTO.read_bytes(), eighths=eighths)
    assert asked == [(400, 267)]
    assert (picture.width, picture.height, picture.eighths) == (400, 267, 3)
    assert picture.pixels_HWC.shape == (101, 150, 3)
    png = decode(_encode(Image.fromarray(RGB), "PNG"), eighths=eighths)
    assert (png.width, png.height, png.eighths) == (34, 21, 8)


def test_a_spare_byte_comes_after_the_same_pixels() -> None:
    for eighths in (None, lambda w, h: 2):
        plain = decode(PHOTO.read_bytes(), eighths=eighths).pixels_HWC
        wide = decode(PHOTO.read_bytes(), eighths=eighths, has_spare_byte=True).pixels_HWC
        assert wide.shape[2] == 4 and (wide[:, :, :3] == plain).all()
    assert decode(_encode(Image.fromarray(RGB), "PNG"), has_spare_byte=True).pixels_HWC.shape == RGB.shape


def test_every_scale_asked_for_is_the_scale_decoded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height = (int(v) for v in rng.integers(1, 400, 2))
        data = simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8))
        for side_px in (8, 21, 48):
            picture = decode(data, eighths=lambda w, h, side_px=side_px: eighths_for_square(w, h, side_px))
            shape = tuple(-(-side * picture.eighths // 8) for side in (height, width))
            assert picture.pixels_HWC.shape == (*shape, 3)


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    grey = (np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)
    decoded = decode_rgb(_encode(Image.fromarray(grey), "PNG"))
    assert (decoded == (grey >> 8)[:, :, None]).all()


def test_32_bit_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="convert it to 8-bit RGB"):
        decode_rgb(_encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_cut_file_is_damaged(form: str) -> None:
    data = _encode(Image.fromarray(RGB), form)
    with pytest.raises(ValueError, match=rf"the image is damaged \({len(data) // 2} bytes"):
        decode_rgb(data[: len(data) // 2])


@pytest.mark.parametrize("more", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_that_lost_data_is_damaged_even_where_pillow_paints_it_grey(more: dict[str, object]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    data = _encode(Image.fromarray(rgb), "JPEG", **more)
    half = data[: len(data) // 2]
    for cut in (half, half + b"\xff\xd9", data[:-40]):
        for eighths in (None, lambda w, h: 2):
            with pytest.raises(ValueError, match="the image is damaged"):
                decode(cut, eighths=eighths)


def test_layouts_of_colours_without_a_name_go_to_pillow() -> None:
    data = bytearray(_encode(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "JPEG"))
    data[data.index(b"\xff\xc0") + 11] = 0x14  # one chroma sample for four rows: rare, allowed
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(bytes(data))
    assert (decode_rgb(bytes(data)) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_a_few_superfluous_bytes_do_no_harm() -> None:
    data = _encode(Image.fromarray(RGB), "JPEG")
    assert (decode_rgb(data[:-2] + bytes(range(1, 4)) + data[-2:]) == decode_rgb(data)).all()
    assert (decode_rgb(data + b"trailing" * 9) == decode_rgb(data)).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0" + bytes(50),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch canary) run\n",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%PDF-1.7\n",
        b"\x80\x04\x95",
        b"P6 3 3 255\n" + bytes(27),
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(data)} bytes"):
        decode_rgb(data)


@pytest.mark.parametrize("data", [_encode(Image.fromarray(RGB), "PNG"), simplejpeg.encode_jpeg(RGB)])
def test_bombs_are_refused_before_decoding(data: bytes) -> None:
    with pytest.raises(ValueError, match="34x21 pixels, more than 713"):
        decode_rgb(data, max_pixels=713)
    assert decode_rgb(data, max_pixels=714).shape == RGB.shape


def _jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header announces another size."""
    data = bytearray(_encode(Image.fromarray(RGB), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _webp_of_size(width: int, height: int) -> bytes:
    head = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0])
    body = (
        head + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + b"ANIM" + bytes([6, *[0] * 9])
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _tiff_of_size(width: int, height: int) -> bytes:
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 99))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        _jpeg_of_size(65_500, 65_500),
        _jpeg_of_size(9_000, 9_000),
        _png(50_000, 50_000, 8, 2, bytes(10_000)),
        _png(2**31 - 1, 2**31 - 1, 1, 0, b""),
        _png(9_000, 9_000, 8, 2, bytes(100_000)),
        _webp_of_size(1 << 24, 1 << 7),
        _webp_of_size(16_383, 16_383),
        _tiff_of_size(60_000, 60_000),
        _tiff_of_size(9_000, 9_000),
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(9),
        _png(9, 9, 8, 2, bytes(28 * 9), _chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(9_000_000), 9))),
        _png(9, 9, 8, 2, bytes(28 * 9), _chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(bytes(9_000_000), 9))),
    ],
    ids=[
        "jpeg",
        "jpeg-lie",
        "png",
        "png-max",
        "png-lie",
        "webp",
        "webp-canvas",
        "tiff",
        "tiff-lie",
        "gif",
        "png-text",
        "png-itext",
    ],
)
def test_absurd_sizes_and_bombs_cost_neither_time_nor_memory(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"^the image") as info:
        decode_rgb(data)
    assert time.process_time() - started < 1 and "\n" not in str(info.value)


def test_a_file_larger_than_any_picture_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the image file has 1001 bytes, more than 1000"):
        decode_rgb(bytes(1001))


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused() -> None:
    rgb = np.zeros((1000, 1000, 3), dtype=np.uint8)
    data = _encode(Image.fromarray(rgb), "JPEG", progressive=True)
    assert decode_rgb(data).shape == rgb.shape
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * 2000 + data[-2:]
    started = time.process_time()
    with pytest.raises(ValueError, match=r"the image has \d+ scans of 1000000 pixels each"):
        decode_rgb(bomb)
    assert time.process_time() - started < 1


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
