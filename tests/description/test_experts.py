from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.description.blip2 import Blip2Captioner, Blip2Matcher, words_to_match
from bestiary.description.florence import FlorenceRegions, Region, described, parse_regions
from bestiary.description.model_folder import ModelFolder
from bestiary.description.ocr import RapidReader, padded
from bestiary.description.sam import SamMasks, from_runs, without_doubles

PHRASES = st.text("ab é.,1_", min_size=1, max_size=12).filter(lambda text: text == text.strip() and bool(text))
BINS = st.tuples(*[st.integers(0, 999)] * 4)


@given(st.lists(st.tuples(PHRASES, st.lists(BINS, min_size=1, max_size=3)), max_size=5))
@settings(max_examples=25, deadline=None)
def test_every_region_that_is_written_is_read_again(written: list[tuple[str, list[tuple[int, int, int, int]]]]) -> None:
    boxes = [(phrase, "".join(f"<loc_{n}>" for box in some for n in box)) for phrase, some in written]
    answer = "</s><s>" + "".join(phrase + places for phrase, places in boxes) + "</s><pad>"
    assert parse_regions(answer) == [Region(phrase, box) for phrase, some in written for box in some]


@given(st.lists(st.sampled_from(["<loc_1>", "<loc_999>", "<loc_1000>", "a", " ", "<", ">", "<s>", "<loc_>", "<od>"])))
@settings(max_examples=40, deadline=None)
def test_any_answer_gives_whole_boxes_with_phrases(pieces: list[str]) -> None:
    for region in parse_regions("".join(pieces)):
        assert region.phrase.strip() == region.phrase != ""
        assert all(0 <= number < 1000 for number in region.bins)


def test_a_box_without_a_phrase_or_cut_off_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = "<loc_1><loc_2><loc_3><loc_4>", "<loc_1><loc_2>"
    assert parse_regions(f"{whole}cat{cut}dog{whole}bird{cut}") == [Region("dog", (1, 2, 3, 4))]
    assert "3 boxes" in caplog.text


@given(BINS, st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=25, deadline=None)
def test_boxes_lie_in_the_picture_and_near_the_middles_of_their_bins(
    bins: tuple[int, int, int, int], width: int, height: int
) -> None:
    (found,) = described([Region("cat", bins)], width, height)
    x1, y1, x2, y2 = found.box
    assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1
    assert abs(x1 - (min(bins[0], bins[2]) + 0.5) / 1000) <= 1 / width + 0.001
    assert abs(y2 - (max(bins[1], bins[3]) + 0.5) / 1000) <= 1 / height + 0.001


@given(st.lists(st.booleans(), min_size=6, max_size=60), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_run_lengths_down_the_columns_give_the_mask_back(cells: list[bool], height: int) -> None:
    width = len(cells) // height
    mask = np.array(cells[: height * width]).reshape(height, width)
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    assert (from_runs(counts.tolist(), height, width) == mask).all()


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4, st.integers(0, 5)), max_size=12), st.sampled_from([0.0, 0.5, 0.7]))
@settings(max_examples=30, deadline=None)
def test_what_stays_overlaps_little_and_what_goes_overlaps_a_better_one(
    drawn: list[tuple[int, int, int, int, int]], limit: float
) -> None:
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, _ in drawn], dtype=float).reshape(-1, 4)
    scores = np.array([float(score) for *_, score in drawn])
    kept = without_doubles(boxes, scores, limit)
    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for index in range(len(boxes)):
        better = [other for other in kept if other != index and scores[other] >= scores[index]]
        overlaps = [_iou(boxes[index], boxes[other]) > limit for other in better]
        assert any(overlaps) if index not in kept else not any(overlaps)


def _iou(one: np.ndarray, two: np.ndarray) -> float:
    sides = np.clip(np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2]), 0, None)
    union = np.prod(one[2:] - one[:2]) + np.prod(two[2:] - two[:2]) - np.prod(sides)
    return float(np.prod(sides) / union) if union else 0.0


