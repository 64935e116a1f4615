"""MultimodalLM: encode, splice, decode, losses; and generation on top of the same steps.

Each step is a method: `splice` puts visual rows where the processor left placeholders, `hidden` runs the decoder on
packed rows, `forward` returns one loss per target token, `generate` answers prompts. The processor is the only author
of how many positions an image takes, so a count that disagrees is an error here, never a truncation.

Shape letters: B rows, T positions of a row, N images, R rows of one image, D width, V vocabulary, K target tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bestiary.language.attention import PackedLayout
from bestiary.language.beams import BeamDecoding
from bestiary.language.decoder import Decoder
from bestiary.language.generation import Decoding, Sampling, sequence_generator
from bestiary.language.prompts import side_by_side
from bestiary.schema import IGNORE, Batch, Example, RegionRows, Slot

HEAD_ELEMENTS = 1 << 25
"""Logits held at a time, positions x vocabulary (128 MB in float32)."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses of the labelled positions of a batch, in row-major order, unreduced.

    values: float32[K], negative log-likelihoods. segment: int64[K], index into `batch.segments`.
    """

    values: Tensor
    segment: Tensor


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How probable the model finds the labelled tokens of one example.

    log_likelihood: sum over tokens. mean_nll: its negative mean (the reference calls it "ppl").
    is_greedy: greedy decoding would have produced exactly these tokens.
    """

    log_likelihood: float
    mean_nll: float
    num_tokens: int
    is_greedy: bool


