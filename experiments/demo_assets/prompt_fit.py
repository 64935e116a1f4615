"""Makes the weights from which stage 1 starts: an initialisation of the prompt path and of the decoder.

python -m experiments.demo_assets.prompt_fit          # about 8 minutes on two cores, after encoders.py

The original starts from Segment Anything's prompt encoder and a language model that can already copy; small random
weights trained on answers alone stay blind to prompts. This step gives the demo what those parts give the original, on
cached features of the frozen encoders and without any change of the architecture:

1. Slots. Ten marks on a picture; every slot is asked, after the decoder's first block, what lies under it and which
   number it has. The first block's attention is told where to look: one head at the mark's cell among the quarters, one
   at the four cells around its middle, one at its cell in the whole view.
2. Answers. Conversations with one to five marks; the second block starts as a copy (values and outputs the identity,
   the head's rows those of the slots' classifier) and its attention is told to look at the slot of the mark that the
   answer is about. Then the language loss does the rest.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bestiary.language.attention import PackedLayout
from bestiary.mllm import MultimodalLM
from bestiary.schema import RegionKind, RegionRows, Turn
from bestiary.text.chat import TEMPLATES, render
from bestiary.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from bestiary.variants.sphinx.model import Features
from data_modules.embedded.generate import DOMAINS
from data_modules.embedded.scene import STRING_LETTERS
from data_modules.embedded.tasks import INSTRUCTIONS

from .encoders import NUM_PICTURES, SEED, WORK
from .model import demo_model, demo_run
from .pictures import LENGTH, TEXT, Pictures, cached

log = logging.getLogger("demo_assets")
ASSETS = Path("src/bestiary/variants/sphinx_v/assets")
NUM_SLOTS = 10


class Asked(nn.Module):
    """What a slot is asked; only the name and letter heads live on, as rows of the decoder's head."""

    def __init__(self, dim: int, num_names: int) -> None:
        super().__init__()
        self.names = nn.Linear(dim, num_names)
        self.letters = nn.Linear(dim, LENGTH * len(STRING_LETTERS))
        self.number = nn.Linear(dim, NUM_SLOTS)


