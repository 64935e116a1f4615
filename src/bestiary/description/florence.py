"""Florence-2 through transformers: descriptions of the places of a picture (in GRiT's stead, which is not packaged)."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from bestiary.description.model_folder import ModelFolder
from bestiary.description.words import Described, share_box

log = logging.getLogger(__name__)

SOURCE = "florence-community/Florence-2-large"

# Source: model card of Florence-2 (task word, beams, length; 1000 bins a side).
_TASK = "<DENSE_REGION_CAPTION>"
_NUM_BEAMS, _MAX_NEW_TOKENS = 3, 1024
_BINS = 1000

_OTHER_TAG = re.compile(r"<(?!loc_)/?\w+>")
_PIECE = re.compile(r"<loc_(\d+)>|((?:(?!<loc_\d+>).)+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Region:
    """A phrase and its box in bins: x1, y1, x2, y2, each 0..999 of width or height."""

    phrase: str
    bins: tuple[int, int, int, int]


class FlorenceRegions:
    """Dense region captions by Florence-2 in the form transformers itself knows (no code of the folder is run)."""

    name = "florence2"

    def __init__(
        self, folder: ModelFolder, *, num_beams: int = _NUM_BEAMS, max_new_tokens: int = _MAX_NEW_TOKENS
    ) -> None:
        self.folder, self.num_beams, self.max_new_tokens = folder, num_beams, max_new_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Model and settings; ValueError when the folder holds no Florence-2."""
        self.folder.check("florence2", SOURCE)
        return f"florence2 regions {self.folder.identity()} beams={self.num_beams} new_tokens={self.max_new_tokens}"

    def __call__(self, picture: np.ndarray) -> list[Described]:
        """The described places, without scores. picture: uint8[H, W, 3], RGB."""
        height, width = picture.shape[:2]
        return described(parse_regions(self.answer(picture)), width, height)

    @torch.no_grad()
    def answer(self, picture: np.ndarray) -> str:
        """What the model writes about a picture, special tokens included."""
        self.folder.check("florence2", SOURCE)
        model, processor = self.folder.load("Florence2ForConditionalGeneration")
        inputs = self.folder.to_device(processor(text=_TASK, images=Image.fromarray(picture), return_tensors="pt"))
        # An answer without end may run no further than the decoder has places.
        length = min(self.max_new_tokens, model.config.text_config.max_position_embeddings)
        ids = model.generate(**inputs, do_sample=False, num_beams=self.num_beams, max_new_tokens=length)
        text: str = processor.batch_decode(ids, skip_special_tokens=False)[0]
        return text


def parse_regions(answer: str) -> list[Region]:
    """The regions of an answer: a phrase, then its boxes of four `<loc_n>` each, then the next phrase.

    Left out and logged: boxes without a phrase, boxes cut off before their fourth number, numbers above 999.
    """
    regions: list[Region] = []
    phrase, num_lost = "", 0
    bins: list[int] = []
    for match in _PIECE.finditer(_OTHER_TAG.sub("", answer)):
        if match[1] is None:
            if words := match[2].strip():
                num_lost += bool(bins)
                phrase, bins = words, []
            continue
        bins.append(int(match[1]))
        if len(bins) == 4:
            if phrase and max(bins) < _BINS:
                regions.append(Region(phrase, (bins[0], bins[1], bins[2], bins[3])))
            else:
                num_lost += 1
            bins = []
    num_lost += bool(bins)
    if num_lost:
        log.warning("%d boxes of %.80r are cut off, without a phrase or above 999, and left out", num_lost, answer)
    return regions


def described(regions: list[Region], width: int, height: int) -> list[Described]:
    """Regions with boxes in shares of a picture: the middle of a bin, in whole pixels, as Florence-2 counts."""
    sides = (width, height, width, height)
    found = []
    for region in regions:
        x1, y1, x2, y2 = ((2 * low + 1) * side // (2 * _BINS) for low, side in zip(region.bins, sides, strict=True))
        box = share_box((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), width, height)
        found.append(Described(region.phrase, box))
    return found
