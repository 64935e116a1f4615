"""Everything said about one picture, and what is kept of it in the published form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.description.filters import (
    REGION_SCORE,
    SEGMENT_SCORE,
    TEXT_SCORE,
    Overlap,
    above,
    without_repeats,
)
from bestiary.description.words import Described


@dataclass(frozen=True, slots=True)
class Levels:
    """What the experts said: of the whole picture, of regions, of segments, and its texts; empty where none spoke."""

    caption: str = ""
    regions: tuple[Described, ...] = ()
    segments: tuple[Described, ...] = ()
    texts: tuple[Described, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing was said at all."""
        return not (self.caption or self.regions or self.segments or self.texts)

    def kept(self, *, overlap: Overlap = "exact") -> Levels:
        """What the published filters keep; the caption of the whole always stays.

        Source: data_generation/add_all_json.py.
        """
        return Levels(
            caption=self.caption,
            regions=tuple(above(self.regions, REGION_SCORE)),
            segments=tuple(without_repeats(above(self.segments, SEGMENT_SCORE), overlap=overlap)),
            texts=tuple(above(self.texts, TEXT_SCORE)),
        )

    def merged(self, img_id: str) -> dict[str, str]:
        """The picture's entry of the published ann_all.json."""
        return {
            "img_id": img_id,
            "blip2cap": self.caption,
            "grit": in_words(self.regions),
            "ocr": in_words(self.texts),
            "sam_blip": in_words(self.segments),
        }


def in_words(described: Sequence[Described]) -> str:
    """Captions with their boxes in one line, as the published prompt shows them: 'caption: [x1, y1, x2, y2]; '."""
    return "".join(f"{one.caption}: [{', '.join(map(str, one.box))}]; " for one in described)