class Marked:
    """Pictures with cached features, from which marks are drawn."""

    def __init__(self, pictures: Pictures, features: Features, seed: int) -> None:
        self.pictures, self.features = pictures, features
        self.counts, self.rng = pictures.counts, np.random.default_rng(seed)

    def coords(self, boxes: np.ndarray, is_point: np.ndarray) -> np.ndarray:
        """Region rows of things' boxes: a point in the middle half, or the box shaken a little."""
        size = boxes[..., 2:] - boxes[..., :2]
        point = boxes[..., :2] + size * self.rng.uniform(0.25, 0.75, size.shape)
        shaken = boxes + np.concatenate([size, size], -1) * self.rng.uniform(-0.12, 0.12, boxes.shape)
        point = np.concatenate([point, np.zeros_like(point)], -1)
        return np.where(is_point[..., None], point, shaken).astype(np.float32)

    def dense(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(thing of every slot [N, 10], coords, is point, is used): one to ten marks, things may repeat."""
        shape = (len(rows), NUM_SLOTS)
        things = (self.rng.random(shape) * self.counts[rows][:, None]).astype(int)
        used = np.arange(NUM_SLOTS) < self.rng.integers(1, NUM_SLOTS + 1, (len(rows), 1))
        is_point = np.broadcast_to(self.rng.random((len(rows), 1)) < 1 / 3, shape)
        return things, self.coords(self.pictures.boxes[rows[:, None], things], is_point) * used[..., None], is_point, used


class Fitter:
    """The model taken apart as far as the fit needs it."""

    def __init__(self, model: MultimodalLM) -> None:
        self.model = model
        self.vision: Any = model.vision
        self.inner: Any = model.decoder.model
        self.heads = int(self.inner.config.num_attention_heads)
        self.rows = int(self.vision.image_rows)
        self.first = 1 + self.rows + 1
        self.text = self.first + NUM_SLOTS + 1

    def embeds(self, data: Marked, rows: np.ndarray, coords: np.ndarray, is_point: np.ndarray, used: np.ndarray) -> Tensor:
        """float[N, text, D]: BOS, image rows, prompt rows."""
        chosen = torch.from_numpy(rows)
        features = Features(data.features.queries[chosen].float(), data.features.tokens[chosen].float())
        kinds = np.where(is_point, int(RegionKind.POINT), int(RegionKind.BOX)).reshape(-1)
        counts = torch.full((len(rows),), NUM_SLOTS)
        parts = (torch.from_numpy(x) for x in (coords.reshape(-1, 4), kinds, used.reshape(-1)))
        prompts = self.model.regions(RegionRows(*parts, counts))  # type: ignore[misc]
        begin = self.model.decoder.embed(torch.ones(len(rows), 1, dtype=torch.long))
        return torch.cat([begin, self.vision.project(features), prompts.reshape(len(rows), NUM_SLOTS + 2, -1)], dim=1)

    def attention(self, block: Any, hidden: Tensor, queries: slice) -> tuple[Tensor, Tensor]:
        """(causal attention logits [N, H, Q, T], values [N, H, T, d]) of a block for some positions."""
        length = hidden.shape[1]
        normed = block.input_layernorm(hidden)
        cos, sin = (t[:, None] for t in self.inner.rotary_emb(hidden, torch.arange(length)[None]))

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-b, a], dim=-1) * sin

        attn = block.self_attn
        keys = turned(heads(attn.k_proj(normed)), cos, sin)
        asked = turned(heads(attn.q_proj(normed[:, queries])), cos[:, :, queries], sin[:, :, queries])
        logits = asked @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        later = torch.arange(length) > torch.arange(length)[queries, None]
        return logits.masked_fill(later, -1e4), heads(attn.v_proj(normed))

    def slots_after_first_block(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(attention logits of the slots, slots after block 0)."""
        block, queries = self.inner.layers[0], slice(self.first, self.first + NUM_SLOTS)
        logits, values = self.attention(block, embeds, queries)
        mixed = (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)
        slots = embeds[:, queries] + block.self_attn.o_proj(mixed)
        return logits, slots + block.mlp(block.post_attention_layernorm(slots))

    def places(self, points: np.ndarray) -> list[Tensor]:
        """Where heads 0, 1, 2 should look, each float[N, 10, text]: cell, cells around, cell of the whole view."""
        grid = math.isqrt(self.vision.clip.num_tokens - 1)
        per_view, skip = self.vision.rows_per_view, 1 + 1 + self.vision.qformer.num_tokens + 1

        def put(out: np.ndarray, view: np.ndarray, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
            at = (skip + per_view * view + y * grid + x)[..., None]
            np.put_along_axis(out, at, np.take_along_axis(out, at, -1) + weight[..., None], -1)

        def quarter(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return 1 + 2 * (y // grid) + x // grid, x % grid, y % grid

        cell, around, whole = (np.zeros((*points.shape[:2], self.text), np.float32) for _ in range(3))
        one = np.ones(points.shape[:2], np.float32)
        x, y = np.moveaxis((points * 2 * grid).clip(0, 2 * grid - 1).astype(int), -1, 0)
        put(cell, *quarter(x, y), one)
        x, y = np.moveaxis((points * grid).clip(0, grid - 1).astype(int), -1, 0)
        put(whole, np.zeros_like(x), x, y, one)
        low = np.floor(points * 2 * grid - 0.5)
        share = points * 2 * grid - 0.5 - low
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x, y = np.moveaxis((low + (dx, dy)).clip(0, 2 * grid - 1).astype(int), -1, 0)
            weight = np.abs(1 - dx - share[..., 0]) * np.abs(1 - dy - share[..., 1])
            put(around, *quarter(x, y), weight)
        return [torch.from_numpy(place) for place in (cell, around, whole)]

    def hidden(self, embeds: Tensor) -> tuple[Tensor, ...]:
        """(decoder output, input of block 1, what its feed-forward part reads, its output), all [N, T, D]."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).reshape(embeds.shape))

        places = (self.inner.layers[1], self.inner.layers[1].mlp, self.inner.layers[2])
        hooks = [place.register_forward_pre_hook(keep, with_kwargs=True) for place in places]
        number, length = embeds.shape[:2]
        layout = PackedLayout.from_spans([(i, 0, length) for i in range(number)], (number, length), embeds.device)
        out = self.model.decoder(embeds, torch.arange(length).expand(number, length), layout=layout)
        for hook in hooks:
            hook.remove()
        return out, *kept


def answers_of(slots: Tensor, asked: Asked, things: np.ndarray, used: np.ndarray, data: Pictures, rows: np.ndarray) -> Any:
    """(name targets, letter targets, name scores, letter scores) of slots."""
    names, letters = data.names[rows[:, None], things], data.letters[rows[:, None], things]
    names_of = torch.from_numpy(np.where(used & (names >= 0), names, -100))
    letters_of = torch.from_numpy(np.where((used & (names == TEXT))[..., None], letters, -100))
    return names_of, letters_of, asked.names(slots), asked.letters(slots).unflatten(-1, (LENGTH, -1))


def fit_slots(fitter: Fitter, asked: Asked, data: Marked, heldout: Marked, steps: int, lr: float, batch: int = 48) -> None:
    """Part 1."""
    block, vision = fitter.inner.layers[0], fitter.vision
    with torch.no_grad():
        for weight in block.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.06)
    parts = [vision.visual_proj, vision.qformer_proj, fitter.model.regions, block, asked]
    learned = [p for part in parts for p in part.parameters() if p.requires_grad] + [vision.start, vision.end]
    for step, began in schedule(learned, lr, steps):
        rows = data.rng.integers(0, len(data.counts), batch)
        things, coords, is_point, used = data.dense(rows)
        logits, slots = fitter.slots_after_first_block(fitter.embeds(data, rows, coords, is_point, used))
        names, letters, name_scores, letter_scores = answers_of(slots, asked, things, used, data.pictures, rows)
        corners = coords[..., 2:] * ~is_point[..., None] + coords[..., :2] * is_point[..., None]
        places = fitter.places((coords[..., :2] + corners) / 2)
        unused, mask = F.one_hot(torch.tensor(0), fitter.text).float(), torch.from_numpy(used)[..., None]
        told = [torch.where(mask, place, unused) for place in places]
        look = sum(-(t * logits[:, h].log_softmax(-1)).sum(-1).mean() for h, t in enumerate(told)) / len(told)
        numbers = torch.arange(NUM_SLOTS).repeat(len(rows))
        loss = look + F.cross_entropy(name_scores.flatten(0, 1), names.flatten())
        loss = loss + F.cross_entropy(letter_scores.flatten(0, 2), letters.flatten())
        loss = loss + 0.1 * F.cross_entropy(asked.number(slots).flatten(0, 1), numbers)
        loss.backward()
        if (step + 1) % 200 == 0:
            told_now = score_slots(fitter, asked, heldout) if (step + 1) % 600 == 0 or step + 1 == steps else ""
            log.info("slots step %d loss %.3f %.0f s %s", step + 1, loss.item(), time.monotonic() - began, told_now)


def schedule(learned: list[nn.Parameter], lr: float, steps: int) -> Any:
    """Steps with AdamW, warm-up and cosine; the body leaves gradients behind."""
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        yield step, began
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()


@torch.no_grad()
def score_slots(fitter: Fitter, asked: Asked, data: Marked) -> str:
    """Share of slots that know their thing, by domain."""
    hits: list[list[Tensor]] = [[] for _ in DOMAINS]
    for rows in np.array_split(np.arange(len(data.counts)), max(1, len(data.counts) // 100)):
        things, coords, is_point, used = data.dense(rows)
        _, slots = fitter.slots_after_first_block(fitter.embeds(data, rows, coords, is_point, used))
        names, letters, name_scores, letter_scores = answers_of(slots, asked, things, used, data.pictures, rows)
        right = torch.where(names >= 0, name_scores.argmax(-1) == names, (letter_scores.argmax(-1) == letters).all(-1))
        for number, found in enumerate(hits):
            found.append(right[torch.from_numpy(used & (data.pictures.domains[rows] == number)[:, None])])
    return " ".join(f"{domain} {torch.cat(found).float().mean():.3f}" for domain, found in zip(DOMAINS, hits, strict=True))


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
        """(coords, is point, is used, ids, labels, marks) of one to `most` marks a picture."""
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
        return coords, is_point, used, *(torch.from_numpy(array) for array in filled)


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


def fit_answers(fitter: Fitter, asked: Asked, writer: Writer, data: Marked, heldout: Marked, steps: int, lr: float) -> None:
    """Part 2."""
    begin_answers(fitter, asked, writer)
    learned = [p for p in fitter.model.parameters() if p.requires_grad]
    for step, began in schedule(learned, lr, steps):
        rows = data.rng.integers(0, len(data.counts), 24)
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
    coords, is_point, used, ids, labels, marks = writer.batch(data, rows, most)
    decoder = fitter.model.decoder
    embeds = torch.cat([fitter.embeds(data, rows, coords, is_point, used), decoder.embed(ids)], dim=1)
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
    """Of every label: which letter of a string it is, from 1 (0: none), [K], and all letters of that string, [K, LENGTH]."""
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


@torch.no_grad()
def features_of(model: MultimodalLM, pictures: Pictures) -> Features:
    """Frozen encoders' output for all pictures, in half precision."""
    vision: Any = model.vision
    parts = [vision.encode(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in np.array_split(pictures.pixels, max(1, len(pictures.pixels) // 50))]  # noqa: E501
    return Features(torch.cat([p.queries.half() for p in parts]), torch.cat([p.tokens.half() for p in parts]))


def main() -> None:
    """Fit and write the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--encoders", type=Path, default=ASSETS / "encoders.safetensors")
    parser.add_argument("--out", type=Path, default=ASSETS / "base.safetensors")
    parser.add_argument("--slot-steps", type=int, default=2400)
    parser.add_argument("--answer-steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--keep-slots", action="store_true", help="begin with part 2, from the last part 1")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    run, model = demo_run(), demo_model()
    missing = model.load_state_dict({k: v.float() for k, v in load_file(args.encoders).items()}, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"{args.encoders} does not fit the model: it has {missing.unexpected_keys[:3]}")
    data, heldout = (
        Marked(pictures, features_of(model, pictures), seed=SEED + number)
        for number, pictures in enumerate(load_pictures(args.pictures, model))
    )
    fitter, asked = Fitter(model), Asked(model.decoder.dim, len(data.pictures.vocabulary))
    writer = Writer(load_tokenizer(run.model.processor["tokenizer"]), data.pictures.vocabulary)
    kept = WORK / "slots.pt"
    if args.keep_slots:
        found = torch.load(kept, weights_only=True)
        model.load_state_dict(found["model"])
        asked.load_state_dict(found["asked"])
    else:
        fit_slots(fitter, asked, data, heldout, args.slot_steps, 3e-3)
        torch.save({"model": model.state_dict(), "asked": asked.state_dict()}, kept)
    fit_answers(fitter, asked, writer, data, heldout, args.answer_steps, 2e-3)
    towers = tuple(f"vision.{name}." for name in ("clip", "convnext", "dinov2", "qformer"))
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith(towers)}
    save_file(state, args.out)
    log.info("%s: %d tensors, %.1f MB", args.out, len(state), args.out.stat().st_size / 1e6)


def load_pictures(number: int, model: MultimodalLM) -> tuple[Pictures, Pictures]:
    """Training pictures (the first `number` of the encoders') and held-out ones."""
    side: int = model.vision.canvas_px  # type: ignore[union-attr, assignment]
    made = cached(WORK, "pictures", NUM_PICTURES, seed=SEED, split="train", side=side)
    cut = Pictures(made.pixels[:number], made.boxes[:number], made.names[:number], made.letters[:number],
                   made.domains[:number], made.vocabulary)  # fmt: skip
    return cut, cached(WORK, "pictures", 800, seed=SEED, split="heldout", side=side)


if __name__ == "__main__":
    main()
