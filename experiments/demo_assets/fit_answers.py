"""Part 2 of the prompt fit: answers look at the slot of their mark and say what it knows."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bestiary.schema import Turn
from bestiary.text.chat import TEMPLATES, render
from bestiary.text.tokenizer import SentencePieceTokenizer
from data_modules.embedded.generate import DOMAINS
from data_modules.embedded.scene import STRING_LETTERS
from data_modules.embedded.tasks import INSTRUCTIONS

from .pictures import LENGTH, TEXT
from .prompt_path import NUM_SLOTS, Asked, Fitter, Marked, Marks, schedule

log = logging.getLogger("demo_assets")
BATCH = 24


class Writer:
    """Conversations about marks, as ids, labels and the mark every label belongs to."""

    def __init__(self, tokenizer: SentencePieceTokenizer, vocabulary: tuple[str, ...]) -> None:
        self.tokenizer, self.vocabulary, self.template = tokenizer, vocabulary, TEMPLATES["current"]

    def ids_after(self, text: str) -> list[int]:
        """Ids of a name or string as it stands in an answer."""
        return self.tokenizer.encode(f"1: {text}")[len(self.tokenizer.encode("1:")) :]

    def write(self, task: str, is_point: bool, labels: list[str]) -> tuple[list[int], list[int], list[int]]:
        """(ids, labels, mark of every label, 0 = none) without BOS."""
        word, noun = ("Mark", "point") if is_point else ("Region", "region")
        noun += "s" if len(labels) > 1 and "{noun}s" in INSTRUCTIONS[task] else ""
        answer = "\n".join(f"{word} {i}: {label}" for i, label in enumerate(labels, 1))
        turns = [Turn("human", INSTRUCTIONS[task].format(noun=noun)), Turn("assistant", answer)]
        told = render(self.template, turns)
        ids, begins, ends = self.tokenizer.encode_spans(told.text)
        starts, at = [], told.text.rindex(answer)
        for i, label in enumerate(labels, 1):
            at = told.text.index(f"{word} {i}: ", at) + len(f"{word} {i}:")
            starts.append((at, at + 1 + len(label)))
        targets, marks = [], []
        for token, begin, end in zip(ids, begins, ends, strict=True):
            is_target = any(a <= begin and end <= b and end > begin for a, b in told.spans)
            targets.append(token if is_target else -100)
            marks.append(next((i for i, (a, b) in enumerate(starts, 1) if a <= begin and end <= b and end > begin), 0))
        return ids, targets, [mark if target >= 0 else 0 for mark, target in zip(marks, targets, strict=True)]

    def batch(self, data: Marked, rows: np.ndarray, most: int) -> Any:
        """(marks, ids, labels, mark of every label) of one to `most` marks a picture."""
        rng, pictures = data.rng, data.pictures
        coords = np.zeros((len(rows), NUM_SLOTS, 4), np.float32)
        used, is_point = np.zeros((2, len(rows), NUM_SLOTS), bool)
        written = []
        for n, row in enumerate(rows):
            things = rng.permutation(data.counts[row])[: rng.integers(1, most + 1)]
            is_point[n], used[n, : len(things)] = rng.random() < 1 / 3, True
            coords[n, : len(things)] = data.coords(pictures.boxes[row, things], is_point[n, : len(things)])
            labels = [
                "".join(STRING_LETTERS[c] for c in pictures.letters[row, k])
                if pictures.names[row, k] == TEXT
                else self.vocabulary[pictures.names[row, k]]
                for k in things
            ]
            task = "ocr" if DOMAINS[pictures.domains[row]] == "document" else "label"
            written.append(self.write(task, bool(is_point[n, 0]), labels))
        width = max(len(ids) for ids, _, _ in written)
        filled = [np.full((len(rows), width), empty, np.int64) for empty in (0, -100, 0)]
        for n, lists in enumerate(written):
            for array, values in zip(filled, lists, strict=True):
                array[n, : len(values)] = values
        return Marks(coords, is_point, used), *(torch.from_numpy(array) for array in filled)


@torch.no_grad()
def begin_answers(fitter: Fitter, asked: Asked, writer: Writer) -> None:
    """The second block as a copy of what it looks at, and the head's rows from the slots' classifiers."""
    decoder, block = fitter.model.decoder, fitter.inner.layers[1]
    attn, mlp = block.self_attn, block.mlp
    identity = torch.eye(decoder.dim)
    attn.v_proj.weight.normal_(0, 0.01).add_(identity)
    attn.o_proj.weight.normal_(0, 0.01).add_(identity)
    head: Any = decoder.lm_head
    head.weight.normal_(0, 0.02)
    for row, name in enumerate(writer.vocabulary):
        head.weight[writer.ids_after(name)[0]] = asked.names.weight[row] / 2
    directions = F.normalize(torch.randn(len(STRING_LETTERS), decoder.dim), dim=-1)
    for place, letter in enumerate(STRING_LETTERS):
        head.weight[writer.ids_after(letter)[-1]] = 2 * directions[place]
    number = LENGTH * len(STRING_LETTERS)
    mlp.up_proj.weight[:number] = asked.letters.weight / 2
    mlp.down_proj.weight[:, :number] = directions.repeat(LENGTH, 1).T / 2


def fit_answers(
    fitter: Fitter, asked: Asked, writer: Writer, data: Marked, heldout: Marked, *, steps: int, lr: float
) -> None:
    """Part 2 of the fit."""
    begin_answers(fitter, asked, writer)
    learned = [p for p in fitter.model.parameters() if p.requires_grad]
    for step, began in schedule(learned, lr, steps):
        rows = data.rng.integers(0, len(data.counts), BATCH)
        scores, targets, look, early, spelled = answer_losses(fitter, writer, data, rows, most=5)
        language = F.cross_entropy(scores, targets)
        fade = max(0.0, 1 - step / (0.8 * steps))
        (language + 0.5 * look + fade * (early + spelled)).backward()
        if (step + 1) % 50 == 0:
            told = score_answers(fitter, writer, heldout) if (step + 1) % 200 == 0 or step + 1 == steps else ""
            log.info("answers step %d loss %.3f look %.3f early %.3f letter %.3f %.0f s %s", step + 1, language.item(),
                     look.item(), early.item(), spelled.item(), time.monotonic() - began, told)  # fmt: skip


def answer_losses(fitter: Fitter, writer: Writer, data: Marked, rows: np.ndarray, most: int) -> Any:
    """(scores of labelled positions, their targets, three losses).

    The losses: where the second block looks; what its output would answer already; how its feed-forward part spells.
    """
    slots, ids, labels, marks = writer.batch(data, rows, most)
    decoder = fitter.model.decoder
    embeds = torch.cat([fitter.embeds(data, rows, slots), decoder.embed(ids)], dim=1)
    out, second, read, third = fitter.hidden(embeds)
    asking, learned = slice(fitter.text - 1, embeds.shape[1] - 1), labels >= 0
    logits, _ = fitter.attention(fitter.inner.layers[1], second, asking)
    logits = logits.transpose(1, 2)[marks > 0].log_softmax(-1)
    aim = (fitter.first - 1 + marks[marks > 0])[:, None].expand(-1, fitter.heads)
    look = F.nll_loss(logits.flatten(0, 1), aim.flatten())
    early = F.cross_entropy(decoder.head(fitter.inner.norm(third[:, asking][learned])), labels[learned])
    spelled = spelling_loss(fitter.inner.layers[1].mlp, read[:, asking][learned], *spelling(labels, marks, writer))
    return decoder.head(out[:, asking][learned]), labels[learned], look, early, spelled


def spelling(labels: Tensor, marks: Tensor, writer: Writer) -> tuple[Tensor, Tensor]:
    """Of every label: which letter of a string it is, from 1 (0: none), [K]; that string's letters, [K, LENGTH]."""
    letter_of = torch.full((writer.tokenizer.vocab_size,), -100)
    letter_of[[writer.ids_after(letter)[-1] for letter in STRING_LETTERS]] = torch.arange(len(STRING_LETTERS))
    letters = torch.where(marks > 0, letter_of[labels.clamp(min=0)], -100)
    steps = torch.zeros_like(labels)
    for column in range(1, labels.shape[1]):
        steps[:, column] = (steps[:, column - 1] + 1) * (letters[:, column] >= 0)
    strings = torch.full((*labels.shape, LENGTH), -100)
    for row, column in (steps == 1).nonzero().tolist():
        strings[row, column : column + LENGTH] = letters[row, column : column + LENGTH]
    learned = labels >= 0
    return steps[learned].clamp(max=LENGTH), strings[learned]


