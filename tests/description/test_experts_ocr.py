"""Real reading with the models that rapidocr brings."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from bestiary.description.ocr import RapidReader
from bestiary.vision.image import decode_rgb

pytestmark = pytest.mark.slow

LINES = {"HARBOUR LIGHTS": (30, 40), "Tickets 12.50": (180, 180), "open until seven": (60, 330)}
PHOTO = "data/mdvp_bench/ocr_spotting_QA/images/0000119.jpg"
SIZE = (440, 420)


@pytest.fixture(scope="module")
def reader() -> RapidReader:
    return RapidReader()


@pytest.fixture(scope="module")
def page() -> tuple[np.ndarray, dict[str, tuple[float, float, float, float]]]:
    """A page and where each line stands on it, in shares."""
    image = Image.new("RGB", SIZE, (250, 240, 210))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(36)
    places = {}
    for text, place in LINES.items():
        draw.text(place, text, fill=(140, 20, 20), font=font)
        box = draw.textbbox(place, text, font=font)
        places[text] = tuple(value / SIZE[index % 2] for index, value in enumerate(box))
    return np.asarray(image), places


def test_every_line_is_read_where_it_stands(
    reader: RapidReader, page: tuple[np.ndarray, dict[str, tuple[float, float, float, float]]]
) -> None:
    picture, places = page
    found = {one.caption: one for one in reader(picture)}
    assert set(found) == set(places)
    for text, box in places.items():
        assert np.allclose(found[text].box, box, atol=0.04) and found[text].score is not None
        assert found[text].score > 0.85  # what the published filter keeps
        assert [round(side, 3) for side in found[text].box] == list(found[text].box)


def test_a_reader_in_a_worker_with_other_threads_reads_the_same(
    reader: RapidReader, page: tuple[np.ndarray, dict[str, tuple[float, float, float, float]]]
) -> None:
    other = pickle.loads(pickle.dumps(RapidReader(threads=2)))
    assert other(page[0]) == reader(page[0]) and other.fingerprint == reader.fingerprint


def test_a_strip_without_text_gives_nothing_and_no_harm(reader: RapidReader) -> None:
    assert reader(np.full((1, 500, 3), 200, np.uint8)) == []


def test_a_line_on_a_long_strip_is_read_and_its_box_stays_on_it(reader: RapidReader) -> None:
    image = Image.new("RGB", (900, 60), "white")
    ImageDraw.Draw(image).text((500, 8), "station exit", fill="black", font=ImageFont.load_default(36))
    (found,) = reader(np.asarray(image))
    assert found.caption.replace(" ", "") == "stationexit"
    assert found.box[0] == pytest.approx(500 / 900, abs=0.02) and 0 <= found.box[1] < found.box[3] <= 1


def test_a_real_picture_is_read(reader: RapidReader) -> None:
    """A photo of a shop's sign in $BESTIARY_SHARED (the folder with data/mdvp_bench)."""
    picture = Path(os.environ.get("BESTIARY_SHARED", ".")) / PHOTO
    if not picture.is_file():
        pytest.skip(f"no {PHOTO}; set BESTIARY_SHARED to the folder that holds data/")
    texts = {one.caption: one for one in reader(decode_rgb(picture.read_bytes()))}
    assert np.allclose(texts["CHIPS"].box, (0.424, 0.348, 0.529, 0.362), atol=0.02)
