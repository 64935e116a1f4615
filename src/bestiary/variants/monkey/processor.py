"""Monkey's processor: plain text, no chat around it; a picture is `<img>`, its rows, `</img>`.

Published training is one question and one answer, tokenised apart, and one <|endoftext|>. Ours takes every turn, each
answer closed by an <|endoftext|>, and rows of any length; `quirks` has the published form for parity. Text is checked,
tokenised and measured before a picture is decoded. Source: reference/monkey.md, sections 1.1, 1.5, 3.2 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from bestiary.schema import IGNORE, IMAGE_TAG, Example, Lengths, Sample, SampleTooLongError, Slot
from bestiary.text.memo import Encoded, EncodedMemo
from bestiary.text.samples import check_quirks, check_too_long, fingerprint_of, naming, require_text, text_key
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.monkey import chat
from bestiary.variants.monkey.tags import IMAGE_END, IMAGE_START, PLACES, check_places, split_at_pictures
from bestiary.vision.image import decode_rgb
from bestiary.vision.resize import PASSES, Passes, resize_bicubic

QUIRKS = ("single_turn", "padded", "untaught_samples")
"""What the published loader does and ours does not, see `MonkeyProcessor`."""
QUESTION = " {} Answer: "
"""What published training puts around a question; its trailing space is a token of its own (section 3.2)."""
VERBATIM = "{}"
_PICTURE = -1
"""Stands for a picture among ids until the row is laid out."""
_PIXELS = "monkey-canvas-1"
"""How pixels are made; another word wherever they change, so that no saved run mistakes one for the other."""

Rng = np.random.Generator | np.random.RandomState


class MonkeyProcessor:
    """Sample -> Example for Monkey.

    Pictures stand where `<image>` (or `<img>path</img>`) does; without any such tag all stand in front of the first
    question. The tokenizer may have fewer ids than the decoder (`allows_spare_ids`).

    tokenizer: a qwen.tiktoken, or the folder that holds it.
    height_px, width_px, image_rows, num_views: the model's, see `MonkeyVision.layout`.
    max_tokens: positions of a row, pictures included.
    question: what stands around a human turn's words, behind its pictures, with {} for the words; "{}" for data that
        brings its own.
    too_long: "truncate_text" cuts the end and never a picture; "error" and "skip" raise SampleTooLongError.
    resize_passes: of `vision.resize`; published weights were trained with columns first (Pillow of 2023).
    quirks, each as published: "single_turn" takes the first two turns and drops the others; "padded" fills every row up
        to `max_tokens` with unlearned <|endoftext|>; "untaught_samples" keeps rows whose answer was cut off whole.
    chat: prompts are ChatML (`monkey.chat`), for weights that were trained with it, such as Qwen-VL-Chat; ours train
        in plain text, so it is for asking alone.
    """

    allows_spare_ids = True

    def __init__(
        self,
        *,
        tokenizer: str,
        height_px: int,
        width_px: int,
        image_rows: int,
        num_views: int,
        max_tokens: int,
        question: str = QUESTION,
        too_long: str = "error",
        resize_passes: Passes = "columns_first",
        quirks: Sequence[str] = (),
        chat: bool = False,
    ) -> None:
        check_too_long(too_long)
        check_quirks(quirks, QUIRKS)
        if resize_passes not in PASSES:
            raise ValueError(f"resize_passes={resize_passes!r} is unknown; choose one of {', '.join(PASSES)}")
        if question.count("{}") != 1:
            raise ValueError(f"question={question!r}: write {{}} once, where the words of the human turn go")
        self.tokenizer = load_tokenizer(tokenizer)
        self.height_px, self.width_px = height_px, width_px
        self.image_rows, self.num_views = image_rows, num_views
        self.max_tokens, self.question, self.too_long = max_tokens, question, too_long
        self.resize_passes: Passes = resize_passes
        self.quirks = tuple(quirks)
        self.chat = chat
        if chat and question not in (QUESTION, VERBATIM):
            raise ValueError(f"question={question!r} has no effect with chat, which asks in ChatML; leave it out")
        self._span = [self.tokenizer.control_id(IMAGE_START), _PICTURE, self.tokenizer.control_id(IMAGE_END)]
        self._places = {self.tokenizer.control_id(tag): tag for tag in PLACES}
        self._memo = EncodedMemo()

    # The contract of schema.Processor

    def __call__(self, sample: Sample, *, rng: Rng | None = None) -> Example:
        """A training example; see `schema.Processor`."""
        with naming(sample):
            key = text_key(sample)
            encoded = None if key is None else self._memo.take(key)
            ids, labels = encoded or self._training_text(sample)
            return self._example(sample, *self._laid_out(sample, ids, labels, may_cut=True))

    def prompt(self, sample: Sample, *, answer_start: str = "") -> Example:
        """The sequence up to the answer to the last human turn; what comes after that turn is left out."""
        with naming(sample):
            ids = np.array(self._prompt_ids(sample, answer_start), dtype=np.int32)
            labels = np.full(len(ids), IGNORE, dtype=np.int32)
            return self._example(sample, *self._laid_out(sample, ids, labels, may_cut=False))

    def verbatim(self) -> MonkeyProcessor:
        """The same with nothing around a question's words: for prompts that bring their own, such as captions'."""
        if self.chat:
            raise ValueError("verbatim has no effect with chat, which asks in ChatML; leave it out")
        bare = copy(self)
        bare.question, bare._memo = VERBATIM, EncodedMemo()
        return bare

    def stop_sequences(self) -> list[list[int]]:
        """<|endoftext|> ends an answer, and in ChatML the end of a message."""
        marks = (chat.END, chat.START) if self.chat else ()
        return [[self.tokenizer.eos_id], *(self.tokenizer.encode(mark) for mark in marks)]

    def decode(self, ids: list[int]) -> str:
        """Generated ids to text, stripped; control tokens and a decoder's spare ids have none."""
        return self._plain(ids).strip()

    def decode_places(self, ids: list[int]) -> str:
        """`decode` with the tags of names and places, which `tags.boxes_of` reads."""
        text, start = "", 0
        for end, i in enumerate(ids):
            if i in self._places:
                text += self._plain(ids[start:end]) + self._places[i]
                start = end + 1
        return (text + self._plain(ids[start:])).strip()

    def _plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])

    # For the stream

    def lengths(self, sample: Sample) -> Lengths:
        """The room of the training example; what was tokenised serves the next call."""
        with naming(sample):
            ids, labels = encoded = self._training_text(sample)
            if (key := text_key(sample)) is not None:
                self._memo.put(key, encoded)
            slots, _, all_labels = self._laid_out(sample, ids, labels, may_cut=True)
            return Lengths(
                tokens=len(slots),
                views=len(sample.images) * self.num_views,
                targets=int(np.count_nonzero(all_labels[1:] != IGNORE)),
            )

    def fingerprint(self) -> str:
        """A digest of everything that shapes examples: the settings and the tokenizer's content."""
        return fingerprint_of(self, self.tokenizer, pixels=_PIXELS)

    # Text

    def _training_text(self, sample: Sample) -> Encoded:
        if self.chat:
            raise ValueError("chat=true asks in ChatML and teaches nothing; train without it")
        ids: list[int] = []
        labels: list[int] = []
        num_answers = 0
        for role, text in self._turns(sample):
            if role == "human":
                own = self._question_ids(text)
                ids, labels = ids + own, labels + [IGNORE] * len(own)
                continue
            if not text.strip():
                raise ValueError("an assistant answer is empty; fill it or drop the turn")
            own = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
            ids, labels, num_answers = ids + own, labels + own, num_answers + 1
        if not num_answers:
            raise ValueError("there is no assistant answer to learn; add one or use the sample for prompts only")
        return np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)

    def _prompt_ids(self, sample: Sample, answer_start: str) -> list[int]:
        turns = self._turns(sample)
        while turns and turns[-1][0] != "human":
            turns.pop()
        if not turns:
            raise ValueError("there is no human turn to answer; add the question")
        if self.chat:
            return self._chat_ids(turns) + self.tokenizer.encode(answer_start)
        ids: list[int] = []
        for role, text in turns:
            ids += self._question_ids(text) if role == "human" else self.tokenizer.encode(text, eos=True)
        return ids + self.tokenizer.encode(answer_start)

    def _chat_ids(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation in ChatML that waits for its answer; questions and answers must alternate."""
        if [role for role, _ in turns] != ["human", "assistant"] * (len(turns) // 2) + ["human"]:
            raise ValueError("chat: human and assistant turns must alternate, beginning with a human one")
        texts = [text for _, text in turns]
        history = list(zip(texts[0:-1:2], texts[1::2], strict=True))
        return chat.chat_context(self._piece_ids, texts[-1], history=history, max_window=None)[1]

    def _piece_ids(self, text: str) -> list[int]:
        """Ids of a text with its pictures where they stand."""
        ids: list[int] = []
        for number, piece in enumerate(split_at_pictures(text)):
            ids += (self._span if number else []) + self.tokenizer.encode(piece)
        return ids

    def _question_ids(self, text: str) -> list[int]:
        """Ids of a human turn: its pictures, then its words in the question's form; pictures inside stay inside."""
        pieces = split_at_pictures(text)
        leading = next((n for n, piece in enumerate(pieces) if piece.strip()), len(pieces) - 1)
        if self.question != VERBATIM:
            words = IMAGE_TAG.join(pieces[leading:]).strip()
            # Not str.format: questions may hold braces of their own.
            text = IMAGE_TAG * leading + self.question.replace("{}", words, 1)
        return self._piece_ids(text)

    def _turns(self, sample: Sample) -> list[tuple[str, str]]:
        """The sample's turns, checked; pictures without any tag stand in front of the first question."""
        if not sample.turns:
            raise ValueError("the conversation is empty; give it a human and an assistant turn")
        if sample.regions:
            raise ValueError(f"{len(sample.regions)} regions, but Monkey takes none; write them as <box> in the text")
        turns = [(str(turn.role), turn.text) for turn in sample.turns]
        if "single_turn" in self.quirks:
            if any(len(split_at_pictures(require_text(text, "a turn"))) > 1 for _, text in turns[2:]):
                raise ValueError("a picture stands behind the first two turns, which single_turn drops; leave it out")
            turns = turns[:2]
        num_tags = 0
        for number, (role, text) in enumerate(turns, 1):
            num_tags += _checked(role, text, f"turn {number}")
        num_images = len(sample.images)
        if num_images and not num_tags:
            at = next((n for n, (role, _) in enumerate(turns) if role == "human"), None)
            if at is None:
                raise ValueError(f"{num_images} pictures and no human turn for them; add the question")
            turns[at] = (turns[at][0], IMAGE_TAG * num_images + turns[at][1])
        elif num_tags != num_images:
            raise ValueError(f"the text has {num_tags} pictures, the sample {num_images}; write one tag for each")
        return turns

    # The whole

    def _example(self, sample: Sample, slots: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> Example:
        pixels = np.zeros((len(sample.images), 3, self.height_px, self.width_px), dtype=np.uint8)
        for number, data in enumerate(sample.images):
            pixels[number] = self._canvas(data)
        return Example(
            ids=ids,
            labels=labels,
            slots=slots,
            pixels=pixels,
            regions=None,
            num_views=len(pixels) * self.num_views,
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
        )

    def _canvas(self, data: bytes | memoryview) -> np.ndarray:
        """uint8[3, height_px, width_px]: the picture squashed, whatever its shape, as published."""
        size = (self.width_px, self.height_px)
        return resize_bicubic(decode_rgb(data), size, passes=self.resize_passes).transpose(2, 0, 1)

    def _laid_out(
        self, sample: Sample, ids: np.ndarray, labels: np.ndarray, *, may_cut: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, ids and labels of the row, every picture taking its rows."""
        is_picture = ids == _PICTURE
        repeats = np.where(is_picture, self.image_rows, 1)
        slots = np.repeat(np.where(is_picture, Slot.IMAGE, Slot.TEXT).astype(np.uint8), repeats)
        all_ids = np.repeat(np.where(is_picture, 0, ids), repeats).astype(np.int64)
        all_labels = np.repeat(labels, repeats).astype(np.int64)
        end = self._end(sample, slots, may_cut=may_cut)
        is_untaught = end < len(slots) and bool(np.all(all_labels[1:end] == IGNORE))
        if may_cut and is_untaught and "untaught_samples" not in self.quirks:
            raise self._too_long(sample, slots, "no answer would be left")
        slots, all_ids, all_labels = slots[:end], all_ids[:end], all_labels[:end]
        if may_cut and "padded" in self.quirks:
            room = self.max_tokens - end
            slots = np.pad(slots, (0, room))
            all_ids = np.pad(all_ids, (0, room), constant_values=self.tokenizer.eos_id)
            all_labels = np.pad(all_labels, (0, room), constant_values=IGNORE)
        return slots, all_ids, all_labels

    def _end(self, sample: Sample, slots: np.ndarray, *, may_cut: bool) -> int:
        """Where the row ends; raises SampleTooLongError unless it fits or only text would be cut."""
        if len(slots) <= self.max_tokens:
            return len(slots)
        # The id before the cut must not be <img>, nor may </img> go: the span is cut with them.
        last = int(np.flatnonzero(slots)[-1]) if slots.any() else -2
        if may_cut and self.too_long == "truncate_text":
            if last + 1 < self.max_tokens:
                return self.max_tokens
            raise self._too_long(sample, slots, f"a picture's span, up to position {last + 1}, would be cut")
        raise self._too_long(sample, slots, "set too_long to cut text" if may_cut else "a prompt is never cut")

    def _too_long(self, sample: Sample, slots: np.ndarray, reason: str) -> SampleTooLongError:
        num_visual = int(np.count_nonzero(slots))
        return SampleTooLongError(
            sample.key,
            f"{len(slots) - num_visual} text tokens and {num_visual} positions of pictures make {len(slots)}, a row "
            f"holds max_tokens={self.max_tokens} ({reason}); raise it, shorten the text or take fewer pictures",
            len(slots),
            self.max_tokens,
        )


def _checked(role: str, text: object, where: str) -> int:
    """Number of pictures in a turn; ValueError for what is wrong with it."""
    if role not in ("human", "assistant"):
        raise ValueError(f"{where} has role {role!r}; use human or assistant")
    words = require_text(text, where)
    try:
        num_pictures = len(split_at_pictures(words)) - 1
        check_places(words)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if num_pictures and role == "assistant":
        raise ValueError(f"{where} is an answer and holds a picture; pictures stand in human turns")
    return num_pictures
