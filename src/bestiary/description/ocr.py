"""Texts of a picture by rapidocr: PP-OCR detection, direction and recognition models that come with the package."""

from __future__ import annotations

import importlib.metadata
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.description.words import Described, share_box

# The models the package brings, by its names for their use.
_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}
# Of the package itself: wider pictures are padded, to half of that (config.yaml, width_height_ratio).
_LONGEST, _PADDED_TO = 8, 4


class RapidReader:
    """Reads texts with rapidocr, the direction classifier on, as published (ocr_ppocr.py).

    threads: CPU threads of one call; the texts do not depend on it. Pickling leaves the opened models behind.
    """

    name = "rapidocr"

    def __init__(self, *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads {threads} is none; use 1 or more")
        self.threads = threads
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"threads": self.threads, "_opened": None}

    @cached_property
    def fingerprint(self) -> str:
        """The package's version and models; ValueError when the package is not installed."""
        return f"rapidocr {importlib.metadata.version('rapidocr')} {_identity(_models_folder())}"

    def __call__(self, picture: np.ndarray) -> list[Described]:
        """The texts from top to bottom; corners 0 and 2 make the box, score is the recogniser's confidence.

        picture: uint8[H, W, 3], RGB.
        """
        if self._opened is None:
            self._opened = _open(_models_folder(), self.threads)
        height, width = picture.shape[:2]
        found = self._opened(np.ascontiguousarray(padded(picture)[..., ::-1]))  # the package takes arrays as BGR
        if found.txts is None:
            return []
        return [
            Described(text, share_box(_inside(corners, width, height), width, height), float(score))
            for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        ]


def padded(picture: np.ndarray) -> np.ndarray:
    """The picture with black below or right of it if a side is more than 8 times the other; else itself.

    The package enlarges the short side to 736 pixels whatever becomes of the long one: a strip of 1 x 500 pixels
    would take minutes and all memory.
    """
    height, width = picture.shape[:2]
    if max(height, width) <= _LONGEST * min(height, width):
        return picture
    shortest = max(height, width) // _PADDED_TO
    missing = ((0, max(0, shortest - height)), (0, max(0, shortest - width)), (0, 0))
    return np.pad(picture, missing)


def _inside(corners: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    """Corners 0 and 2 without what lies in the padding."""
    (x1, y1), (x2, y2) = corners[0], corners[2]
    return min(float(x1), width), min(float(y1), height), min(float(x2), width), min(float(y2), height)


def _models_folder() -> Path:
    """Where the package's models lie, found without importing it."""
    missing = [package for package in ("rapidocr", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise ValueError(f"reading texts needs {' and '.join(missing)}: pip install 'bestiary[describe]'")
    spec = find_spec("rapidocr")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    # Named here, because the package would download a model it does not find.
    if lost := [name for name in _MODELS.values() if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {lost[0]}; pip install --force-reinstall 'bestiary[describe]'")
    return folder


def _identity(folder: Path) -> str:
    digest = sha256()
    for name in _MODELS.values():
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def _open(folder: Path, threads: int) -> Any:
    import cv2
    from rapidocr import RapidOCR

    cv2.setNumThreads(threads)  # of the process: OpenCV has no other place for it
    engine = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            f"{engine}.intra_op_num_threads": threads,
            f"{engine}.inter_op_num_threads": 1,
            # It warns of every picture without text.
            "Global.log_level": "error",
            **{f"{use}.model_path": str(folder / name) for use, name in _MODELS.items()},
        }
    )