class MultimodalLM(nn.Module):
    """A decoder that reads rows of images and of visual prompts among its tokens.

    vision: `forward(pixels: uint8[N, 3, S, S]) -> float[N, R, D]`; None for a text model. One with `num_marks` > 0
        also answers `forward(pixels, marks: int64[M]) -> (float[N, R, D], float[M, D])`, see `Slot.MARK`.
    regions: `forward(regions: RegionRows) -> float[rows, D]` in the order of REGION positions; None without prompts.
    Both must take zero images (regions) and answer with zero rows: in training they are called for every batch.
    """

    def __init__(self, decoder: Decoder, vision: nn.Module | None = None, regions: nn.Module | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.vision = vision
        self.regions = regions

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so where a batch belongs."""
        return next(self.decoder.parameters()).device

    @property
    def layout(self) -> dict[str, int]:
        """What a processor must know of the parts: canvas_px, image_rows, num_views, num_slots."""
        parts = [part for part in (self.vision, self.regions) if part is not None]
        return {name: number for part in parts for name, number in cast("dict[str, int]", part.layout).items()}

    @property
    def identity(self) -> dict[str, str]:
        """What weights of the parts depend on beside shapes (see `SphinxVision.identity`)."""
        told = [getattr(part, "identity", {}) for part in (self.vision, self.regions)]
        return {key: value for part in told for key, value in part.items()}

    # -- the steps of a batch ------------------------------------------------------------------------------------

    def splice(self, batch: Batch) -> Tensor:
        """Input embeddings [B, T, D]: token embeddings with the rows of images and prompts in their places."""
        return self._splice(batch, None)

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm [B, T, D], zeros at padding."""
        return self._decode(self.splice(batch), batch)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every position [B, T, V]; for parity and small inputs, training never needs them all."""
        return self.decoder.head(self.hidden(batch))

    def forward(self, batch: Batch) -> TokenLosses:
        """One float32 loss per labelled position; only positions that predict one pass the output head."""
        where, labels, segment = _targets(batch)
        hidden_KD = self.hidden(batch).flatten(0, 1).index_select(0, where)
        return TokenLosses(self._losses(hidden_KD, labels), segment)

    # -- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[Sequence[int]] = (),
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        reference_batching: bool = False,
        ends: Callable[[list[int]], bool] | None = None,
        num_beams: int = 1,
        min_new_tokens: int = 0,
    ) -> list[list[int]]:
        """New token ids of every prompt, in the order given, without the stop sequence that ended the answer.

        A prompt's answer does not depend on the others of the call, nor on `batch_size` (most prompts at a time): it
        draws from a generator of its own, seeded by `seed`, its key and how often that key came before in the call, or
        by its own of several seeds and its key alone. An answer ends at a stop sequence (the end-of-sequence id is
        one), where `ends` says so of its ids, after `max_new_tokens`, or where the decoder's positions end.
        reference_batching: shorter prompts may go on to the total length of the longest, as in the published code.
        num_beams: above 1, the best of so many hypotheses, see `language.beams`; `batch_size` then counts hypotheses.
        min_new_tokens: nothing ends an answer before it has so many.
        """
        sampling = Sampling(temperature, top_p, min_new_tokens)
        check_beams(num_beams, temperature)
        budgets = self._budgets(examples, max_new_tokens, reference_batching)
        generators = _generators(examples, seed)
        outputs: list[list[int]] = [[] for _ in examples]
        by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        with self._evaluating():
            size = max(1, batch_size // num_beams)
            for start in range(0, len(by_length), size):
                chosen = by_length[start : start + size]
                decoding = self._decoding(
                    [examples[i] for i in chosen],
                    budgets=[budgets[i] for i in chosen],
                    stop=stop,
                    sampling=sampling,
                    generators=[generators[i] for i in chosen],
                    ends=ends,
                    num_beams=num_beams,
                )
                for i, ids in zip(chosen, decoding.run(), strict=True):
                    outputs[i] = ids
        return outputs

    @torch.no_grad()
    def stream(
        self,
        example: Example,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[Sequence[int]] = (),
        seed: int = 0,
    ) -> Iterator[int]:
        """The ids `generate` would return, one by one, as soon as they can no longer belong to a stop sequence."""
        with self._evaluating():
            decoding = self._decoding(
                [example],
                budgets=self._budgets([example], max_new_tokens, False),
                stop=stop,
                sampling=Sampling(temperature, top_p),
                generators=[sequence_generator(seed, example.key)],
            )
            assert isinstance(decoding, Decoding)
            output, given = decoding.outputs[0], 0
            while not decoding.is_done:
                decoding.step()
                sure = len(output) - (0 if decoding.is_done else _num_held(output, stop))
                yield from output[given:sure]
                given = max(given, sure)

    @torch.no_grad()
    def log_likelihood(self, examples: Sequence[Example], *, batch_size: int = 64) -> list[Likelihood]:
        """How probable the labelled tokens of each example are, given all before them."""
        results: list[Likelihood] = []
        with self._evaluating():
            for start in range(0, len(examples), batch_size):
                batch, image_index = side_by_side(examples[start : start + batch_size], self.device)
                where, labels, segment = _targets(batch)
                hidden = self._decode(self._splice(batch, image_index), batch).flatten(0, 1).index_select(0, where)
                is_greedy = [self.decoder.head(h).argmax(-1) for h in torch.split(hidden, self._chunk)]
                hits = torch.cat(is_greedy) == labels
                results += _likelihoods(self._losses(hidden, labels), hits, segment, len(batch.segments))
        return results

    # -- parts of the above ------------------------------------------------------------------------------------

    @property
    def _chunk(self) -> int:
        """Positions that go through the output head at a time."""
        return max(1, HEAD_ELEMENTS // self.decoder.vocab_size)

    def _decode(self, embeds_BTD: Tensor, batch: Batch) -> Tensor:
        """The decoder on spliced rows; the layout comes from the host's segments, so no device is waited for."""
        spans = [(s.row, s.start, s.length) for s in batch.segments]
        layout = PackedLayout.from_spans(spans, (batch.ids.shape[0], batch.ids.shape[1]), batch.ids.device)
        return cast(Tensor, self.decoder(embeds_BTD, batch.positions, layout=layout))

    def _losses(self, hidden_KD: Tensor, labels_K: Tensor) -> Tensor:
        """Token losses in chunks; only one chunk's logits are ever held, the backward pass computes them again."""

        def losses(hidden: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.decoder.head(hidden).float(), labels, reduction="none")

        if len(labels_K) <= self._chunk:
            return losses(hidden_KD, labels_K)
        chunks = zip(torch.split(hidden_KD, self._chunk), torch.split(labels_K, self._chunk), strict=True)
        return torch.cat([cast(Tensor, checkpoint(losses, h, y, use_reentrant=False)) for h, y in chunks])

    def _splice(self, batch: Batch, image_index: Tensor | None) -> Tensor:
        """`splice` where image i of the batch is `batch.pixels[image_index[i]]` (None: each its own)."""
        embeds = self.decoder.embed(batch.ids)
        rows, mark_rows = self._image_rows(batch, image_index)
        _place(embeds, batch.slots, Slot.IMAGE, rows)
        _place(embeds, batch.slots, Slot.MARK, mark_rows)
        _place(embeds, batch.slots, Slot.REGION, self._region_rows(batch.regions))
        if self.training:
            self._touch(embeds)
        return embeds

    def _image_rows(self, batch: Batch, image_index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Visual rows [N * R, D] of all images in one call and those of all marks; None without images and training."""
        pixels = batch.pixels
        if self.vision is None and len(pixels):
            raise ValueError(f"{len(pixels)} images given to a model without a vision part")
        if self.vision is None or not (len(pixels) or self.training):
            return None, None
        marks = None
        if getattr(self.vision, "num_marks", 0):
            rows_NRD, marks = self.vision(pixels, batch.ids[batch.slots == Slot.MARK])
        else:
            rows_NRD = self.vision(pixels)
        if image_index is not None:
            rows_NRD = rows_NRD.index_select(0, image_index)
        return cast(Tensor, rows_NRD.flatten(0, 1)), marks

    def _region_rows(self, regions: RegionRows | None) -> Tensor | None:
        """Rows of all visual prompts; None without any outside training."""
        num_prompted = 0 if regions is None else len(regions.counts)
        if self.regions is None and num_prompted:
            raise ValueError(f"prompts of {num_prompted} samples given to a model without a prompt encoder")
        if self.regions is None or not (num_prompted or self.training):
            return None
        return cast(Tensor, self.regions(regions if regions is not None else _no_regions(self.device)))

    def _touch(self, embeds: Tensor) -> None:
        """Tie every trainable parameter of vision and prompts to the result, with weight zero, in place.

        So each has a gradient whatever the batch holds (no image, points but no boxes), and no rank waits for another.
        Sharded parameters are left out: their modules are called for every batch, which is what their ranks wait for.
        """
        parts = [part for part in (self.vision, self.regions) if part is not None]
        touched = [p.sum() for part in parts for p in part.parameters() if type(p) is nn.Parameter and p.requires_grad]
        if touched:
            embeds[0, 0] += torch.stack(touched).sum().to(embeds.dtype) * 0.0

    def _budgets(self, examples: Sequence[Example], max_new_tokens: int, reference_batching: bool) -> list[int]:
        """Most new tokens of every prompt."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least one")
        limit = self.decoder.max_positions
        for example in examples:
            if len(example) >= limit:
                raise ValueError(
                    f"sample {example.key}: a prompt of {len(example)} positions leaves no room for an answer, "
                    f"the decoder was made for {limit}: shorten it or raise max_seq_len"
                )
        if reference_batching:
            total = min(limit, max_new_tokens + max(map(len, examples), default=0))
            return [total - len(example) for example in examples]
        return [min(max_new_tokens, limit - len(example)) for example in examples]

    def _decoding(
        self,
        examples: Sequence[Example],
        *,
        budgets: Sequence[int],
        stop: Sequence[Sequence[int]],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        ends: Callable[[list[int]], bool] | None = None,
        num_beams: int = 1,
    ) -> Decoding | BeamDecoding:
        """Prompts, shortest first, encoded and prefilled."""
        batch, image_index = side_by_side(examples, self.device)
        embeds, lengths = self._splice(batch, image_index), [len(example) for example in examples]
        if num_beams > 1:
            return BeamDecoding(self.decoder, embeds, lengths, num_beams=num_beams, budgets=budgets, stop=stop,
                                ends=ends, min_new=sampling.min_new)  # fmt: skip
        return Decoding(
            self.decoder,
            embeds,
            lengths,
            budgets=budgets,
            stop=stop,
            sampling=sampling,
            generators=generators,
            ends=ends,
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode for a while; every module gets back the mode it had."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def check_beams(num_beams: int, temperature: float) -> None:
    """Raise for a number of beams that is none, or with a temperature, which beams have not."""
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams}: give 1 for the most probable token, or more to search")
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"num_beams={num_beams} draws nothing, but temperature={temperature}: set one of them back")


