"""Conversations with a model about a picture and its marked regions.

    session = Session.from_run("runs/mine")
    session.respond("cat.jpg", "What is <Mark 1>?", [point(312, 200)], frame="pixels")

The caller's pictures, regions and turns are read, never changed. An answer depends on its request, the settings and
the seed alone: not on the others of its batch, nor on whether it is streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bestiary.inference.pictures import Frame, Mark, Pictures, all_encoded, check_files, only, regions_of
from bestiary.inference.streaming import cut_at, pieces
from bestiary.mllm import MultimodalLM, check_beams
from bestiary.saved_run import Pieces, load_named, load_saved_run
from bestiary.schema import Example, Processor, Region, Sample, SampleError, SampleTooLongError, Turn

Exchange = tuple[str, str]
"""A question and its answer."""
Decode = Callable[[list[int]], str]

_KEY = "session"
"""Of every sample: what is drawn depends on the key, and must not on the place in a batch."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made.

    temperature: 0 takes the most probable token. top_p: see `generation.Sampling`. stop: texts that end an answer,
    beside the model's own end; the answer is what stands before them. seed: of what is drawn above temperature 0.
    num_beams: above 1, the best of so many hypotheses (`language.beams`); such an answer comes whole, not as a stream.
    places: answers keep the tags of names and places, where a model has such (Monkey: `<ref>`, `<box>`; read them with
    `variants.monkey.tags.boxes_of`).
    verbatim: questions stand as they are given, blanks included, where a model puts words around them (Monkey's
    " {} Answer: ", which its prompts for captions do without).

    Only these count: a published folder's generation_config.json (which samples, for some Ovis) changes nothing.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    num_beams: int = 1
    places: bool = False
    verbatim: bool = False

    def __post_init__(self) -> None:
        check_beams(self.num_beams, self.temperature)
        if isinstance(self.stop, str) or not all(text.strip() for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: give a tuple of texts that are more than white space")


PUBLISHED = Settings(max_new_tokens=512, temperature=0.1, top_p=0.5, seed=0)
"""Of SPHINX's and SPHINX-V's `generate_response` (LLaMA2-Accessory SPHINX/sphinx.py @ 3777c43)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question of a batch.

    image: a picture, several (where `<image>` stands, or else in front; for a model that reads several), or None.
    regions, frame: marks with the frame of their coordinates, or regions (fractions), see `pictures.regions_of`.
    history: the exchanges before it. seed: None takes the settings'.
    """

    question: str
    image: Pictures = None
    regions: Sequence[Mark | Region] = ()
    frame: Frame | None = None
    history: Sequence[Exchange] = ()
    seed: int | None = None


class Session:
    """Answers questions with a model and the processor that was made for it.

    settings: taken where a call gives none.
    """

    def __init__(self, model: MultimodalLM, processor: Processor, *, settings: Settings = Settings()) -> None:
        self.model = model
        self.processor = processor
        self.settings = settings

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        settings: Settings = Settings(),
    ) -> Session:
        """The newest complete checkpoint of a run directory; dtype of all weights, None keeps the checkpoint's."""
        found = load_saved_run(Path(path), device=device, dtype=dtype, whole_context=True)
        return cls._of(found, settings)

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        scale: str = "paper",
        overrides: Sequence[str] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        settings: Settings = Settings(),
    ) -> Session:
        """Weights that come without a run.

        path: a folder that `bestiary weights import` made (read at once, without a second copy), a published folder
            with its files as published, or a safetensors file of ours.
        model: a name in conf/model, whose yaml says what no tensor shows (heads, views), or the path of a yaml with a
            model node; None takes the model.yaml that an import of Ovis or Monkey wrote.
        scale, overrides: of that name, as on train.py's command line (`["decoder=llama2_7b"]`).
        """
        found = load_named(Path(path), model=model, scale=scale, overrides=overrides, device=device, dtype=dtype)
        return cls._of(found, settings)

    @classmethod
    def _of(cls, found: Pieces, settings: Settings) -> Session:
        return cls(found.model, found.processor, settings=settings)

    def respond(
        self,
        image: Pictures,
        question: str,
        regions: Sequence[Mark | Region] = (),
        *,
        frame: Frame | None = None,
        history: Sequence[Exchange] = (),
        settings: Settings | None = None,
        max_new_tokens: int | None = None,
    ) -> str:
        """The answer to one question about a picture, or (image None) about nothing but text.

        image, regions, frame, history: see `Request`. max_new_tokens: instead of the settings'.
        """
        request = Request(question, image, regions, frame, history)
        return self.respond_all([request], settings=settings, max_new_tokens=max_new_tokens)[0]

    def respond_all(
        self,
        requests: Sequence[Request],
        *,
        settings: Settings | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """The answers to several questions, each as it would be alone; batch_size: most of them at a time."""
        asked = self._settings(settings, max_new_tokens)
        decode = self._decode(asked)
        prompts = [
            self._prompt(request, f"request {number}: " if len(requests) > 1 else "", asked)
            for number, request in enumerate(requests, 1)
        ]
        ids = self.model.generate(
            prompts,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop=self.processor.stop_sequences(),
            seed=[asked.seed if request.seed is None else request.seed for request in requests],
            batch_size=batch_size,
            ends=_ends(decode, asked.stop),
            num_beams=asked.num_beams,
        )
        texts = [decode(one) for one in ids]
        cuts = [cut_at(text, asked.stop) for text in texts]
        return [text if cut is None else cut for text, cut in zip(texts, cuts, strict=True)]

    def stream(
        self,
        image: Pictures,
        question: str,
        regions: Sequence[Mark | Region] = (),
        *,
        frame: Frame | None = None,
        history: Sequence[Exchange] = (),
        settings: Settings | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer `respond` gives, as soon as they are sure; a bad request raises at once."""
        asked = self._settings(settings, max_new_tokens)
        if asked.num_beams > 1:
            raise ValueError(
                f"num_beams={asked.num_beams} cannot stream: the best answer is known at its end; "
                "use respond, or num_beams=1"
            )
        decode = self._decode(asked)
        prompt = self._prompt(Request(question, image, regions, frame, history), "", asked)
        ids = self.model.stream(
            prompt,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop=self.processor.stop_sequences(),
            seed=asked.seed,
        )
        return pieces(ids, decode, asked.stop)

    def start(
        self,
        image: Pictures = None,
        regions: Sequence[Mark | Region] = (),
        *,
        frame: Frame | None = None,
        settings: Settings | None = None,
    ) -> Chat:
        """A conversation of several turns about a picture (or several) and its regions."""
        data = all_encoded(image)
        marks = regions_of(regions, frame, only(data, regions))
        return Chat(self, data, marks, self.settings if settings is None else settings)

    def _settings(self, settings: Settings | None, max_new_tokens: int | None) -> Settings:
        chosen = self.settings if settings is None else settings
        return chosen if max_new_tokens is None else replace(chosen, max_new_tokens=max_new_tokens)

    def _decode(self, asked: Settings) -> Decode:
        """Ids to the text of an answer; ValueError where places are asked of a model that marks none."""
        if not asked.places:
            return self.processor.decode
        found: Decode | None = getattr(self.processor, "decode_places", None)
        if found is None:
            raise ValueError("places=True, but this model marks no places in its answers; leave it out")
        return found

    def _asking(self, asked: Settings) -> Processor:
        """What makes the prompts; ValueError where verbatim is asked of a model without words of its own."""
        if not asked.verbatim:
            return self.processor
        found: Callable[[], Processor] | None = getattr(self.processor, "verbatim", None)
        if found is None:
            raise ValueError("verbatim=True, but this model puts no words around a question; leave it out")
        return found()

    def _prompt(self, request: Request, where: str, asked: Settings) -> Example:
        """The sequence to be continued; ValueError of one line that begins with `where`."""
        processor = self._asking(asked)
        try:
            images = all_encoded(request.image)
            regions = regions_of(request.regions, request.frame, only(images, request.regions))
            sample = Sample(_KEY, _KEY, "", _turns(request), images, regions)
            return self._fitting(sample, processor)
        except ValueError as error:
            raise ValueError(f"{where}{_blamed(error, request.image)}") from error

    def _fitting(self, sample: Sample, processor: Processor) -> Example:
        """The sample's prompt, with room for an answer; otherwise the line says from which turn on there is none."""
        prompt, taken, room = self._measured(sample, processor)
        if prompt is not None:
            return prompt
        number = total = (len(sample.turns) + 1) // 2
        while number > 1:
            shorter, *measured = self._measured(replace(sample, turns=sample.turns[: 2 * number - 3]), processor)
            if shorter is not None:
                break
            number, (taken, room) = number - 1, measured
        raise ValueError(
            f"turn {number} of {total} does not fit: with it the prompt takes {taken} positions (the picture and its "
            f"regions included) and leaves no room for an answer in {room}; shorten it, begin a new chat or take a "
            "model with a longer context (max_position_embeddings)"
        )

    def _measured(self, sample: Sample, processor: Processor) -> tuple[Example | None, int, int]:
        """The prompt, None where it is too long; the positions it takes, and how many there are."""
        room = self.model.decoder.max_positions
        try:
            prompt = processor.prompt(sample)
        except SampleTooLongError as error:
            return None, error.num_tokens, error.max_tokens
        return prompt if len(prompt) < room else None, len(prompt), room


class Chat:
    """A conversation about one picture: every question is asked with all exchanges before it."""

    def __init__(
        self, session: Session, images: tuple[bytes, ...], regions: tuple[Region, ...], settings: Settings
    ) -> None:
        self._session, self._images, self._regions, self._settings = session, images, regions, settings
        self._history: list[Exchange] = []

    @property
    def history(self) -> tuple[Exchange, ...]:
        """Questions and answers so far."""
        return tuple(self._history)

    def ask(self, question: str, *, max_new_tokens: int | None = None) -> str:
        """The answer, which the next question will have heard."""
        if self._settings.num_beams == 1:
            return "".join(self.stream(question, max_new_tokens=max_new_tokens))
        request = Request(question, self._images, self._regions, history=self._history)
        [answer] = self._session.respond_all([request], settings=self._settings, max_new_tokens=max_new_tokens)
        self._history.append((question, answer))
        return answer

    def pieces(self, question: str) -> Iterator[str]:
        """Pieces of the answer where it can be streamed, else the whole of it as one."""
        return self.stream(question) if self._settings.num_beams == 1 else iter([self.ask(question)])

    def stream(self, question: str, *, max_new_tokens: int | None = None) -> Iterator[str]:
        """Pieces of the answer; the exchange counts once they are all taken."""
        told = self._session.stream(
            self._images,
            question,
            self._regions,
            history=self._history,
            settings=self._settings,
            max_new_tokens=max_new_tokens,
        )
        return self._remembered(question, told)

    def undo(self) -> None:
        """Forget the last exchange; ValueError where there is none."""
        if not self._history:
            raise ValueError("there is no exchange to undo")
        self._history.pop()

    def _remembered(self, question: str, told: Iterator[str]) -> Iterator[str]:
        answer = ""
        for piece in told:
            answer += piece
            yield piece
        self._history.append((question, answer))


def _ends(decode: Decode, stops: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Whether the text of some ids holds a stop string."""
    return (lambda ids: cut_at(decode(ids), stops) is not None) if stops else None


def _blamed(error: ValueError, image: Pictures) -> str:
    """What is wrong with a request, with the file's name where it is a picture."""
    try:
        check_files(image)
    except ValueError as named:
        return str(named)
    return error.problem if isinstance(error, SampleError) else str(error)


def _turns(request: Request) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number, exchange in enumerate(request.history, 1):
        if len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise ValueError(f"exchange {number} of the history is {exchange!r:.60}, not a question and its answer")
        turns += [Turn("human", exchange[0]), Turn("assistant", exchange[1])]
    if not isinstance(request.question, str) or not request.question.strip():
        raise ValueError(f"the question is {request.question!r:.20}: write what is to be answered")
    return (*turns, Turn("human", request.question))
