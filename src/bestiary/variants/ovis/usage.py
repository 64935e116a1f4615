"""How much of the visual vocabulary a run uses, counted where the probabilities stand in memory anyway.

Shape letters: K tokens, V visual words without the marks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class WordUsage:
    """Counts of one rank, on the device; nothing waits for it until `numbers` is asked.

    A word is used when it is the most probable one of a token. Which words ever were is kept over the run; the other
    numbers are those of the step that `begin` opened with `is_full`.
    """

    def __init__(self) -> None:
        self.used: Tensor | None = None
        self._is_full = False
        self._sums: Tensor | None = None
        self._entropy: Tensor | None = None
        self._tokens = 0

    def begin(self, *, is_full: bool) -> None:
        """A step begins; is_full: its mean distribution and entropy are wanted."""
        self._is_full, self._sums, self._entropy, self._tokens = is_full, None, None, 0

    @torch.no_grad()
    def add(self, probabilities_KV: Tensor) -> None:
        """Count a chunk of tokens."""
        num_words, device = probabilities_KV.shape[1], probabilities_KV.device
        if self.used is None or self.used.device != device:
            before = self.used
            self.used = torch.zeros(num_words, dtype=torch.bool, device=device) if before is None else before.to(device)
        self.used[probabilities_KV.argmax(-1)] = True
        if self._is_full:
            total, entropy = probabilities_KV.float().sum(0), torch.special.entr(probabilities_KV.float()).sum()
            self._sums = total if self._sums is None else self._sums + total
            self._entropy = entropy if self._entropy is None else self._entropy + entropy
            self._tokens += len(probabilities_KV)

    def numbers(self, num_words: int, device: torch.device, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Numbers of the step over all ranks, which call together; {} where no rank saw a token.

        over_ranks: sums a tensor over ranks. words/used: share of the words that any token ever had. words/perplexity:
        of the mean distribution, from 1 (one word for everything) to `num_words` (all alike). words/entropy: mean over
        tokens, in nats, from 0 (each token one word).
        """
        zeros = torch.zeros(num_words, device=device)
        sums = zeros if self._sums is None else self._sums
        used = zeros if self.used is None else self.used.float()
        entropy = zeros.new_zeros(1) if self._entropy is None else self._entropy.reshape(1)
        packed = over_ranks(torch.cat([sums, used, entropy, zeros.new_full((1,), self._tokens)]).double())
        tokens = packed[-1].clamp(min=1)
        mean_entropy = torch.special.entr(packed[:num_words] / tokens).sum()
        share = (packed[num_words:-2] > 0).double().mean()
        told = torch.stack([packed[-1], share, mean_entropy.exp(), packed[-2] / tokens]).tolist()
        return dict(zip(("words/used", "words/perplexity", "words/entropy"), told[1:], strict=True)) if told[0] else {}
