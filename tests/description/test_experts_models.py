"""The experts that open a model, on small random ones, against straightforward uses of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bestiary.description.blip2 import SEGMENT_CAPTION, Blip2Captioner, Blip2Matcher
from bestiary.description.florence import FlorenceRegions, described, parse_regions
from bestiary.description.model_folder import ModelFolder
from bestiary.description.sam import MaskSettings, SamMasks
from tests.description import tiny_models

pytestmark = pytest.mark.slow

# One of a single row: no size may be mistaken for channels.
SIZES = [(20, 30), (1, 9), (33, 28), (50, 3)]
CAPTIONS = ["a cat", "The dog, on the cat.", "", "red " * 70]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "captions": tiny_models.blip2(root / "captions"),
        "match": tiny_models.blip2(root / "match", is_matcher=True),
        "florence": tiny_models.florence(root / "florence"),
        "sam": tiny_models.sam(root / "sam"),
    }


def test_captions_are_those_of_transformers_whatever_the_batch(
    folders: dict[str, Path], pictures: list[np.ndarray]
) -> None:
    import transformers

    captioner = Blip2Captioner(ModelFolder(folders["captions"]), batch_size=3)
    captions = captioner(pictures)
    assert captions == [captioner([picture])[0] for picture in pictures] and len(set(captions)) > 1
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["captions"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders["captions"], backend="pil")
    for picture, caption in zip(pictures, captions, strict=True):
        inputs = processor(images=Image.fromarray(picture), return_tensors="pt")
        ids = model.generate(**inputs, num_beams=5, max_new_tokens=30)
        assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == caption


def test_published_settings_reach_the_search_and_two_captioners_share_weights(
    folders: dict[str, Path], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Blip2Captioner(ModelFolder(folders["captions"]))
    segments = whole.with_settings(SEGMENT_CAPTION)
    assert whole.fingerprint != segments.fingerprint
    model, _ = whole.folder.load("Blip2ForConditionalGeneration")
    asked: list[dict[str, Any]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **named: asked.append(named) or generate(**named))
    assert whole(pictures) != segments(pictures)
    searches = [(one["num_beams"], one["max_new_tokens"], one["do_sample"]) for one in asked]
    assert searches == [(5, 30, False)] * 2 + [(1, 30, False)] * 2
    assert [len(one["pixel_values"]) for one in asked] == [2, 2, 2, 2]


def test_matches_are_probabilities_of_transformers_whatever_the_batch(
    folders: dict[str, Path], pictures: list[np.ndarray]
) -> None:
    import transformers

    scores = Blip2Matcher(ModelFolder(folders["match"]), batch_size=3)(pictures, CAPTIONS)
    one_by_one = Blip2Matcher(ModelFolder(folders["match"]), batch_size=1)(pictures, CAPTIONS)
    assert scores == pytest.approx(one_by_one, abs=1e-6) and all(0 < score < 1 for score in scores)
    model = transformers.Blip2ForImageTextRetrieval.from_pretrained(folders["match"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders["match"], backend="pil")
    # Lower case, no marks; the last one is cut at 32 tokens.
    for picture, caption, score in zip(
        pictures, ["a cat", "the dog, on the cat", "", "red " * 32], scores, strict=True
    ):
        inputs = processor(images=Image.fromarray(picture), text=caption, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, use_image_text_matching_head=True).logits_per_image
        assert float(logits.softmax(1)[0, 1]) == pytest.approx(score, abs=1e-6)
    with pytest.raises(ValueError, match="2 captions for 1 crops"):
        Blip2Matcher(ModelFolder(folders["match"]))(pictures[:1], CAPTIONS[:2])


def test_places_are_asked_for_with_the_published_words_and_settings(
    folders: dict[str, Path], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = FlorenceRegions(ModelFolder(folders["florence"]), max_new_tokens=24)
    model, processor = regions.folder.load("Florence2ForConditionalGeneration")
    asked: list[dict[str, Any]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **named: asked.append(named) or generate(**named))
    answer = regions.answer(pictures[0])
    assert answer == regions.answer(pictures[0]) and "<loc_" in answer
    assert asked[0]["num_beams"] == 3 and asked[0]["max_new_tokens"] == 24
    expected = processor(text="<DENSE_REGION_CAPTION>", images=Image.fromarray(pictures[0]), return_tensors="pt")
    assert torch.equal(asked[0]["input_ids"], expected["input_ids"])
    assert torch.equal(asked[0]["pixel_values"], expected["pixel_values"])
    for picture in pictures:
        assert all(0 <= side <= 1 for one in regions(picture) for side in one.box)
    published = FlorenceRegions(regions.folder)
    assert published.fingerprint.endswith("beams=3 new_tokens=1024")
    published.answer(pictures[0])
    assert asked[-1]["max_new_tokens"] == 128  # the small decoder has no more places


def test_regions_are_those_of_the_library_own_reader(folders: dict[str, Path]) -> None:
    _, processor = ModelFolder(folders["florence"]).load("Florence2ForConditionalGeneration")
    random = np.random.default_rng(1)
    reader = processor.post_processor
    for _ in range(50):
        places = ["".join(f"<loc_{n}>" for n in random.integers(0, 1000, 4 * random.integers(1, 3))) for _ in range(3)]
        answer = f"</s><s>a cat{places[0]}the dog on a cat{places[1]}red{places[2]}</s>"
        width, height = (int(side) for side in random.integers(1, 3000, 2))
        theirs = reader.parse_description_with_bboxes_from_text_and_spans(answer, image_size=(width, height))
        ours = described(parse_regions(answer), width, height)
        assert [one.caption for one in ours] == [one["cat_name"] for one in theirs]
        for our, their in zip(ours, theirs, strict=True):
            x1, y1, x2, y2 = their["bbox"]
            ordered = [min(x1, x2) / width, min(y1, y2) / height, max(x1, x2) / width, max(y1, y2) / height]
            # Theirs counts in float32: on the edge of a pixel it may be the one below.
            assert np.allclose(our.box, ordered, atol=1 / min(width, height) + 6e-4)


def test_masks_are_those_of_single_points_whatever_the_batch(
    folders: dict[str, Path], pictures: list[np.ndarray]
) -> None:
    """With every filter open, each of the grid's points gives the three masks transformers gives for it alone."""
    folder, picture = ModelFolder(folders["sam"]), pictures[2]
    open_wide = MaskSettings(points_per_side=3, pred_iou=-1e9, stability=-1.0, nms_iou=1.0)
    all_at_once = SamMasks(folder, settings=open_wide)(picture)
    in_parts = SamMasks(folder, settings=open_wide, points_per_batch=2)(picture)
    assert _bytes(all_at_once) == _bytes(in_parts)
    model, processor = folder.load("SamModel")
    height, width = picture.shape[:2]
    expected = []
    for row in range(3):
        for column in range(3):
            point = [(column + 0.5) / 3 * width, (row + 0.5) / 3 * height]
            inputs = processor(Image.fromarray(picture), input_points=[[point]], return_tensors="pt")
            with torch.no_grad():
                answer = model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
            masks = processor.image_processor.post_process_masks(
                answer.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )[0][0]
            expected += [mask.numpy() for mask in masks if mask.any()]
    assert len(all_at_once) == len(expected) > 0
    assert sorted(mask.area for mask in all_at_once) == pytest.approx(
        sorted(int(mask.sum()) for mask in expected), abs=1
    )
    assert all(mask.pixels.shape == (height, width) and mask.pixels.dtype == bool for mask in all_at_once)


