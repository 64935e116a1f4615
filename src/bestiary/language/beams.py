"""Beam search: the most probable answers of several prompts at once, by log-probability per token.

The rules are those of `transformers.generate(num_beams=K)` at its defaults (do_sample=False, early_stopping=False,
length_penalty=1), so the ids are the same; beside it, ragged prompts are prefilled once without padding and only then
made K rows of the cache, every prompt has its own budget, and a prompt that is done leaves the batch.

Shape letters: B prompts, K beams, R rows of the cache (K for every prompt that goes on), V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bestiary.language.decoder import Decoder
from bestiary.language.generation import check_stops, cut_stop, prefill, without_stops

_DEAD = float("-inf")
"""Score of a row that only fills its prompt up to K; nothing that continues it is ever taken."""


@dataclass(frozen=True, slots=True)
class _Beam:
    """One hypothesis. score: sum of the log-probabilities of its ids."""

    score: float
    ids: list[int]


@dataclass(slots=True)
class _Search:
    """One prompt: its hypotheses, and the best ended ones as (score per token, ids without the stop), best first."""

    budget: int
    running: list[_Beam] = field(default_factory=lambda: [_Beam(0.0, [])])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)


class BeamDecoding:
    """A batch of prompts, each continued by `num_beams` hypotheses.

    embeds, lengths, budgets, stop, ends: as of `generation.Decoding`; min_new: of `generation.Sampling`. An ended
    hypothesis competes with its log-probability divided by its length, stop tokens included; a prompt is done when
    `num_beams` have ended and the best running one, divided by its length now, is not above the worst of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeds_1KD: Tensor,
        lengths: Sequence[int],
        *,
        num_beams: int,
        budgets: Sequence[int],
        stop: Sequence[Sequence[int]],
        ends: Callable[[list[int]], bool] | None = None,
        min_new: int = 0,
    ) -> None:
        self.decoder, self.num_beams, self.ends, self.min_new = decoder, num_beams, ends, min_new
        self.stop = check_stops(stop)
        self._searches = [_Search(budget) for budget in budgets]
        self._live = list(self._searches)
        self._cache, self._positions, self._logits = prefill(decoder, embeds_1KD, lengths, max(budgets))

    def run(self) -> list[list[int]]:
        """The new tokens of each prompt's best hypothesis, without the stop sequence that ended it."""
        while self._live:
            self._step()
        return [search.ended[0][1] for search in self._searches]

    def _step(self) -> None:
        """One token more for every hypothesis."""
        per_prompt = len(self._logits) // len(self._live)
        rows, tokens, live = [], [], []
        for place, (search, found) in enumerate(zip(self._live, self._continuations(per_prompt), strict=True)):
            chosen = self._advance(search, found)
            if chosen:
                live.append(search)
                rows += [place * per_prompt + parent for parent, _ in chosen]
                tokens += [token for _, token in chosen]
        self._live = live
        if live:
            self._forward(rows, tokens)

    def _continuations(self, per_prompt: int) -> Iterable[list[tuple[float, int, int]]]:
        """Of each prompt the best (score, hypothesis, token), best first: so many that K of them go on."""
        log_probs_RV = self._logits.log_softmax(-1)
        if self.min_new:
            outputs = [beam.ids for search in self._live for beam in search.running]
            log_probs_RV = without_stops(log_probs_RV, outputs, self.stop, min_new=self.min_new)
        scores = [beam.score for search in self._live for beam in search.running]
        vocab = log_probs_RV.shape[1]
        all_scores = (log_probs_RV + log_probs_RV.new_tensor(scores)[:, None]).view(len(self._live), per_prompt * vocab)
        wanted = min(max(2, 1 + len(self.stop)) * self.num_beams, all_scores.shape[1])
        best, where = all_scores.topk(wanted)
        found = best.tolist()
        if any(math.isnan(values[0]) for values in found):  # what is no number counts as the greatest
            raise ValueError(
                "the decoder's logits are not numbers (NaN), so no answer is more probable than another; look for NaN "
                "in its weights, or compute in float32"
            )
        for values, places in zip(found, where.tolist(), strict=True):
            yield [(v, at // vocab, at % vocab) for v, at in zip(values, places, strict=True) if v > _DEAD]

    def _advance(self, search: _Search, found: Sequence[tuple[float, int, int]]) -> list[tuple[int, int]]:
        """Take the continuations of one prompt; returns (hypothesis, token) of the K rows that go on, none if done."""
        running: list[_Beam] = []
        chosen: list[tuple[int, int]] = []
        for rank, (score, parent, token) in enumerate(found):
            ids = [*search.running[parent].ids, token]
            length = len(ids)
            is_long = length >= self.min_new
            is_stopped = cut_stop(ids, self.stop) or (self.ends is not None and is_long and self.ends(ids))
            if is_stopped or length >= search.budget:
                if rank < self.num_beams:  # what ends further down was only there to have K that go on
                    search.ended.append((score / length, ids))
            elif len(running) < self.num_beams:
                running.append(_Beam(score, ids))
                chosen.append((parent, token))
        search.ended = sorted(search.ended, key=lambda item: -item[0])[: self.num_beams]
        if not running or self._is_settled(search, running[0]):
            return []
        spare = self.num_beams - len(running)
        search.running = running + [_Beam(_DEAD, running[0].ids)] * spare
        return chosen + chosen[:1] * spare

    def _is_settled(self, search: _Search, best: _Beam) -> bool:
        is_full = len(search.ended) == self.num_beams
        return is_full and best.score / len(best.ids) <= search.ended[-1][0]

    def _forward(self, rows: list[int], tokens: list[int]) -> None:
        """Logits after the newest token of every row; rows: those of the cache that each row goes on from."""
        device = self._logits.device
        rows_R, ids_R = torch.tensor(rows, device=device), torch.tensor(tokens, device=device)
        self._cache.keep(rows_R)
        self._cache.advance()
        positions = self._positions[rows_R]
        hidden = self.decoder.run_step(self.decoder.embed(ids_R[:, None]), positions, self._cache)
        self._positions = positions + 1
        self._logits = self.decoder.head(hidden[:, 0]).float()
