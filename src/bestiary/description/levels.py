"""One picture through all experts, every answer kept as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from bestiary.description.cache import Cache
from bestiary.description.crops import box_crop, largest, segment_crop
from bestiary.description.merging import Levels
from bestiary.description.words import (
    DECIMALS,
    Captioner,
    Described,
    Expert,
    MaskMaker,
    Matcher,
    RegionCaptioner,
    TextReader,
    share_box,
)
from bestiary.vision.image import decode_rgb


@dataclass(frozen=True, slots=True)
class Experts:
    """Those that are asked; None leaves the step out.

    captions: of whole pictures. segment_captions: of the segments that `masks` cuts out. matcher: judges regions and
    segments, which the filters need.
    """

    captions: Captioner | None = None
    regions: RegionCaptioner | None = None
    masks: MaskMaker | None = None
    segment_captions: Captioner | None = None
    matcher: Matcher | None = None
    texts: TextReader | None = None

    def __post_init__(self) -> None:
        if (self.masks is None) != (self.segment_captions is None):
            raise ValueError("segments take both a mask maker and a captioner of segments; give both or none")
        if (self.regions is not None or self.masks is not None) != (self.matcher is not None):
            raise ValueError("regions and segments need a matcher that scores them, and a matcher needs one of them")

    def present(self) -> list[Expert]:
        """Those that are asked, in order."""
        everyone = (self.captions, self.regions, self.masks, self.segment_captions, self.matcher, self.texts)
        return [expert for expert in everyone if expert is not None]


class UnreadableError(ValueError):
    """The picture cannot be decoded; one line."""


class Describer:
    """Describes pictures with some experts and a cache; for one thread at a time."""

    def __init__(self, experts: Experts, cache: Cache) -> None:
        self._experts = experts
        self._cache = cache
        # Read once: for a model on disk it is a hash of files, and the first to say that they are not there.
        self._prints = {id(expert): expert.fingerprint for expert in experts.present()}

    def describe(self, data: bytes) -> tuple[Levels, int]:
        """All levels, unfiltered, and how many answers were not cached.

        data: the encoded picture. UnreadableError where it cannot be decoded, ValueError where an expert cannot take
        it; answers that were made before stay cached.
        """
        work = _Work(self._cache, data)
        experts = self._experts
        caption = ""
        if (captions := experts.captions) is not None:
            caption = work.answer(
                "captions", [self._prints[id(captions)]], lambda: _captions(captions, [work.pixels])[0]
            )
        regions: list[Described] = []
        if (regioner := experts.regions) is not None:
            regions = work.described("regions", [self._prints[id(regioner)]], lambda: regioner(work.pixels))
        segments = self._segments(work)
        texts: list[Described] = []
        if (reader := experts.texts) is not None:
            texts = work.described("texts", [self._prints[id(reader)]], lambda: reader(work.pixels))
        if (matcher := experts.matcher) is not None:
            regions, segments = self._scored(work, matcher, regions), self._scored(work, matcher, segments)
        return Levels(caption, tuple(regions), tuple(segments), tuple(texts)), work.num_made

    def _segments(self, work: _Work) -> list[Described]:
        masks, captioner = self._experts.masks, self._experts.segment_captions
        if masks is None or captioner is None:
            return []

        def make() -> list[Described]:
            chosen = largest(masks(work.pixels))
            captions = _captions(captioner, [segment_crop(work.pixels, mask) for mask in chosen])
            height, width = work.pixels.shape[:2]
            places = [share_box(mask.box, width, height) for mask in chosen]
            return [Described(caption, place) for caption, place in zip(captions, places, strict=True)]

        return work.described("segments", [self._prints[id(masks)], self._prints[id(captioner)]], make)

    def _scored(self, work: _Work, matcher: Matcher, described: list[Described]) -> list[Described]:
        if not described:
            return []
        places = [[one.caption, list(one.box)] for one in described]
        asked = sha256(json.dumps(places).encode()).hexdigest()

        def make() -> list[float]:
            scores = matcher([box_crop(work.pixels, one.box) for one in described], [one.caption for one in described])
            return [round(float(score), DECIMALS) for score in scores]

        scores = work.answer("scores", [self._prints[id(matcher)], asked], make)
        return [replace(one, score=score) for one, score in zip(described, scores, strict=True)]


class _Work:
    """One picture: its cached answers, and its pixels once an answer is missing."""

    def __init__(self, cache: Cache, data: bytes) -> None:
        self._cache = cache
        self._data = data
        self._digest = sha256(data).hexdigest()
        self._pixels: np.ndarray | None = None
        self.num_made = 0

    @property
    def pixels(self) -> np.ndarray:
        """RGB, uint8[H, W, 3]."""
        if self._pixels is None:
            try:
                self._pixels = decode_rgb(self._data)
            except ValueError as error:
                raise UnreadableError(str(error)) from error
        return self._pixels

    def answer(self, step: str, key: Sequence[str], make: Callable[[], Any]) -> Any:
        found = self._cache.get(step, self._digest, *key)
        if found is None:
            found = make()
            self.num_made += 1
            self._cache.put(step, found, self._digest, *key)
        return found

    def described(self, step: str, key: Sequence[str], make: Callable[[], list[Described]]) -> list[Described]:
        found = self.answer(step, key, lambda: [[one.caption, list(one.box), one.score] for one in make()])
        return [Described(caption, tuple(box), score) for caption, box, score in found]


def _captions(captioner: Captioner, pictures: list[np.ndarray]) -> list[str]:
    captions = captioner(pictures) if pictures else []
    if len(captions) != len(pictures):
        raise RuntimeError(f"{captioner.name} gave {len(captions)} captions for {len(pictures)} pictures")
    return captions
