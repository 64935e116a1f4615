from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from bestiary.inference.pictures import box, check_file, encoded, point, regions_of, stroke
from bestiary.schema import Region

PICTURE = Image.new("RGB", (40, 20), (9, 8, 7))


def test_pixels_become_fractions_of_each_side_and_marks_are_numbered_in_order() -> None:
    marks = [box(0, 0, 20, 20), point(10, 5), stroke(0, 0, 40, 10)]
    regions = regions_of(marks, "pixels", encoded(PICTURE))
    assert regions == (
        Region("box", (0.0, 0.0, 0.5, 1.0), 1),
        Region("point", (0.25, 0.25), 2),
        Region("stroke", (0.0, 0.0, 1.0, 0.5), 3),
    )


def test_fractions_need_no_picture_and_ready_regions_pass_as_they_are() -> None:
    assert regions_of([point(0.25, 1)], "fractions", None) == (Region("point", (0.25, 1.0), 1),)
    ready = [Region("point", (0.5, 0.5), 2), Region("point", (0.1, 0.5), 1)]
    assert regions_of(ready, None, None) == tuple(ready)


@pytest.mark.parametrize(
    ("marks", "frame", "image", "said"),
    [
        ([point(1, 1)], None, b"", "say frame="),
        ([point(1, 1)], "pixels", None, "add the picture"),
        ([point(1, 1)], "pixels", b"none", "give a JPEG"),
        ([point(1, 1)], "percent", b"", "use pixels or fractions"),
        ([Region("point", (0.5, 0.5), 1)], "pixels", b"", "fractions always"),
        ([Region("point", (0.5, 0.5), 1), point(0, 0)], "fractions", b"", "all of them"),
        ([(1, 2)], "pixels", b"", "all of them"),
    ],
)
def test_a_frame_is_never_guessed(marks: list, frame: str, image: bytes | None, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=said) as error:
        regions_of(marks, frame, image)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_picture_of_any_mode_reaches_the_model_with_its_pixels(mode: str) -> None:
    image = PICTURE.convert("L").convert(mode) if mode == "I;16" else PICTURE.convert("RGB").convert(mode)
    before = image.tobytes()
    with Image.open(io.BytesIO(encoded(image))) as sent:
        expected = image if sent.mode == mode else image.convert("RGB")
        assert sent.tobytes() == expected.tobytes()
    assert image.tobytes() == before


def test_files_and_bytes_pass_as_they_are_and_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"bytes")
    assert encoded(tmp_path / "a.jpg") == encoded(str(tmp_path / "a.jpg")) == encoded(b"bytes") == b"bytes"
    with pytest.raises(ValueError, match=r"b.jpg: no such file"):
        encoded(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="not list"):
        encoded([1, 2])  # type: ignore[arg-type]


def test_a_file_that_holds_no_whole_single_picture_is_named(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "whole.png")
    check_file(tmp_path / "whole.png")
    (tmp_path / "none.jpg").write_bytes(b"none")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    PICTURE.save(tmp_path / "moves.webp", save_all=True, append_images=[PICTURE.rotate(90)])
    for name, said in {
        "none.jpg": "is none",
        "cut.png": "damaged",
        "moves.webp": "animated",
        "b.jpg": "no such",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            check_file(tmp_path / name)
        assert str(error.value).startswith(f"picture {tmp_path / name}: ") and "\n" not in str(error.value)