def _bytes(masks: list[Any]) -> list[bytes]:
    return sorted(mask.pixels.tobytes() for mask in masks)


def test_the_published_filters_are_the_default_and_filter(folders: dict[str, Path], pictures: list[np.ndarray]) -> None:
    masks = SamMasks(ModelFolder(folders["sam"]))
    assert masks.fingerprint.endswith(" 32 0.88 0.95 1.0 0.7")
    assert masks(pictures[0]) == []  # random weights are sure of nothing
    loose = MaskSettings(points_per_side=4, pred_iou=-1e9, stability=-1.0)
    with_doubles = MaskSettings(points_per_side=4, pred_iou=-1e9, stability=-1.0, nms_iou=1.0)
    num_segments = [len(SamMasks(masks.folder, settings=settings)(pictures[2])) for settings in (loose, with_doubles)]
    assert num_segments[0] < num_segments[1]


def test_a_folder_with_other_tensors_is_refused_in_one_line(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"cannot be opened as Blip2ForConditionalGeneration: .* missing") as caught:
        Blip2Captioner(ModelFolder(folders["match"]))([np.zeros((4, 4, 3), np.uint8)])
    assert "\n" not in str(caught.value) and str(folders["match"]) in str(caught.value)


def test_torn_weights_and_a_missing_processor_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_models.sam(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be opened as SamModel: ") as caught:
        SamMasks(ModelFolder(folder))(np.zeros((4, 4, 3), np.uint8))
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot be opened as SamModel: "):
        SamMasks(ModelFolder(folder))(np.zeros((4, 4, 3), np.uint8))


def test_bin_weights_are_read_but_never_unpickled(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same folder with .bin weights gives the same scores; one with code in it is refused before it runs."""
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    shutil.copytree(folders["match"], folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    picture = [np.full((9, 9, 3), 90, np.uint8)]
    assert Blip2Matcher(ModelFolder(folder))(picture, ["a cat"]) == Blip2Matcher(ModelFolder(folders["match"]))(
        picture, ["a cat"]
    )
    ran = tmp_path / "ran"
    torch.save({"itm_head.weight": _Runs(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Blip2Matcher(ModelFolder(folder))(picture, ["a cat"])
    assert not ran.exists()


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_half_precision_is_an_option_of_the_folder(folders: dict[str, Path], pictures: list[np.ndarray]) -> None:
    full = Blip2Matcher(ModelFolder(folders["match"]))(pictures, CAPTIONS)
    half = Blip2Matcher(ModelFolder(folders["match"], dtype="bfloat16"))(pictures, CAPTIONS)
    assert half != full and half == pytest.approx(full, abs=0.05)
