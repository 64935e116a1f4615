"""Ovis' processor: pictures anywhere in the text, each as marks and rows of the visual tokenizer.

A picture stands where its tag does. In 1.0 and 1.5 it is `begin, rows, end`; in 1.6 the rows of the whole picture and
of its tiles between five marks. Text is checked, tokenised and measured before a picture is decoded; only 1.6 reads
its size, from the header. Source: reference/ovis.md, sections 1.4 to 1.6, 3 and 5.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from bestiary.schema import IGNORE, IMAGE_TAG, Example, Lengths, Sample, SampleTooLongError, Slot
from bestiary.text.memo import Encoded, EncodedMemo
from bestiary.text.samples import check_quirks, check_too_long, fingerprint_of, naming, require_text, text_key
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.ovis import geometry
from bestiary.variants.ovis.canvas import PLANES, canvases, views_on_one_canvas
from bestiary.variants.ovis.formatters import (
    IMAGE_ID,
    Chat,
    Message,
    encode_caption,
    encode_chat,
    encode_words,
    format_named,
    version_named,
)
from bestiary.variants.ovis.geometry import WHOLE, Box
from bestiary.vision.image import decode_rgb, image_size

QUIRKS = ("blind_truncation", "blank_pictures", "untaught_samples", "surplus_pictures")
"""What the published loader does and ours refuses, see `OvisProcessor`."""
_PIXELS = "ovis-canvas-1"
"""How pixels are made; another word wherever they change, so that no saved run mistakes one for the other."""

Rng = np.random.Generator | np.random.RandomState


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture of a sample: its pieces in the row, and the boxes of its views."""

    pieces: tuple[int, ...]
    boxes: tuple[Box, ...]
    data: bytes | memoryview | None


