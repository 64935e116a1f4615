"""Caption scores of the COCO tools: METEOR, CIDEr, BLEU, ROUGE-L over PTB tokens.

A thin, careful shell over pycocoevalcap (extra `eval`). METEOR and the tokenizer are Java programs. CIDEr is the raw
scorer's value, which contains a factor of 10; papers print it times 100 (so 1.0 raw is "100").
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

METRICS = ("METEOR", "CIDEr")
"""What the region-captioning tables of the papers print."""


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores of a set of captions.

    overall: metric -> score of the set; BLEU as `Bleu_1` ... `Bleu_4`. per_key: key -> metric -> score.
    references, predictions: the texts as tokenised, which is what was compared.
    """

    overall: dict[str, float]
    per_key: dict[str, dict[str, float]]
    references: dict[str, list[str]]
    predictions: dict[str, list[str]]


def caption_scores(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], *, metrics: Sequence[str] = METRICS
) -> CaptionScores:
    """Scores every reference's prediction; a missing prediction counts as an empty caption, an extra one is ignored.

    metrics: of METEOR, CIDEr, Bleu, ROUGE_L.
    """
    if not references:
        raise ValueError("no reference captions to score against; check the annotation file")
    if empty := [key for key, texts in references.items() if not any(text.strip() for text in texts)]:
        raise ValueError(f"caption {empty[0]!r} has no reference text ({len(empty)} such); fix the annotation file")
    _require_tools()
    true = tokenise(references)
    ours = tokenise({key: [predictions.get(key, "")] for key in references})
    overall: dict[str, float] = {}
    per_key: dict[str, dict[str, float]] = {key: {} for key in references}
    for metric in metrics:
        for name, score, scores in _score(metric, true, ours):
            overall[name] = score
            for key, value in zip(true, scores, strict=True):
                per_key[key][name] = float(value)
    return CaptionScores(overall, per_key, true, ours)


def tokenise(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Lower-cased PTB tokens joined by spaces, punctuation dropped; an empty text stays empty."""
    _require_tools()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The Java side drops empty lines at the end and cannot read broken Unicode: only real text is sent.
    places = [(key, i, _clean(text)) for key, group in texts.items() for i, text in enumerate(group)]
    sent = {f"{key}\n{i}": [{"caption": text}] for key, i, text in places if text}
    tokens: dict[str, list[str]] = PTBTokenizer().tokenize(sent) if sent else {}
    done: dict[str, list[str]] = {key: [] for key in texts}
    for key, i, text in places:
        done[key].append(tokens[f"{key}\n{i}"][0] if text else "")
    return done


def _clean(text: str) -> str:
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def _score(metric: str, true: dict[str, list[str]], ours: dict[str, list[str]]) -> list[tuple[str, float, Any]]:
    """(name, score of the set, scores by key) of one scorer."""
    match metric:
        case "METEOR":
            from pycocoevalcap.meteor.meteor import Meteor

            score, scores = Meteor().compute_score(true, ours)
        case "CIDEr":
            from pycocoevalcap.cider.cider import Cider

            score, scores = Cider().compute_score(true, ours)
        case "ROUGE_L":
            from pycocoevalcap.rouge.rouge import Rouge

            score, scores = Rouge().compute_score(true, ours)
        case "Bleu":
            from pycocoevalcap.bleu.bleu import Bleu

            orders, by_order = Bleu(4).compute_score(true, ours, verbose=0)
            return [(f"Bleu_{i}", float(s), by_order[i - 1]) for i, s in enumerate(orders, start=1)]
        case _:
            raise ValueError(f"unknown caption metric {metric!r}; known: METEOR, CIDEr, Bleu, ROUGE_L")
    return [(metric, float(score), scores)]


def _require_tools() -> None:
    if find_spec("pycocoevalcap") is None:
        raise ValueError("caption scores need pycocoevalcap: install the extra `eval` (pip install 'bestiary[eval]')")
    if shutil.which("java") is None:
        raise ValueError("caption scores (METEOR, PTB tokens) run on Java, and `java` is not on PATH; install a JRE")
