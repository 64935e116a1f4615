"""Asks a model about samples: which samples, which question, in batches, greedily or as a published evaluation did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bestiary.schema import Processor, Sample, SampleError

if TYPE_CHECKING:
    from bestiary.mllm import MultimodalLM


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is drawn.

    temperature 0: greedy. cut_at: where the answer's text ends, besides the processor's own stop sequences.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    cut_at: str = ""

    def cut(self, text: str) -> str:
        """The answer without what follows `cut_at`."""
        return text.split(self.cut_at)[0].strip() if self.cut_at else text


GREEDY = Decoding()
DECODINGS = {
    "greedy": GREEDY,
    # Of SPHINX's published evaluation: LLaMA2-Accessory @ 3777c43, accessory/eval_mm/evaluate.py.
    "reference": Decoding(temperature=0.1, top_p=0.75, seed=1, cut_at="###"),
}


def check_counts(
    *,
    max_samples: int = 0,
    panel_pictures: int = 0,
    batch_size: int = 1,
    max_new_tokens: int = 1,
    min_new_tokens: int = 0,
) -> None:
    """ValueError for numbers of a benchmark that count nothing."""
    if max_samples < 0 or panel_pictures < 0 or batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"max_samples={max_samples}, panel_pictures={panel_pictures} must be >= 0 and "
            f"batch_size={batch_size}, max_new_tokens={max_new_tokens} >= 1"
        )
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens} must be from 0 to max_new_tokens={max_new_tokens}")


def decoding_named(name: str) -> Decoding:
    """A named way of drawing answers; ValueError with the known names."""
    if name not in DECODINGS:
        raise ValueError(f"decoding={name!r} is unknown; choose one of {', '.join(DECODINGS)}")
    return DECODINGS[name]


def first_exchange(sample: Sample) -> tuple[str, str]:
    """The first question and its answer; later turns are not asked, since gold answers before them would leak."""
    if len(sample.turns) < 2 or sample.turns[0].role != "human" or sample.turns[1].role != "assistant":
        roles = ", ".join(turn.role for turn in sample.turns) or "no turns"
        raise SampleError(sample.key, f"has {roles}; a benchmark sample opens with a question and its answer")
    return sample.turns[0].text, sample.turns[1].text


def only_question(sample: Sample) -> Sample:
    """The sample without anything the model must not see: no answer, no later turn, no facts."""
    first_exchange(sample)
    return replace(sample, turns=sample.turns[:1], meta={})


def even_choice(domains: Sequence[str], max_samples: int, *, seed: int) -> list[int]:
    """Places of at most `max_samples` samples (0 = all), dealt evenly over the domains, in their old order."""
    if max_samples in (0, len(domains)) or max_samples > len(domains):
        return list(range(len(domains)))
    by_domain: dict[str, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(domains)).tolist():
        by_domain[domains[i]].append(i)
    longest = max(len(places) for places in by_domain.values())
    dealt = [by_domain[name][k] for k in range(longest) for name in sorted(by_domain) if k < len(by_domain[name])]
    return sorted(dealt[:max_samples])


def answers(
    model: MultimodalLM,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    answer_start: str = "",
    min_new_tokens: int = 0,
) -> list[str]:
    """The answer to each sample's first question, in order of the samples.

    answer_start: the answer's first words, which the model goes on from; they are not part of what is returned.
    min_new_tokens: nothing ends an answer before it has so many.
    """
    stop = processor.stop_sequences()
    start_words = {"answer_start": answer_start} if answer_start else {}
    shortest: dict[str, Any] = {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
    texts: list[str] = []
    with _evaluating(model):
        for start in range(0, len(samples), batch_size):
            asked = samples[start : start + batch_size]
            examples = [processor.prompt(only_question(sample), **start_words) for sample in asked]
            ids = model.generate(
                examples,
                max_new_tokens=max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                stop=stop,
                seed=decoding.seed,
                **shortest,
            )
            assert len(ids) == len(examples), f"{len(ids)} answers to {len(examples)} prompts from generate()"
            texts += [decoding.cut(processor.decode(answer)) for answer in ids]
    return texts


def by_length(samples: Sequence[Sample]) -> list[int]:
    """Places of the samples, those of like length together: text before pictures, then by the question's letters."""
    return sorted(range(len(samples)), key=lambda i: (len(samples[i].images), len(samples[i].turns[0].text), i))


@contextmanager
def _evaluating(model: MultimodalLM) -> Iterator[None]:
    """Eval mode, and back to what every submodule was: frozen parts stay in eval mode."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
