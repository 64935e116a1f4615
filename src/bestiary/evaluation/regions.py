"""The `regions` benchmark: what a model says about marked regions of held-out pictures.

Every picture is asked its first question twice, by free greedy generation: with its own prompts and with another
picture's (the control). Only the question reaches the model, so no gold label can leak.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bestiary.evaluation.asking import answers, check_counts, even_choice, first_exchange
from bestiary.evaluation.control import shuffled
from bestiary.evaluation.panels import TABLE_COLUMNS, PanelRow, draw_marks, open_picture, panel, table_row, to_png
from bestiary.evaluation.report import MarkResult, Metric, Prediction, Report, Score, metric_of, write_atomically
from bestiary.evaluation.scorers import Pair, is_exact, label_words, parse_marks, semantic_iou
from bestiary.evaluation.semantic import SentenceEncoder, load_sentence_encoder, packaged_model
from bestiary.schema import Processor, Region, Sample, SampleError

if TYPE_CHECKING:
    from bestiary.mllm import MultimodalLM

log = logging.getLogger(__name__)

PairScorer = Callable[[Sequence[Pair]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Item:
    """One picture's first question and answer, and what was said with true and with shuffled prompts."""

    sample: Sample
    question: str
    reference: str
    prediction: str
    control: str | None
    control_regions: tuple[Region, ...] | None

    @property
    def task(self) -> str:
        """The sample's task; without one, an answer that names marks is a label."""
        return str(self.sample.meta.get("task") or ("label" if parse_marks(self.reference) else "answer"))

    def kind_of(self, mark: int) -> str:
        """The kind of prompt a mark of the reference stands for."""
        kinds = {region.mark: region.kind for region in self.sample.regions}
        if mark not in kinds:
            raise SampleError(self.sample.key, f"the answer names mark {mark} but its regions are {sorted(kinds)}")
        return kinds[mark]

    def pairs(self, answer: str) -> list[Pair]:
        """The regions the reference names, with what `answer` says of each.

        A reference without mark lines speaks of the single region as a whole; of several it says nothing by mark.
        """
        if truth := parse_marks(self.reference):
            said = parse_marks(answer)
            return [Pair(mark, said.get(mark), text) for mark, text in truth.items()]
        regions = self.sample.regions
        return [Pair(regions[0].mark, answer, self.reference)] if len(regions) == 1 else []

    def groups(self) -> dict[str, str]:
        """What a score of the whole answer is broken down by."""
        kinds = {region.kind for region in self.sample.regions}
        kind = kinds.pop() if len(kinds) == 1 else "mixed"
        return {
            "domain": self.sample.domain,
            "kind": kind,
            "task": self.task,
            "marks": str(len(self.sample.regions)),
        }