class OvisProcessor:
    """Sample -> Example for Ovis: conversation, label mask, canvases, and the room they take.

    The tokenizer may have fewer ids than the decoder: published decoders have spare rows (`allows_spare_ids`).

    tokenizer: the decoder's Hugging Face folder.
    canvas_px, image_rows, num_views, num_marks: the model's, see `OvisVision.layout`.
    max_tokens: positions of a row, pictures included. version: of `formatters.VERSIONS`; chat_format: of the version.
    max_partition: tiles of the one picture of a sample (1.6), max_partition_many: of each of several.
    adaptive: quarters (1.5, five views) only of pictures large enough.
    too_long: "truncate_text" cuts the end and never a picture; "error" and "skip" raise SampleTooLongError.
    quirks, each what the published loader does (section 9): "blind_truncation" cuts wherever a row ends, the picture
        that would be cut goes as a whole, which gives the same loss: nothing behind it is left to see its rest;
        "blank_pictures" has a blank picture and no label for one that cannot be read (a caption loses its words);
        "untaught_samples" keeps samples without any label; "surplus_pictures" ignores pictures without a tag.
    """

    allows_spare_ids = True

    def __init__(
        self,
        *,
        tokenizer: str,
        canvas_px: int,
        image_rows: int,
        num_views: int,
        num_marks: int,
        max_tokens: int,
        version: str,
        chat_format: str,
        max_partition: int = 9,
        max_partition_many: int = 1,
        adaptive: bool = False,
        too_long: str = "error",
        quirks: Sequence[str] = (),
    ) -> None:
        check_too_long(too_long)
        check_quirks(quirks, QUIRKS)
        self.version, self.chat_format = version, chat_format
        self._version, self._form = version_named(version), format_named(version, chat_format)
        needed = (geometry.GRID_MARKS,) if self._version.has_grid else (0, 2)
        if num_marks not in needed:
            raise ValueError(f"num_marks={num_marks}, but Ovis {version} has {' or '.join(map(str, needed))} marks")
        self.tokenizer = load_tokenizer(tokenizer)
        self.canvas_px, self.image_rows = canvas_px, image_rows
        self.num_views, self.num_marks = num_views, num_marks
        self.max_tokens, self.too_long = max_tokens, too_long
        self.max_partition, self.max_partition_many, self.adaptive = max_partition, max_partition_many, adaptive
        self.quirks = tuple(quirks)
        self._stops = [[self.tokenizer.control_id(token)] for token in self._form.stops]
        for token in self._form.controls:
            self.tokenizer.control_id(token)
        self._memo = EncodedMemo()

    # The contract of schema.Processor

    def __call__(self, sample: Sample, *, rng: Rng | None = None) -> Example:
        """A training example; see `schema.Processor`."""
        with naming(sample):
            pictures = self._pictures(sample)
            ids, labels = self._remembered(sample) or self._training_text(sample, pictures)
            return self._example(sample, pictures, ids, labels)

    def prompt(self, sample: Sample, *, answer_start: str = "") -> Example:
        """The sequence up to the answer to the last human turn; what comes after that turn is left out.

        answer_start: see `schema.Processor`; tokenised with the open turn's header, as a published preface is.
        """
        with naming(sample):
            pictures = self._pictures(sample)
            ids = np.array(self._prompt_ids(sample, answer_start), dtype=np.int32)
            return self._example(sample, pictures, ids, np.full(len(ids), IGNORE, np.int32), may_cut=False)

    def stop_sequences(self) -> list[list[int]]:
        """The control tokens that end an answer."""
        return [list(ids) for ids in self._stops]

    def decode(self, ids: list[int]) -> str:
        """Generated ids to text, stripped; a decoder's spare ids beyond the vocabulary have none."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size]).strip()

    # For the stream

    def lengths(self, sample: Sample) -> Lengths:
        """The room of the training example; what was tokenised serves the next call."""
        with naming(sample):
            pictures = self._pictures(sample)
            ids, labels = encoded = self._training_text(sample, pictures)
            key = _text_key(sample)
            if key is not None and not self.quirks:
                self._memo.put(key, encoded)
            slots, _, all_labels = self._laid_out(sample, pictures, ids, labels, may_cut=True)
            return Lengths(
                tokens=len(slots),
                views=self._num_views(slots),
                targets=int(np.count_nonzero(all_labels[1:] != IGNORE)),
            )

    def fingerprint(self) -> str:
        """A digest of everything that shapes examples: the settings and the tokenizer's content."""
        return fingerprint_of(self, self.tokenizer, pixels=_PIXELS)

    # Text

    def _remembered(self, sample: Sample) -> Encoded | None:
        key = _text_key(sample)
        return None if key is None else self._memo.take(key)

    def _training_text(self, sample: Sample, pictures: Sequence[_Picture]) -> Encoded:
        messages = self._messages(sample)
        answers = [words for role, words in messages if role == "assistant"]
        if not answers:
            raise ValueError("there is no assistant answer to learn; add one or use the sample for prompts only")
        is_blank = any(picture.data is None for picture in pictures)
        if _is_caption(sample):
            chat = self._caption(messages, is_blank)
        else:
            if not all(answers) and "untaught_samples" not in self.quirks:
                raise ValueError("an assistant answer is empty; fill it or drop the turn")
            chat = encode_chat(self._form, self.tokenizer, messages)
        labels = [IGNORE] * len(chat.labels) if is_blank else chat.labels
        if all(label in (IGNORE, IMAGE_ID) for label in labels) and "untaught_samples" not in self.quirks:
            raise ValueError("nothing of it is learned; give its answer words")
        return np.array(chat.ids, dtype=np.int32), np.array(labels, dtype=np.int32)

    def _caption(self, messages: Sequence[Message], is_blank: bool) -> Chat:
        if [role for role, _ in messages] != ["human", "assistant"]:
            raise ValueError(f"a caption is one template and its words, not {len(messages)} turns")
        (_, template), (_, words) = messages
        if self._version.strips_captions or template == IMAGE_TAG:
            words = words.replace(IMAGE_TAG, "")
        return encode_caption(self.tokenizer, template, "" if is_blank else words)

    def _prompt_ids(self, sample: Sample, answer_start: str) -> list[int]:
        messages = self._messages(sample)
        while messages and messages[-1][0] != "human":
            messages.pop()
        if not messages:
            raise ValueError("there is no human turn to answer; add the question")
        if _is_caption(sample):
            return encode_words(self.tokenizer, messages[-1][1]) + encode_words(self.tokenizer, answer_start)
        return encode_chat(self._form, self.tokenizer, messages, preface=answer_start).ids

    def _messages(self, sample: Sample) -> list[Message]:
        """The sample's turns, checked; pictures without any tag stand in front of the first question."""
        if not sample.turns:
            raise ValueError("the conversation is empty; give it a human and an assistant turn")
        if sample.regions:
            raise ValueError(f"{len(sample.regions)} regions, but Ovis takes no prompts; use sphinx_v or drop them")
        messages: list[Message] = [(turn.role, turn.text) for turn in sample.turns]
        for number, (role, text) in enumerate(messages, 1):
            if role not in ("human", "assistant"):
                raise ValueError(f"turn {number} has role {role!r}; use human or assistant")
            require_text(text, f"turn {number}")
        system = sample.meta.get("system")
        if system is not None:
            require_text(system, "its system message")
            messages.insert(0, ("system", system))
        # A caption's words are no place for a picture, whatever they spell.
        asked = messages[:1] if _is_caption(sample) else messages
        num_tags, num_images = sum(text.count(IMAGE_TAG) for _, text in asked), len(sample.images)
        if num_images and not num_tags and "surplus_pictures" not in self.quirks:
            at = next((n for n, (role, _) in enumerate(messages) if role == "human"), None)
            if at is None:
                raise ValueError(f"{num_images} pictures and no human turn for them; add the question")
            messages[at] = (messages[at][0], self._version.query * num_images + messages[at][1])
        elif num_tags > num_images or (num_tags < num_images and "surplus_pictures" not in self.quirks):
            raise ValueError(f"the text has {num_tags} {IMAGE_TAG} for {num_images} pictures; write one for each")
        return messages

    # Pictures

    def _pictures(self, sample: Sample) -> list[_Picture]:
        limit = self.max_partition if len(sample.images) == 1 else self.max_partition_many
        return [self._picture(data, limit) for data in sample.images]

    def _picture(self, data: bytes | memoryview, max_partition: int) -> _Picture:
        """Where a picture's views lie; without the quirk nothing but 1.6 looks at it yet."""
        if "blank_pictures" in self.quirks:
            try:
                height, width, _ = decode_rgb(data).shape
                geometry.fit_inside(width, height, self.canvas_px)
            except ValueError:
                return self._placed((self.canvas_px, self.canvas_px), 1, None)
        elif not self._version.has_grid:
            return _Picture(geometry.plain_pieces(self.num_marks), (), data)
        return self._placed(image_size(data), max_partition, data)

    def _placed(self, size: tuple[int, int], max_partition: int, data: bytes | memoryview | None) -> _Picture:
        if not self._version.has_grid:
            return _Picture(geometry.plain_pieces(self.num_marks), (), data)
        grid = geometry.best_grid(*size, self.canvas_px, max_partition)
        return _Picture(geometry.grid_pieces(grid), geometry.crops(*size, grid), data)

    def _pixels(self, picture: _Picture) -> np.ndarray:
        """uint8[n, 4 * num_views, S, S]; all zero for a picture that could not be read."""
        if picture.data is None:
            return np.zeros((1, PLANES * self.num_views, self.canvas_px, self.canvas_px), dtype=np.uint8)
        pixels_HWC = decode_rgb(picture.data)
        height, width, _ = pixels_HWC.shape
        if self._version.has_grid:
            return canvases(pixels_HWC, picture.boxes, self.canvas_px)
        boxes: tuple[Box, ...] = ((0, 0, width, height),)
        if self.num_views > 1 and (not self.adaptive or geometry.has_quarters(width, height, self.canvas_px)):
            boxes += geometry.quarters(width, height)
        return views_on_one_canvas(pixels_HWC, boxes, self.num_views, self.canvas_px)

    def _num_views(self, slots: np.ndarray) -> int:
        return int(np.count_nonzero(slots == Slot.IMAGE)) // self.image_rows * self.num_views

    # The whole

    def _example(
        self,
        sample: Sample,
        pictures: Sequence[_Picture],
        ids: np.ndarray,
        labels: np.ndarray,
        *,
        may_cut: bool = True,
    ) -> Example:
        slots, all_ids, all_labels = self._laid_out(sample, pictures, ids, labels, may_cut=may_cut)
        num_canvases = int(np.count_nonzero(slots == Slot.IMAGE)) // self.image_rows
        side = self.canvas_px
        pixels = np.zeros((0, PLANES * self.num_views, side, side), dtype=np.uint8)
        if num_canvases:
            used = pictures[: int(np.count_nonzero(ids == IMAGE_ID))]
            pixels = np.concatenate([self._pixels(picture) for picture in used])[:num_canvases]
        return Example(
            ids=all_ids,
            labels=all_labels,
            slots=slots,
            pixels=pixels,
            regions=None,
            num_views=self._num_views(slots),
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
        )

    def _laid_out(
        self, sample: Sample, pictures: Sequence[_Picture], ids: np.ndarray, labels: np.ndarray, *, may_cut: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, ids and labels of the row, every placeholder replaced by its picture's pieces."""
        slots, numbers, learned, start = [], [], [], 0
        for at, picture in zip(np.flatnonzero(ids == IMAGE_ID), pictures, strict=False):
            of_picture, marks = self._laid_pieces(picture.pieces)
            slots += [np.zeros(at - start, np.uint8), of_picture]
            numbers += [ids[start:at], marks]
            learned += [labels[start:at], np.full(len(marks), IGNORE, np.int32)]
            start = at + 1
        row = (
            np.concatenate([*slots, np.zeros(len(ids) - start, np.uint8)]),
            np.concatenate([*numbers, ids[start:]]).astype(np.int64),
            np.concatenate([*learned, labels[start:]]).astype(np.int64),
        )
        if len(row[0]) <= self.max_tokens:
            return row
        end = self._end(sample, row[0], may_cut=may_cut)
        if np.all(row[2][1:end] == IGNORE) and may_cut and "untaught_samples" not in self.quirks:
            raise ValueError(f"cut from {len(row[0])} to {end} positions no answer is left; raise max_tokens")
        return row[0][:end], row[1][:end], row[2][:end]

    def _laid_pieces(self, pieces: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Slots and ids of one picture's positions."""
        slots = [
            np.full(self.image_rows, Slot.IMAGE, np.uint8) if piece == WHOLE else np.array([Slot.MARK], np.uint8)
            for piece in pieces
        ]
        ids = [np.zeros(self.image_rows, np.int32) if p == WHOLE else np.array([p], np.int32) for p in pieces]
        return np.concatenate(slots), np.concatenate(ids)

    def _end(self, sample: Sample, slots: np.ndarray, *, may_cut: bool) -> int:
        """Where a row that is too long ends; raises SampleTooLongError unless the policy lets it be cut there."""
        end = self.max_tokens
        if may_cut and "blind_truncation" in self.quirks:
            rows_before = int(np.count_nonzero(slots[:end] == Slot.IMAGE))
            return end - rows_before % self.image_rows
        if may_cut and self.too_long == "truncate_text" and not slots[end:].any():
            return end
        num_visual = int(np.count_nonzero(slots))
        raise SampleTooLongError(
            sample.key,
            f"{len(slots) - num_visual} text tokens and {num_visual} positions of pictures make {len(slots)}, a row "
            f"holds max_tokens={end}; raise it, shorten the text, take fewer or smaller pictures, or set too_long",
            len(slots),
            end,
        )


def _is_caption(sample: Sample) -> bool:
    """Whether the sample is a caption of stage 1: no chat around it (set by the adapter of Ovis' data)."""
    return sample.meta.get("data_format") == "caption"


def _text_key(sample: Sample) -> Hashable | None:
    return text_key(sample, sample.meta.get("system"), _is_caption(sample))
