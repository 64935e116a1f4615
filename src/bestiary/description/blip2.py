"""BLIP-2 through transformers: captions of pictures and segments, and how well a caption fits a crop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from bestiary.description.model_folder import ModelFolder
from bestiary.description.words import ExpertError

CAPTION_SOURCE = "Salesforce/blip2-opt-2.7b"
MATCH_SOURCE = "Salesforce/blip2-itm-vit-g"

# Source: LAVIS, processors/blip_processors.py (BlipCaptionProcessor), models/blip2_models (max_txt_len).
_MAX_WORDS, _MAX_TOKENS = 50, 32
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """How captions are searched for. max_new_tokens counts what is written after the picture and the start token."""

    num_beams: int
    max_new_tokens: int


# Source: reference/monkey.md 4, steps 1 and 4. The defaults of the published caller are LAVIS' own (blip2_opt.py,
# generate: num_beams 5, max_length 30, passed on as max_new_tokens).
GLOBAL_CAPTION = CaptionSettings(num_beams=5, max_new_tokens=30)
SEGMENT_CAPTION = CaptionSettings(num_beams=1, max_new_tokens=30)


class Blip2Captioner:
    """Captions by a BLIP-2 model with a decoder (published: OPT-2.7b, pre-trained only).

    folder: may be shared by several captioners; the weights are then in memory once.
    batch_size: pictures a step; the captions do not depend on it.
    """

    name = "blip2"

    def __init__(self, folder: ModelFolder, *, settings: CaptionSettings = GLOBAL_CAPTION, batch_size: int = 2) -> None:
        self.folder, self.settings, self.batch_size = folder, settings, _checked(batch_size)

    def with_settings(self, settings: CaptionSettings) -> Blip2Captioner:
        """The same model with other settings; both share the weights."""
        return Blip2Captioner(self.folder, settings=settings, batch_size=self.batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """Model and settings; ValueError when the folder holds no BLIP-2."""
        self.folder.check("blip-2", CAPTION_SOURCE)
        beams, tokens = self.settings.num_beams, self.settings.max_new_tokens
        return f"blip2 captions {self.folder.identity()} beams={beams} new_tokens={tokens}"

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """One caption a picture, in order. pictures: uint8[H, W, 3], RGB, each of its own size."""
        model, processor = _open(self.folder, "Blip2ForConditionalGeneration", CAPTION_SOURCE)
        captions: list[str] = []
        for batch in _batches(pictures, self.batch_size):
            inputs = self.folder.to_device(processor.image_processor(images=batch, return_tensors="pt"))
            written = self._generate(model, inputs["pixel_values"])
            captions += [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
        return captions

    def _generate(self, model: Any, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        prompt = [model.config.image_token_id] * model.config.num_query_tokens + [model.config.text_config.bos_token_id]
        ids = torch.tensor([prompt] * len(pixels_NCHW), device=pixels_NCHW.device)
        sequences: torch.Tensor = model.generate(
            pixel_values=pixels_NCHW,
            input_ids=ids,
            do_sample=False,
            num_beams=self.settings.num_beams,
            max_new_tokens=self.settings.max_new_tokens,
        )
        return sequences[:, ids.shape[1] :]


class Blip2Matcher:
    """The probability that a caption describes a crop, by BLIP-2's matching head (published: 'pretrain')."""

    name = "blip2_match"

    def __init__(self, folder: ModelFolder, *, batch_size: int = 8) -> None:
        self.folder, self.batch_size = folder, _checked(batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """Model and settings; ValueError when the folder holds no BLIP-2."""
        self.folder.check("blip-2", MATCH_SOURCE)
        return f"blip2 match {self.folder.identity()} words={_MAX_WORDS} tokens={_MAX_TOKENS}"

    def __call__(self, crops: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """Softmax of the matching head, class 1, for caption i on crop i. Source: image_text_matching.py."""
        if len(crops) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(crops)} crops; give one caption a crop")
        model, processor = _open(self.folder, "Blip2ForImageTextRetrieval", MATCH_SOURCE)
        scores: list[float] = []
        texts = [words_to_match(caption) for caption in captions]
        for start, batch in zip(range(0, len(crops), self.batch_size), _batches(crops, self.batch_size), strict=True):
            scores += self._scores(model, processor, batch, texts[start : start + self.batch_size])
        return scores

    @torch.no_grad()
    def _scores(self, model: Any, processor: Any, crops: list[Image.Image], texts: list[str]) -> list[float]:
        inputs = processor(
            images=crops,
            text=texts,
            padding=True,
            truncation=True,
            # The processor takes the picture's own positions off this length.
            max_length=_MAX_TOKENS + processor.num_query_tokens,
            return_tensors="pt",
        )
        answer = model(**self.folder.to_device(inputs), use_image_text_matching_head=True)
        fits: list[float] = answer.logits_per_image.float().softmax(dim=1)[:, 1].tolist()
        return fits


def words_to_match(caption: str) -> str:
    """A caption as the matching head was trained on: lower case, without marks, at most 50 words."""
    plain = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", caption.lower())).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:_MAX_WORDS])


def _open(folder: ModelFolder, model_class: str, source: str) -> tuple[Any, Any]:
    folder.check("blip-2", source)
    model, processor = folder.load(model_class)
    if model.config.image_token_id is None or processor.num_query_tokens is None:
        raise ExpertError(
            f"{folder.path} is an old copy: config.json has no image_token_index or processor_config.json no "
            f"num_query_tokens; take the current one: hf download {source} --local-dir {folder.path}"
        )
    return model, processor


def _batches(pictures: Sequence[np.ndarray], size: int) -> Iterator[list[Image.Image]]:
    # As images: an array of one or three rows would be taken for one with its channels first.
    for start in range(0, len(pictures), size):
        yield [Image.fromarray(picture) for picture in pictures[start : start + size]]


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is none; use 1 or more")
    return batch_size
