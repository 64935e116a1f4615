"""How probable a model finds held-out texts, beside the same texts under another picture.

For models that were taught to go on, not to answer: captions and documents of a pre-training stage. In the control
every text stands behind another picture of its domain; what the picture is good for is the difference.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.evaluation.asking import check_counts, even_choice
from bestiary.evaluation.control import other_pictures
from bestiary.evaluation.questions import numbered, picture_name
from bestiary.evaluation.report import Metric, Report, ratio_metric
from bestiary.schema import Processor, Sample

if TYPE_CHECKING:
    from bestiary.mllm import MultimodalLM

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextPrediction:
    """One line of predictions.jsonl: negative log-likelihoods in nats, summed over the text's learned tokens."""

    key: str
    source: str
    domain: str
    picture: int
    num_tokens: int
    nll: float
    control_nll: float | None


class TextLikelihood:
    """Mean negative log-likelihood in nats per learned token: lower is better, and lower than the control."""

    def __init__(
        self,
        *,
        name: str,
        sources: Sequence[str] = (),
        control: bool = True,
        max_samples: int = 0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        """Keeps the arguments.

        sources: globs of the names in `data.heldout`; empty = all. control: score under another picture too.
        max_samples: an even draw over the domains; 0 = all.
        """
        check_counts(max_samples=max_samples, batch_size=batch_size)
        self.name = name
        self.sources = tuple(sources)
        self.control = control
        self.max_samples = max_samples
        self.batch_size = batch_size
        self.seed = seed

    def run(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], out: Path) -> Report:
        """Scores, and writes report.json and predictions.jsonl into the folder `out`."""
        start = time.perf_counter()
        if not len(samples):
            raise ValueError(f"{self.name}: its held-out sources hold no sample; name others in sources")
        chosen = even_choice([sample.domain for sample in samples], self.max_samples, seed=self.seed)
        lines = self._score(model, processor, [samples[i] for i in chosen])
        without = sum(line.control_nll is None for line in lines)
        has_note = self.control and without
        report = Report(
            benchmark=self.name,
            metrics={"nll": self._metric(lines)},
            predictions=tuple(lines),
            counts={"texts": len(lines), "tokens": sum(line.num_tokens for line in lines), "without_control": without},
            notes=(f"{without} of {len(lines)} texts have no control: they have no picture",) if has_note else (),
            settings=vars(self) | {"sources": list(self.sources)},
            seconds=time.perf_counter() - start,
        )
        report.write(out)
        log.info("%s: %d texts in %.1f s -> %s", self.name, len(lines), report.seconds, out)
        return report

    def _score(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample]) -> list[TextPrediction]:
        def nll(asked: Sequence[Sample]) -> list[tuple[float, int]]:
            found = []
            for start in range(0, len(asked), self.batch_size):
                examples = [processor(sample) for sample in asked[start : start + self.batch_size]]
                found += model.log_likelihood(examples, batch_size=self.batch_size)
            return [(-one.log_likelihood, one.num_tokens) for one in found]

        pictures = numbered(picture_name(sample) for sample in samples)
        shown = [picture if sample.images else None for picture, sample in zip(pictures, samples, strict=True)]
        strangers: Sequence[int | None] = [None] * len(samples)
        if self.control:
            strangers = other_pictures(shown, [sample.domain for sample in samples], seed=self.seed)
        changed = [replace(samples[i], images=samples[j].images) for i, j in enumerate(strangers) if j is not None]
        controls = iter(nll(changed))
        return [
            TextPrediction(
                key=sample.key,
                source=sample.source,
                domain=sample.domain,
                picture=picture,
                num_tokens=num_tokens,
                nll=value,
                control_nll=None if stranger is None else next(controls)[0],
            )
            for sample, picture, stranger, (value, num_tokens) in zip(
                samples, pictures, strangers, nll(samples), strict=True
            )
        ]

    def _metric(self, lines: Sequence[TextPrediction]) -> Metric:
        """Over all tokens, and over those of every domain."""
        domains: dict[str, list[TextPrediction]] = defaultdict(list)
        for line in lines:
            domains[line.domain].append(line)
        by_domain = {name: self._ratio(domains[name]) for name in sorted(domains)}
        return replace(self._ratio(lines), by={"domain": by_domain})

    def _ratio(self, lines: Sequence[TextPrediction]) -> Metric:
        counts = [float(line.num_tokens) for line in lines]
        controls = [line.control_nll for line in lines if line.control_nll is not None]
        theirs = (controls, counts) if len(controls) == len(lines) else None
        return ratio_metric(([line.nll for line in lines], counts), theirs, seed=self.seed)