class RegionsBenchmark:
    """Label accuracy, OCR accuracy and semantic IoU (and similarity) per domain, kind of prompt and number of marks."""

    sources: tuple[str, ...] = ()
    """All: it asks about every held-out sample with regions."""

    def __init__(
        self,
        *,
        name: str = "regions",
        max_samples: int = 0,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        semantic_similarity: bool | Literal["auto"] = "auto",
        seed: int = 0,
        panel_pictures: int = 12,
        label_tasks: Sequence[str] = ("label", "ocr"),
        ocr_tasks: Sequence[str] = ("ocr",),
    ) -> None:
        """Keeps the arguments.

        max_samples: an even draw over the domains, 0 = all. semantic_similarity: auto = if the extra is installed.
        label_tasks: tasks (`meta["task"]`) with one exact text a region, which make up `accuracy`, semantic IoU and
        semantic similarity; ocr_tasks: those of `ocr_accuracy`. Whole answers of every task make `answer_accuracy`.
        """
        check_counts(
            max_samples=max_samples,
            panel_pictures=panel_pictures,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        if semantic_similarity not in (True, False, "auto"):
            raise ValueError(f"semantic_similarity={semantic_similarity!r}; it is true, false or auto")
        self.name = name
        self.max_samples = max_samples
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.semantic_similarity = semantic_similarity
        self.seed = seed
        self.panel_pictures = panel_pictures
        self.label_tasks = tuple(label_tasks)
        self.ocr_tasks = tuple(ocr_tasks)

    def run(self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], out: Path) -> Report:
        """Asks, scores, and writes report.json, predictions.jsonl and panel.png into the folder `out`."""
        start = time.perf_counter()
        notes: list[str] = []
        encoder = self._encoder(notes)
        chosen, left_out = self._choose(samples)
        items = self._ask(model, processor, chosen, notes)
        rows = [_panel_row(items[i]) for i in self._shown(items)]
        if rows:
            write_atomically(out / "panel.png", to_png(panel(rows)))
        report = Report(
            benchmark=self.name,
            metrics=self._metrics(items, encoder),
            predictions=tuple(_prediction(item) for item in items),
            counts=_counts(items) | left_out,
            notes=tuple(notes),
            settings=vars(self).copy(),
            seconds=time.perf_counter() - start,
            panel=out / "panel.png" if rows else None,
            table_columns=TABLE_COLUMNS,
            table_rows=tuple(table_row(row) for row in rows),
        )
        report.write(out)
        log.info("%s: %d pictures in %.1f s -> %s", self.name, len(items), report.seconds, out)
        return report

    def _encoder(self, notes: list[str]) -> SentenceEncoder | None:
        if self.semantic_similarity is False:
            return None
        if self.semantic_similarity == "auto" and packaged_model() is None:
            notes.append("semantic similarity left out: the extra `eval` (all-MiniLM-L6-v2) is not installed")
            return None
        return load_sentence_encoder()

    def _choose(self, samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, int]]:
        """The samples to ask about, and how many have no region to ask about."""
        # Pictures of a large set are not held: the first pass keeps places and domains only.
        places = [(i, sample.domain) for i, sample in enumerate(samples) if sample.regions]
        if not places:
            raise ValueError(f"none of {len(samples)} samples has a region to ask about; give held-out marked ones")
        chosen = even_choice([domain for _, domain in places], self.max_samples, seed=self.seed)
        return [samples[places[i][0]] for i in chosen], {"left_out_without_regions": len(samples) - len(places)}

    def _ask(
        self, model: MultimodalLM, processor: Processor, samples: Sequence[Sample], notes: list[str]
    ) -> list[Item]:
        def ask(asked: Sequence[Sample]) -> list[str]:
            return answers(model, processor, asked, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)

        said = ask(samples)
        if len(samples) < 2:
            notes.append("no shuffled-prompt control: it needs at least two pictures with regions")
            return [Item(samples[0], *first_exchange(samples[0]), said[0], None, None)]
        strangers = shuffled(samples, seed=self.seed)
        said_of_strangers = ask(strangers)
        return [
            Item(sample, *first_exchange(sample), text, control, stranger.regions)
            for sample, text, control, stranger in zip(samples, said, said_of_strangers, strangers, strict=True)
        ]

    def _metrics(self, items: Sequence[Item], encoder: SentenceEncoder | None) -> dict[str, Metric]:
        """Metrics that have something to score, in the order of the report."""
        scores = {
            "accuracy": _by_region(items, self.label_tasks, _exact),
            "ocr_accuracy": _by_region(items, self.ocr_tasks, _exact),
            "semantic_iou": _by_region(items, self.label_tasks, _word_overlap),
            "answer_accuracy": [_whole_answer(i, item) for i, item in enumerate(items)],
        }
        if encoder is not None:
            scores["semantic_similarity"] = _by_region(items, self.label_tasks, _similarity(encoder))
        return {name: metric_of(found, seed=self.seed) for name, found in scores.items() if found}

    def _shown(self, items: Sequence[Item]) -> list[int]:
        domains = [item.sample.domain for item in items]
        return even_choice(domains, self.panel_pictures, seed=self.seed) if self.panel_pictures else []


