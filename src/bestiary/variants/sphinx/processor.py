"""SPHINX's processor: one image in front of the text.

A sequence is [BOS] [image_rows positions of the image] [text]: the visual rows stand between BOS and the words,
whichever turn speaks of the picture (LLaMA2-Accessory accessory/model/LLM/llama_ens5.py @ 3777c43). Text is checked,
tokenised and measured before the image is decoded, so a sample that cannot be used costs little.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from bestiary.schema import (
    IGNORE,
    IMAGE_TAG,
    Example,
    Lengths,
    RegionRows,
    Sample,
    SampleTooLongError,
    Slot,
    Turn,
)
from bestiary.text import chat
from bestiary.text.memo import Encoded, EncodedMemo
from bestiary.text.samples import check_too_long, fingerprint_of, naming, require_text, text_key
from bestiary.text.tokenizer import load_tokenizer
from bestiary.vision.canvas import Picture, canvas_CHW, eighths_for_square
from bestiary.vision.geometry import square_canvas
from bestiary.vision.image import decode

_PIXELS = "canvas-2"
"""How pixels are made; another word wherever they change, so that no saved run mistakes one for the other."""

_CHARS_PER_TOKEN = 64
"""More than any piece of a vocabulary covers on average: a text of more characters is too long without being read."""

Rng = np.random.Generator | np.random.RandomState


class SphinxProcessor:
    """Sample -> Example for SPHINX: chat text, label mask, image canvas, and the room they take.

    tokenizer: path of a sentencepiece model, or of a folder in Hugging Face's layout.
    canvas_px: side of the square the image is padded and resized to. image_rows: positions one image takes, tags
        included (1455 for five views of 291). num_views: views the encoders see of one image.
    max_tokens: positions of a row; what the image leaves of it is the text's.
    template: a chat of `chat.TEMPLATES`; a question form of `chat.SINGLE_TURN` (an instruction's further input is then
        `sample.meta["input"]`); or `chat.DOCUMENT`: one caption or plain text, learned whole, its EOS too.
    too_long: "truncate_text" cuts the text's end, never a visual position; "error" and "skip" raise
        SampleTooLongError, and the stream decides.
    reference_quirks: what the published loader does where ours differs: labels by search, the right cut, empty answers,
        prompts verbatim, id 0 never learned.
    exact_pil: every pixel decoded and Pillow's resampling, instead of the faster ways: at most two grey levels away,
        and large photographs decoded at a few eighths of their size.
    """

    def __init__(
        self,
        *,
        tokenizer: str,
        canvas_px: int,
        image_rows: int,
        num_views: int,
        max_tokens: int,
        template: str = "current",
        too_long: str = "error",
        reference_quirks: bool = False,
        exact_pil: bool = False,
    ) -> None:
        check_too_long(too_long)
        self.tokenizer = load_tokenizer(tokenizer)
        self.canvas_px = canvas_px
        self.image_rows = image_rows
        self.num_views = num_views
        self.max_tokens = max_tokens
        self.template = template
        self.too_long = "truncate_text" if reference_quirks else too_long
        self.reference_quirks = reference_quirks
        self.exact_pil = exact_pil
        self._chat: chat.ChatTemplate | None = None
        self._prompt_chat: chat.ChatTemplate | None = None
        if template not in (*chat.SINGLE_TURN, chat.DOCUMENT):
            self._chat = chat.template_named(template)
            self._prompt_chat = chat.template_named(self._chat.prompt) if self._chat.prompt else self._chat
        self._stops = self._find_stops()
        self._memo = EncodedMemo()
        self._require_room(image_rows)

    # The contract of schema.Processor

    def __call__(self, sample: Sample, *, rng: Rng | None = None) -> Example:
        """A training example; see `schema.Processor`."""
        with naming(sample):
            ids, labels = self._remembered(sample) or self._encoded(sample)
            return self._example(sample, ids, labels, rng)

    def prompt(self, sample: Sample, *, answer_start: str = "") -> Example:
        """The sequence up to the answer to the last human turn; what comes after that turn is left out.

        answer_start: see `schema.Processor`; right behind the open turn, so it begins with a space of its own.
        """
        with naming(sample):
            ids = self._prompt_text(sample, answer_start)
            self._require_fit(sample, len(ids), remedy="raise it or shorten that turn")
            return self._example(sample, np.array(ids), np.full(len(ids), IGNORE), None)

    def stop_sequences(self) -> list[list[int]]:
        """EOS, and the end signal's ids after a space and right after other characters."""
        return [list(ids) for ids in self._stops]

    def decode(self, ids: list[int]) -> str:
        """Generated ids to text, stripped."""
        return self.tokenizer.decode(ids).strip()

    # For the stream

    def lengths(self, sample: Sample) -> Lengths:
        """The room of the training example, without decoding its image; what was tokenised serves the next call."""
        with naming(sample):
            ids, labels = encoded = self._encoded(sample)
            key = text_key(sample, sample.meta.get("input"))
            if key is not None:
                self._memo.put(key, encoded)
            return Lengths(
                tokens=len(ids) + self._num_visual(sample),
                views=self.num_views * len(sample.images),
                targets=int(np.count_nonzero(labels[1:] != IGNORE)),
            )

    def fingerprint(self) -> str:
        """A digest of everything that shapes examples: the settings and the tokenizer's content."""
        return fingerprint_of(self, self.tokenizer, pixels=_PIXELS)

    # Text

    def _remembered(self, sample: Sample) -> Encoded | None:
        key = text_key(sample, sample.meta.get("input"))
        return None if key is None else self._memo.take(key)

    def _encoded(self, sample: Sample) -> Encoded:
        ids, labels = self._training_text(sample)
        return np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)

    def _training_text(self, sample: Sample) -> tuple[list[int], list[int]]:
        turns = self._turns(sample)
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        if not answers:
            raise ValueError("there is no assistant answer to learn; add one or use the sample for prompts only")
        if not self.reference_quirks and not all(answers):
            raise ValueError("an assistant answer is empty; fill it or drop the turn")
        if self.template == chat.DOCUMENT:
            ids, labels = chat.encode_document(self.tokenizer, self._document(turns))
        elif self._chat is None:
            question, answer = self._single(turns)
            prompt = chat.single_turn_prompt(self.template, question, _context(sample))
            ids, labels = chat.encode_single_turn(self.tokenizer, prompt, answer)
        else:
            rendered = chat.render(self._chat, turns)
            ids, labels = chat.encode_rendered(self.tokenizer, rendered, search=self.reference_quirks)
        if self.reference_quirks:  # 0 is the published loss's ignored label
            labels = [label or IGNORE for label in labels]
        return self._cut(sample, ids, labels)

    def _prompt_text(self, sample: Sample, answer_start: str) -> list[int]:
        turns = self._turns(sample, verbatim=self.reference_quirks)
        while turns and turns[-1].role != "human":
            turns.pop()
        if not turns and self.template != chat.DOCUMENT:
            raise ValueError("there is no human turn to answer; add the question")
        if self.template == chat.DOCUMENT:  # goes on from the words of the human turn, or from the picture alone
            text = self._document([replace(turn, role="assistant") for turn in turns] or [Turn("assistant", "")])
        elif self._prompt_chat is None:
            if len(turns) != 1:
                raise ValueError(f"template {self.template} takes one question, not {len(turns)} turns")
            text = chat.single_turn_prompt(self.template, turns[0].text, _context(sample))
        else:
            text = chat.render(self._prompt_chat, turns, is_open=True).text
        return chat.encode_prompt(self.tokenizer, text + answer_start)

    def _turns(self, sample: Sample, *, verbatim: bool = False) -> list[Turn]:
        """The sample's turns, checked and cleaned; the sample itself is left alone."""
        self._check(sample)
        for number, turn in enumerate(sample.turns, 1):
            if turn.role not in ("human", "assistant"):
                raise ValueError(f"turn {number} has role {turn.role!r}; use human or assistant")
            require_text(turn.text, f"turn {number}")
        self._require_sane(sample)
        if verbatim or (self.template in chat.SINGLE_TURN and self.reference_quirks):
            return list(sample.turns)
        if self.template == chat.DOCUMENT and not sample.images:  # web text may well hold a tag of its own
            return [replace(turn, text=turn.text.strip()) for turn in sample.turns]
        form = self._chat or chat.TEMPLATES["current"]
        return [replace(turn, text=chat.clean(turn.text, form)) for turn in sample.turns]

    def _single(self, turns: list[Turn]) -> tuple[str, str]:
        if [turn.role for turn in turns] != ["human", "assistant"]:
            raise ValueError(f"template {self.template} takes one question and one answer, not {len(turns)} turns")
        return turns[0].text, turns[1].text

    def _document(self, turns: list[Turn]) -> str:
        words = [turn for turn in turns if turn.text or turn.role == "assistant"]
        if [turn.role for turn in words] != ["assistant"]:
            told = " and ".join(turn.role for turn in words)
            raise ValueError(f"template {self.template} takes one text, not {told}; drop the question or take a chat")
        return words[0].text

    def _check(self, sample: Sample) -> None:
        """Raises for what this model cannot mean."""
        _context(sample)
        if not sample.turns:
            raise ValueError("the conversation is empty; give it a human and an assistant turn")
        if len(sample.images) > 1:
            raise ValueError(f"{len(sample.images)} images, but this model takes one; join them into one picture")
        is_plain = self.template == chat.DOCUMENT or bool(sample.images)
        if not is_plain and any(IMAGE_TAG in str(turn.text) for turn in sample.turns):
            raise ValueError(f"the text speaks of an {IMAGE_TAG} but the sample has none; add it or cut the tag")
        self._check_regions(sample)

    def _check_regions(self, sample: Sample) -> None:
        if sample.regions:
            raise ValueError(f"{len(sample.regions)} regions, but SPHINX takes no prompts; use sphinx_v or drop them")

    def _find_stops(self) -> list[list[int]]:
        stops = [[self.tokenizer.eos_id]]
        if self._prompt_chat is not None:
            signal = self._prompt_chat.signal
            for ids in (self.tokenizer.encode_segment(signal), self.tokenizer.encode_wo_prefix_space(signal)):
                if ids not in stops:
                    stops.append(ids)
        return stops

    # Room

    def _num_visual(self, sample: Sample) -> int:
        """Positions of the sample that are not text."""
        return self.image_rows * len(sample.images) + self._num_region_rows(sample)

    def _num_region_rows(self, sample: Sample) -> int:
        return 0

    def _require_room(self, num_visual: int) -> None:
        frame = chat.render(self._chat, (), is_open=True).text if self._chat else ""
        num_text = len(chat.encode_prompt(self.tokenizer, frame))
        if num_visual + num_text >= self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for words: an image takes {num_visual} positions and the "
                f"frame of a conversation {num_text}; set max_tokens well above {num_visual + num_text}"
            )

    def _require_sane(self, sample: Sample) -> None:
        """Raises for a text that fits no row whatever its tokens are, before seconds go into tokenising it."""
        num_chars = sum(len(turn.text) + 1 for turn in sample.turns) + len(_context(sample) or "")
        if num_chars <= _CHARS_PER_TOKEN * self.max_tokens:
            return
        told = f"the conversation has {num_chars} characters in {len(sample.turns)} turns, a row max_tokens="
        told += f"{self.max_tokens}; split it"
        if self.too_long == "truncate_text":
            raise ValueError(told)
        raise SampleTooLongError(sample.key, told, num_chars // _CHARS_PER_TOKEN, self.max_tokens)

    def _cut(self, sample: Sample, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        if self.too_long != "truncate_text":
            self._require_fit(
                sample, len(ids), remedy="raise it, shorten that turn, or set too_long to skip or truncate_text"
            )
        room = max(0, self.max_tokens - self._num_visual(sample))
        if all(label == IGNORE for label in labels[1:room]):
            filled = self._turn_beyond(sample, room)
            raise ValueError(
                f"cut from {len(ids)} to {room} text tokens no answer is left; raise max_tokens or shorten {filled}"
            )
        return ids[:room], labels[:room]

    def _require_fit(self, sample: Sample, num_text: int, *, remedy: str) -> None:
        num_visual = self._num_visual(sample)
        if num_text + num_visual > self.max_tokens:
            raise SampleTooLongError(
                sample.key,
                f"{num_text} text tokens and {num_visual} visual positions make {num_text + num_visual}, but a row "
                f"holds max_tokens={self.max_tokens}, which {self._turn_beyond(sample, self.max_tokens - num_visual)} "
                f"is the first to pass; {remedy}",
                num_text + num_visual,
                self.max_tokens,
            )

    def _turn_beyond(self, sample: Sample, room: int) -> str:
        """The turn with which the text first takes more than `room` tokens, in words."""
        turns = self._turns(sample)
        # Without a chat there are a question and an answer; what is only the sequence's end is the last turn's.
        form = self._chat or chat.ChatTemplate("", "", "", "", "", "")
        number = chat.first_beyond(self.tokenizer, form, turns, room) or len(turns)
        return f"turn {number} ({turns[number - 1].role})"

    # Pixels and the whole

    def _pixels(self, picture: Picture) -> np.ndarray:
        if self.exact_pil:
            canvas_HWC = square_canvas(picture.pixels_HWC, self.canvas_px, exact_pil=True)
            return np.ascontiguousarray(canvas_HWC.transpose(2, 0, 1))
        return canvas_CHW(picture, self.canvas_px)

    def _example(self, sample: Sample, ids: np.ndarray, labels: np.ndarray, rng: Rng | None) -> Example:
        regions: RegionRows | None = None
        pixels = np.zeros((0, 3, self.canvas_px, self.canvas_px), dtype=np.uint8)
        if sample.images:
            eighths = None if self.exact_pil else partial(eighths_for_square, side_px=self.canvas_px)
            picture = decode(sample.images[0], eighths=eighths, has_spare_byte=not self.exact_pil)
            pixels = self._pixels(picture)[None]
            regions = self._region_rows(sample, picture.width, picture.height, rng)
        num_image, num_region = self.image_rows * len(sample.images), self._num_region_rows(sample)
        slots = np.full(len(ids) + num_image + num_region, Slot.TEXT, dtype=np.uint8)
        slots[1 : 1 + num_image] = Slot.IMAGE
        slots[1 + num_image : 1 + num_image + num_region] = Slot.REGION
        is_text = slots == Slot.TEXT
        all_ids = np.zeros(len(slots), dtype=np.int64)
        all_labels = np.full(len(slots), IGNORE, dtype=np.int64)
        all_ids[is_text], all_labels[is_text] = ids, labels
        return Example(
            ids=all_ids,
            labels=all_labels,
            slots=slots,
            pixels=pixels,
            regions=regions,
            num_views=self.num_views * len(sample.images),
            key=sample.key,
            source=sample.source,
            domain=sample.domain,
        )

    def _region_rows(self, sample: Sample, width: int, height: int, rng: Rng | None) -> RegionRows | None:
        return None


def _context(sample: Sample) -> str | None:
    """The further input of a single question."""
    context = sample.meta.get("input")
    return None if context is None else require_text(context, "its further input")
