"""What a captioning model knows of held-out pictures: how well it foresees their captions, what it names unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from bestiary.mllm import MultimodalLM
from bestiary.saved_run import load_saved_run
from bestiary.schema import Processor, Sample
from data_modules.shards import read_source

MAX_NEW_TOKENS = 48
BATCH = 32


def score(run: Path, heldout: Path) -> dict[str, float]:
    """Scores of a run (or mixed run) directory on one held-out source.

    named: share of all pictures' things that a greedily written caption names. named_other: the same, where the caption
    was written about another picture of the source. nll: nats a token of the true captions.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pieces = load_saved_run(run)
    source = read_source(heldout)
    samples = [source[place] for place in range(len(source))]
    strangers = [replace(s, images=samples[i - 1].images) for i, s in enumerate(samples)]
    result = {
        "named": _named(samples, captions(pieces.model, pieces.processor, samples)),
        "named_other": _named(samples, captions(pieces.model, pieces.processor, strangers)),
        "nll": _nll(pieces.model, pieces.processor, samples),
    }
    torch.set_num_threads(threads)
    return result


def captions(model: MultimodalLM, processor: Processor, samples: list[Sample]) -> list[str]:
    """Greedy captions: what the model says behind the picture alone."""
    ids = model.generate(
        [processor.prompt(sample) for sample in samples],
        max_new_tokens=MAX_NEW_TOKENS,
        stop=processor.stop_sequences(),
        batch_size=BATCH,
    )
    return [processor.decode(answer) for answer in ids]


def _named(samples: list[Sample], said: list[str]) -> float:
    """Share of things whose name stands, as a whole word, in what was said of their picture."""
    hits = total = 0
    for sample, text in zip(samples, said, strict=True):
        words = f" {text.replace(',', ' ').replace(';', ' ')} "
        for thing in sample.meta["objects"]:
            hits += f" {thing['label']} " in words
            total += 1
    return hits / total


def _nll(model: MultimodalLM, processor: Processor, samples: list[Sample]) -> float:
    found = model.log_likelihood([processor(sample) for sample in samples], batch_size=BATCH)
    return -sum(one.log_likelihood for one in found) / sum(one.num_tokens for one in found)
