"""Hostile and odd pictures, through real shards and the real stream."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_modules.shards import write_samples
from tests.data_modules.hostile import RGB, Canary, Epoch, blames, encoded, epoch_of, good, pair, tar_of


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _webp_of_size(width: int, height: int) -> bytes:
    head = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0])
    body = (
        head + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + b"ANIM" + bytes([6, *[0] * 9])
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _moving(form: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _scans() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1200, 1200)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 3000 + data[-2:]


def _rows16(channels: int) -> bytes:
    values = np.random.default_rng(0).integers(0, 65_536, (6, 7 * channels), dtype=np.uint16)
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


REFUSED: dict[str, tuple[bytes, str]] = {
    "cut-jpeg": (encoded()[:-300], "the image is damaged"),
    "cut-and-closed-jpeg": (encoded()[:-300] + b"\xff\xd9", "the image is damaged"),
    "cut-progressive": (encoded(progressive=True)[:-300], "the image is damaged"),
    "cut-png": (encoded("PNG")[:-300], "the image is damaged"),
    "cut-webp": (encoded("WEBP")[:-200], "the image is damaged"),
    "head-only": (b"\xff\xd8\xff\xe0" + bytes(40), "the image is none"),
    "png-head-only": (b"\x89PNG\r\n\x1a\n", "the image is none"),
    "webp-head-only": (b"RIFF\xff\xff\xff\x7fWEBP", "the image is"),
    "jpeg-bomb": (_jpeg_of_size(65_500, 65_500), "65500x65500 pixels, more than"),
    "jpeg-that-lies": (_jpeg_of_size(9_400, 9_400), "cannot hold its 9400x9400 pixels"),
    "png-bomb": (_png(40_000, 40_000, 8, 2, bytes(99)), "the image is too large"),
    "png-header-bomb": (_png(2**31 - 1, 2**31 - 1, 16, 6, b""), "the image is too large"),
    "png-text-bomb": (
        _png(7, 6, 8, 2, bytes(22 * 6), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9_000_000)))),
        "the image is damaged",
    ),
    "webp-bomb": (_webp_of_size(16_383, 16_383), "the image is"),
    "webp-canvas-bomb": (_webp_of_size(1 << 24, 1 << 7), "the image is"),
    "scan-bomb": (_scans(), "scans of 1440000 pixels each"),
    "strip": (_png(40_000, 1, 8, 0, b"\0" + bytes(40_000)), "its square more than"),
    "moving-webp": (_moving("WEBP"), "animated"),
    "moving-png": (_moving("PNG"), "animated"),
}
SOUND: dict[str, bytes] = {
    "cmyk": encoded(mode="CMYK"),
    "grey": encoded(mode="L"),
    "progressive": encoded(progressive=True),
    "grey-16": _png(7, 6, 16, 0, _rows16(1)),
    "rgb-16": _png(7, 6, 16, 2, _rows16(3)),
    "rgba-16": _png(7, 6, 16, 6, _rows16(4)),
    "palette": encoded("PNG", "P"),
    "one-bit": encoded("PNG", "1"),
    "grey-alpha": encoded("PNG", "LA"),
    "alpha": encoded("PNG", "RGBA"),
    "lossless-webp": encoded("WEBP", lossless=True),
    "bad-profile": encoded(icc_profile=b"\xff" * 400),
    "bad-exif": encoded(exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xee" * 90),
    "turned": encoded(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "tail": encoded() + b"GIF89a and a tail of something else",
}


def _epoch(folder: Path, caplog: pytest.LogCaptureFixture, pictures: dict[str, bytes]) -> Epoch:
    samples = [good(number) for number in range(len(pictures))]
    samples += [good(0, key=name, images=(data,)) for name, data in pictures.items()]
    write_samples(folder, samples, source="set", samples_per_shard=15)
    return epoch_of(folder, caplog, bad_budget=1.0)


def test_every_picture_that_is_refused_is_one_counted_line_and_costs_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.process_time()
    seen = _epoch(tmp_path / "set", caplog, {name: data for name, (data, _) in REFUSED.items()})
    assert time.process_time() - started < 20
    assert not seen.keys & REFUSED.keys() and len(seen.keys) == len(REFUSED)
    assert seen.counted == len(REFUSED) == len(seen.warned)
    assert all(line.endswith(" decode") for line in seen.lines) and len(seen.lines) == 2
    for name, (_, what) in REFUSED.items():
        assert blames(seen, "shard-0000", f"sample {name}:", what), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_but_sound_pictures_come_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = _epoch(tmp_path / "set", caplog, SOUND)
    assert seen.keys >= SOUND.keys() and not seen.counted and not seen.lines


@pytest.mark.parametrize(
    "data",
    [
        _moving("GIF"),
        encoded("TIFF"),
        encoded("BMP"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(CANARY) (w) file closefile\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"push graphic-context\nfill 'url(https://127.0.0.1/x.jpg\"|touch \"CANARY)'\npop graphic-context",
        b"",
        b"\x80\x04\x95",
    ],
    ids=["gif", "tiff", "bmp", "eps", "svg", "mvg", "empty", "pickle"],
)
def test_files_that_are_no_picture_of_a_shard_are_refused_by_their_first_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    canary = Canary(tmp_path / "canary")
    data = data.replace(b"CANARY", str(canary.path).encode())
    with pytest.raises(ValueError, match="encode it as JPEG, PNG or WebP"):
        write_samples(tmp_path / "own", [good(0, images=(data,))], source="set")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part.tar").write_bytes(
        tar_of([*pair("a"), ("evil.jpg", data), ("evil.txt", b"words"), *pair("b")])
    )
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/a", "part/b"} and seen.counted == 1
    assert blames(seen, "part.tar", "part/evil", "no JPEG, PNG or WebP")
    canary.assert_untouched()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(12))
def test_flipped_pictures_are_pixels_or_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    originals: list[Any] = [encoded(), encoded(progressive=True), encoded("PNG"), encoded("WEBP"), encoded(mode="CMYK")]
    pictures = {}
    for number in range(60):
        data = bytearray(originals[number % len(originals)])
        reach = len(data) if rng.random() < 0.5 else min(len(data), 300)
        for at in rng.integers(12, reach, int(rng.integers(1, 6))):
            data[at] = int(rng.choice([0, 255, 1, 127, 128, int(rng.integers(0, 256))]))
        pictures[f"flip-{number}"] = bytes(data)
    seen = _epoch(tmp_path / "set", caplog, pictures)
    assert len(seen.keys) + seen.counted == 2 * len(pictures)
    assert len([line for line in seen.warned if "left out (decode)" in line]) == seen.counted