def test_captions_are_matched_in_the_words_the_head_was_trained_on() -> None:
    assert words_to_match(' "A Cat"; (on)\n the~mat!  ') == "a cat on the mat"
    assert words_to_match("word " * 60) == " ".join(["word"] * 50)
    assert words_to_match("") == ""


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_a_strip_is_padded_until_its_sides_are_alike_and_its_pixels_stay(height: int, width: int) -> None:
    picture = np.full((height, width, 3), 7, np.uint8)
    found = padded(picture)
    assert (found[:height, :width] == 7).all() and found.sum() == picture.sum()
    assert max(found.shape[:2]) <= 8 * min(found.shape[:2])
    assert (found is picture) == (max(height, width) <= 8 * min(height, width))


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (Blip2Captioner, "Salesforce/blip2-opt-2.7b"),
        (Blip2Matcher, "Salesforce/blip2-itm-vit-g"),
        (FlorenceRegions, "florence-community/Florence-2-large"),
        (SamMasks, "facebook/sam-vit-huge"),
    ],
)
def test_a_folder_without_the_model_is_named_with_the_command_that_fills_it(
    make: type, source: str, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    for has in ("is no folder", "has no config.json", "holds a model of type 'clip'"):
        with pytest.raises(ValueError, match=has) as caught:
            _ = make(ModelFolder(gone)).fingerprint
        assert f"hf download {source} --local-dir {gone}" in str(caught.value) and "\n" not in str(caught.value)
        gone.mkdir(exist_ok=True)
        if has == "has no config.json":
            (gone / "config.json").write_text('{"model_type": "clip"}')


def test_a_folder_without_weights_or_with_a_torn_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(ValueError, match=r"has no weights \(\*.safetensors or \*.bin\)"):
        ModelFolder(tmp_path).check("sam", "facebook/sam-vit-huge")
    (tmp_path / "config.json").write_text('{"model_')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ModelFolder(tmp_path).check("sam", "facebook/sam-vit-huge")


def test_the_fingerprint_follows_the_weights_the_config_and_the_settings(tmp_path: Path) -> None:
    def fingerprint(dtype: str = "float32") -> str:
        return SamMasks(ModelFolder(tmp_path, dtype=dtype)).fingerprint

    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(json.dumps({"model_type": "sam"}))
    weights.write_bytes(bytes(100_000))
    (tmp_path / "README.md").write_text("one")
    seen = [fingerprint()]
    (tmp_path / "README.md").write_text("another")
    assert fingerprint() == seen[0]
    weights.write_bytes(bytes(50_000) + b"\1" + bytes(49_999))  # equal name, equal size
    seen.append(fingerprint())
    config.write_text(json.dumps({"model_type": "sam", "layers": 2}))
    seen += [fingerprint(), fingerprint("bfloat16")]
    assert len(set(seen)) == 4


def test_settings_without_sense_are_refused_where_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype 'half' of .* is unknown; use float32, bfloat16, float16"):
        ModelFolder(tmp_path, dtype="half")
    folder = ModelFolder(tmp_path)
    for make in (
        lambda: Blip2Captioner(folder, batch_size=0),
        lambda: Blip2Matcher(folder, batch_size=0),
        lambda: SamMasks(folder, points_per_batch=0),
        lambda: RapidReader(threads=0),
    ):
        with pytest.raises(ValueError, match="use 1 or more"):
            make()


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.description.ocr.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs rapidocr and onnxruntime: pip install 'bestiary\[describe\]'"):
        _ = RapidReader().fingerprint


def test_an_expert_goes_to_a_worker_without_what_it_has_opened(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, dtype="bfloat16")
    folder._opened = ("SamModel", lambda: None, None)  # what no pickle takes
    sent = pickle.loads(pickle.dumps(SamMasks(folder)))
    assert sent.folder == folder and sent.folder._opened is None
    reader = RapidReader(threads=2)
    reader._opened = lambda: None
    assert pickle.loads(pickle.dumps(reader)).threads == 2