def _exact(pairs: Sequence[Pair]) -> list[float]:
    return [float(is_exact(pair.predicted, pair.truth)) for pair in pairs]


def _word_overlap(pairs: Sequence[Pair]) -> list[float]:
    return [semantic_iou(pair.predicted, pair.truth) for pair in _as_words(pairs)]


def _similarity(encoder: SentenceEncoder) -> PairScorer:
    return lambda pairs: encoder.similarity(_as_words(pairs)).tolist()


def _as_words(pairs: Sequence[Pair]) -> list[Pair]:
    return [
        Pair(pair.mark, None if pair.predicted is None else label_words(pair.predicted), label_words(pair.truth))
        for pair in pairs
    ]


def _by_region(items: Sequence[Item], tasks: Sequence[str], scorer: PairScorer) -> list[Score]:
    """One score a region of the given tasks; all pairs go through the scorer in one call."""
    numbered = [(i, item) for i, item in enumerate(items) if item.task in tasks]
    ours = [(i, item, pair) for i, item in numbered for pair in item.pairs(item.prediction)]
    values = scorer([pair for _, _, pair in ours])
    controls: Sequence[float | None] = [None] * len(ours)
    if all(item.control is not None for _, item in numbered):
        controls = scorer([pair for _, item in numbered for pair in item.pairs(item.control or "")])
    return [
        Score(i, value, control, item.groups() | {"kind": item.kind_of(pair.mark)})
        for (i, item, pair), value, control in zip(ours, values, controls, strict=True)
    ]


def _whole_answer(picture: int, item: Item) -> Score:
    control = None if item.control is None else float(is_exact(item.control, item.reference))
    return Score(picture, float(is_exact(item.prediction, item.reference)), control, item.groups())


def _counts(items: Sequence[Item]) -> dict[str, int]:
    """What was asked, and how often an answer left a region out or named one nobody asked about."""
    counts: Counter[str] = Counter(pictures=len(items), regions=0, missing_regions=0, extra_regions=0)
    for item in items:
        pairs = item.pairs(item.prediction)
        counts["regions"] += len(pairs)
        counts["missing_regions"] += sum(pair.predicted is None for pair in pairs)
        counts["extra_regions"] += len(parse_marks(item.prediction).keys() - {pair.mark for pair in pairs})
    return dict(counts)


def _mark_results(item: Item) -> tuple[MarkResult, ...]:
    ours = item.pairs(item.prediction)
    theirs = {pair.mark: pair.predicted for pair in item.pairs(item.control or "")}
    return tuple(
        MarkResult(
            mark=pair.mark,
            kind=item.kind_of(pair.mark),
            truth=pair.truth,
            predicted=pair.predicted,
            control=None if item.control is None else theirs[pair.mark],
            is_correct=is_exact(pair.predicted, pair.truth),
            is_control_correct=None if item.control is None else is_exact(theirs[pair.mark], pair.truth),
        )
        for pair in ours
    )


def _prediction(item: Item) -> Prediction:
    sample = item.sample
    return Prediction(
        key=sample.key,
        source=sample.source,
        domain=sample.domain,
        task=item.task,
        question=item.question,
        reference=item.reference,
        prediction=item.prediction,
        control=item.control,
        is_correct=is_exact(item.prediction, item.reference),
        marks=_mark_results(item),
        regions=tuple(asdict(region) for region in sample.regions),
        control_regions=None if item.control_regions is None else tuple(asdict(r) for r in item.control_regions),
    )


def _panel_row(item: Item) -> PanelRow:
    sample = item.sample
    return PanelRow(
        picture=draw_marks(open_picture(sample), sample.regions),
        title=f"{sample.domain} · {item.task}",
        question=item.question,
        reference=item.reference,
        prediction=item.prediction,
        control=item.control,
        is_correct=is_exact(item.prediction, item.reference),
        marks=_mark_results(item),
    )
