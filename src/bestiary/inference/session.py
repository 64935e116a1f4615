"""A conversation with a model about a picture and its marked regions.

The caller's pictures, regions and turns are read, never changed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from bestiary.schema import Processor, Region, Sample, Turn

if TYPE_CHECKING:
    from bestiary.mllm import MultimodalLM

QuestionAnswer = tuple[str, str | None]
"""A question and its answer; None marks the question to answer now."""


class Session:
    """Answers questions with a model and the processor that was made for it."""

    def __init__(self, model: MultimodalLM, processor: Processor) -> None:
        self._model = model
        self._processor = processor

    def respond(
        self,
        image: Image.Image | bytes | None,
        question: str,
        regions: Sequence[Region] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to one question about a picture.

        image: a PIL picture, encoded bytes, or None for text alone. regions: fractions of that picture.
        temperature 0 is greedy; `seed` matters above it.
        """
        return self.chat(
            image,
            [(question, None)],
            regions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def chat(
        self,
        image: Image.Image | bytes | None,
        qas: Sequence[QuestionAnswer],
        regions: Sequence[Region] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to the last question of `qas`, given the earlier ones with their answers."""
        images = () if image is None else (image if isinstance(image, bytes) else _png(image),)
        sample = Sample("session", "session", "", _turns(qas), images, tuple(regions))
        ids = self._model.generate(
            [self._processor.prompt(sample)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=self._processor.stop_sequences(),
            seed=seed,
        )
        return self._processor.decode(ids[0])


def _turns(qas: Sequence[QuestionAnswer]) -> tuple[Turn, ...]:
    if not qas or qas[-1][1] is not None or any(answer is None for _, answer in qas[:-1]):
        raise ValueError(
            f"qas has {len(qas)} turns, unanswered: {[i for i, qa in enumerate(qas) if qa[1] is None]}; "
            "every question but the last needs its answer, and the last must have None"
        )
    turns: list[Turn] = []
    for question, answer in qas:
        turns.append(Turn("human", question))
        if answer is not None:
            turns.append(Turn("assistant", answer))
    return tuple(turns)


def _png(image: Image.Image) -> bytes:
    """Lossless bytes of a picture; palette, alpha and the like are kept for the processor to judge."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
