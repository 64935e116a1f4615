"""Segment Anything's automatic masks through transformers: a grid of points, filters, and no doubles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from bestiary.description.model_folder import ModelFolder
from bestiary.description.words import Mask

SOURCE = "facebook/sam-vit-huge"


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """What counts as a segment. Source of the values: segment_anything's automatic_mask_generator, its defaults."""

    points_per_side: int = 32
    pred_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    nms_iou: float = 0.7


@dataclass(frozen=True, slots=True)
class _Found:
    """Segments before doubles go: run lengths down the columns, scores [N], boxes [N, 4] in pixels."""

    runs: list[dict[str, Any]]
    scores: torch.Tensor
    boxes: torch.Tensor


class SamMasks:
    """Automatic masks of SAM without crops, as published.

    points_per_batch: points a step; the masks do not depend on it.
    """

    name = "sam"

    def __init__(
        self, folder: ModelFolder, *, settings: MaskSettings | None = None, points_per_batch: int = 64
    ) -> None:
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch {points_per_batch} is none; use 1 or more")
        self.folder, self.settings, self.points_per_batch = folder, settings or MaskSettings(), points_per_batch

    @cached_property
    def fingerprint(self) -> str:
        """Model and settings; ValueError when the folder holds no SAM."""
        self.folder.check("sam", SOURCE)
        return f"sam masks {self.folder.identity()} " + " ".join(str(value) for value in astuple(self.settings))

    def __call__(self, picture: np.ndarray) -> list[Mask]:
        """All segments of a picture, the best scored first. picture: uint8[H, W, 3], RGB."""
        self.folder.check("sam", SOURCE)
        model, processor = self.folder.load("SamModel")
        parts = list(self._find(model, processor.image_processor, picture))
        scores, boxes = torch.cat([part.scores for part in parts]), torch.cat([part.boxes for part in parts])
        runs = [run for part in parts for run in part.runs]
        kept = without_doubles(boxes.float().cpu().numpy(), scores.float().cpu().numpy(), self.settings.nms_iou)
        masks = (from_runs(runs[index]["counts"], picture.shape[0], picture.shape[1]) for index in kept)
        return [Mask(pixels) for pixels in masks if pixels.any()]

    @torch.no_grad()
    def _find(self, model: Any, images: Any, picture: np.ndarray) -> Iterator[_Found]:
        side = self.settings.points_per_side
        edge = images.size["longest_edge"]
        whole, points, crops, _ = images.generate_crop_boxes(Image.fromarray(picture), edge, points_per_crop=side)
        inputs = self.folder.to_device(images(images=crops, return_tensors="pt"))
        sizes = {key: inputs[key].tolist() for key in ("original_sizes", "reshaped_input_sizes")}
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
        points = points.to(embeddings)
        for start in range(0, points.shape[1], self.points_per_batch):
            answer = model(image_embeddings=embeddings, input_points=points[:, start : start + self.points_per_batch])
            yield self._filtered(images, answer, sizes, whole[0])

    def _filtered(self, images: Any, answer: Any, sizes: dict[str, Any], whole: torch.Tensor) -> _Found:
        scores = answer.iou_scores[0].flatten()
        # Most masks fall here already, before they are blown up to the picture's size.
        good = scores > self.settings.pred_iou
        small_NHW = answer.pred_masks[0].flatten(0, 1)[good].float()
        large = images.post_process_masks([small_NHW[:, None]], **sizes, binarize=False)[0]
        runs, scores, boxes = images.filter_masks(
            large,
            scores[good][:, None],
            sizes["original_sizes"][0],
            whole,
            self.settings.pred_iou,
            self.settings.stability,
            stability_score_offset=self.settings.stability_offset,
        )
        return _Found(runs, scores, boxes)


def without_doubles(boxes: np.ndarray, scores: np.ndarray, iou: float) -> list[int]:
    """Indices of the boxes [N, 4] that stay, best score first: none overlaps a better one by more than iou."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    waiting = np.argsort(-scores, kind="stable")
    while len(waiting):
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[waiting, :2])
        high = np.minimum(boxes[best, 2:], boxes[waiting, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        union = areas[best] + areas[waiting] - shared
        # Boxes without area share nothing: 0 of 0 is no overlap.
        waiting = waiting[shared <= iou * union]
    return kept


def from_runs(counts: list[int], height: int, width: int) -> np.ndarray:
    """A mask, bool[height, width], from run lengths down the columns; the first run lies outside."""
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T