def _place(embeds_BTD: Tensor, slots_BT: Tensor, slot: Slot, rows: Tensor | None) -> None:
    """Write rows [n, D] over the n positions of this slot, in place; the counts must agree."""
    where = (slots_BT.flatten() == slot).nonzero()[:, 0]
    num_rows = 0 if rows is None else len(rows)
    if len(where) != num_rows:
        kind = slot.name
        raise ValueError(
            f"{len(where)} {kind} positions but {num_rows} {kind.lower()} rows: "
            "is the processor's count (image_rows, num_slots) that of the model?"
        )
    if rows is not None:
        embeds_BTD.view(-1, embeds_BTD.shape[-1]).index_copy_(0, where, rows.to(embeds_BTD.dtype))


def _targets(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where a label is predicted from (flat index), the label, and its segment in `batch.segments`; each int64[K]."""
    ids = batch.segment_ids
    has_loss = (batch.labels[:, 1:] != IGNORE) & (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    row, column = has_loss.nonzero(as_tuple=True)
    per_row = np.bincount([s.row for s in batch.segments], minlength=len(ids))
    first = torch.from_numpy(np.cumsum(per_row) - per_row).to(ids.device)
    segment = first[row] + ids[row, column].long() - 1
    return row * ids.shape[1] + column, batch.labels[row, column + 1], segment


def _generators(examples: Sequence[Example], seed: int | Sequence[int]) -> list[torch.Generator]:
    """One for each prompt, by its key and its own seed, or by its key and how often the key came before."""
    if not isinstance(seed, int):
        return [sequence_generator(own, example.key) for own, example in zip(seed, examples, strict=True)]
    seen: Counter[str] = Counter()
    generators = []
    for example in examples:
        generators.append(sequence_generator(seed, example.key, seen[example.key]))
        seen[example.key] += 1
    return generators


def _no_regions(device: torch.device) -> RegionRows:
    """The prompts of a batch without prompts."""
    count = torch.zeros(0, dtype=torch.int64, device=device)
    return RegionRows(torch.zeros(0, 4, device=device), count, count.bool(), count)


def _num_held(output: Sequence[int], stop: Sequence[Sequence[int]]) -> int:
    """Length of the longest tail that may yet become a stop sequence."""
    longest = 0
    for sequence in stop:
        for length in range(1, min(len(sequence), len(output) + 1)):
            if list(output[-length:]) == list(sequence[:length]):
                longest = max(longest, length)
    return longest


def _likelihoods(values: Tensor, hits: Tensor, segment: Tensor, num_segments: int) -> list[Likelihood]:
    """Sums over the tokens of each example, in double precision."""
    table = torch.stack([values.double(), (~hits).double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    sums = torch.zeros(num_segments, 3, dtype=torch.float64, device=values.device).index_add_(0, segment, table)
    return [Likelihood(-nll, nll / max(count, 1.0), int(count), misses == 0) for nll, misses, count in sums.tolist()]