def spelling_loss(mlp: Any, read: Tensor, steps: Tensor, strings: Tensor) -> Tensor:
    """The gates of the letters' units say which letter comes next, their inputs which letters there are."""
    number = LENGTH * len(STRING_LETTERS)
    gates = (read @ mlp.gate_proj.weight[:number].T).unflatten(-1, (LENGTH, -1)).mean(-1)
    gate_loss = F.cross_entropy(torch.cat([torch.zeros_like(gates[:, :1]), gates], dim=-1), steps)
    if not (steps > 0).any():
        return gate_loss
    said = (read @ mlp.up_proj.weight[:number].T).unflatten(-1, (LENGTH, -1))
    return gate_loss + F.cross_entropy(said[steps > 0].flatten(0, 1), strings[steps > 0].flatten())


@torch.no_grad()
def score_answers(fitter: Fitter, writer: Writer, data: Marked, number: int = 400) -> str:
    """Share of pictures whose whole answer, one to four marks, is most probable token by token, by domain."""
    rows = np.arange(number)
    found = []
    for part in np.array_split(rows, 8):
        state = data.rng.bit_generator.state
        *_, labels, _ = writer.batch(data, part, 4)
        data.rng.bit_generator.state = state
        scores, targets, *_ = answer_losses(fitter, writer, data, part, most=4)
        wrong = torch.zeros(labels.shape, dtype=torch.bool)
        wrong[labels >= 0] = scores.argmax(-1) != targets
        found.append(~wrong.any(1))
    right = torch.cat(found).numpy()
    domains = data.pictures.domains[rows]
    return " ".join(f"{name} {right[domains == i].mean():.3f}" for i, name in enumerate(DOMAINS))
