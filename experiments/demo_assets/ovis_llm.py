"""Makes the language model of Ovis' demo from texts alone: its tokenizer, then a small Qwen2, 25 minutes on one core.

python -m experiments.demo_assets.ovis_llm

The model sees no picture. Beside the next token two probes, thrown away afterwards, ask what it otherwise learns much
later: the first block, which cell a word of a map stands in; the second, where in the picture the thing so named lies.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from bestiary.schema import IGNORE
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.ovis.model import decoder_config

from .model import demo_run
from .ovis_text import FORMS, GRID, LABELS, PLACES, Piece, map_places, text

log = logging.getLogger("demo_assets")
ASSETS = Path("src/bestiary/variants/ovis/assets")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NAME_WEIGHT = 40
"""How often every name is added to the texts of the tokenizer, so that each becomes one piece."""
PROBES = (GRID**2, len(PLACES))
"""Classes of the probe after the first block, and of that after the second."""


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of the texts with Qwen's control tokens, as a Hugging Face folder."""
    rng = Random("ovis-demo-tokenizer")
    forms = rng.choices(list(FORMS), list(FORMS.values()), k=3000)
    lines = ["".join(words for words, _ in text(rng, form)[0]) for form in forms]
    for special in SPECIAL:
        lines = [line.replace(special, "\n") for line in lines]
    lines += [f" {label}" for label, _ in LABELS] * NAME_WEIGHT
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(special, special=True) for special in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=SPECIAL[2], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    made = load_tokenizer(folder)
    if split := [label for label, _ in LABELS if len(made.encode(f" {label}")) > 1]:
        log.info("names of several pieces: %s", ", ".join(split))


def encode(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Ids and labels of a text, its pieces tokenised one by one."""
    ids: list[int] = []
    labels: list[int] = []
    for words, is_learned in pieces:
        piece = tokenizer.encode(words)
        ids += piece
        labels += piece if is_learned else [IGNORE] * len(piece)
    return ids, labels


def batch(tokenizer: Any, rng: Random, tokens: int) -> tuple[Tensor, ...]:
    """ids, labels, cells, places, each int64[B, T], padded right; the last two are of words of a map alone.

    Texts of one form, so that little is padding, about `tokens` in all.
    """
    opening = tokenizer.encode("(")
    [form] = rng.choices(list(FORMS), list(FORMS.values()))
    found: list[tuple[list[int], ...]] = []
    while sum(len(row[0]) for row in found) < tokens:
        pieces, scene = text(rng, form)
        ids, labels = encode(tokenizer, pieces)
        cells, places = [IGNORE] * len(ids), [IGNORE] * len(ids)
        if scene is not None:
            start = ids.index(opening[-1]) + 1
            cells[start : start + GRID**2] = range(GRID**2)
            places[start : start + GRID**2] = [IGNORE if place is None else place for place in map_places(scene)]
        found.append((ids, labels, cells, places))
    longest = max(len(row[0]) for row in found)
    fills = (0, IGNORE, IGNORE, IGNORE)
    return tuple(
        torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in found])
        for part, fill in enumerate(fills)
    )


def fit(model: Qwen2ForCausalLM, tokenizer: Any, *, seconds: float, tokens: int, lr: float, seed: int) -> None:
    """AdamW until the time is up, the learning rate falling over it."""
    probes = nn.ModuleList(nn.Linear(model.config.hidden_size, classes) for classes in PROBES)
    optimizer = torch.optim.AdamW([*model.parameters(), *probes.parameters()], lr=lr, betas=(0.9, 0.98), weight_decay=0)
    rng, start, step = Random(f"ovis-demo-text/{seed}"), time.monotonic(), 0
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
        ids, labels, *asked = batch(tokenizer, rng, tokens)
        out = model(input_ids=ids, output_hidden_states=True)
        loss = _entropy(out.logits[:, :-1], labels[:, 1:])
        probed = [
            _entropy(probe(hidden), wanted)
            for probe, hidden, wanted in zip(probes, out.hidden_states[1:3], asked, strict=True)
        ]
        (loss + 0.3 * torch.stack(probed).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            told = ", ".join(f"{value.item():.3f}" for value in (loss, *probed))
            log.info("%4.0f s, step %d: loss, probes %s", share * seconds, step, told)


def _entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)


def main() -> None:
    """Tokenizer and weights into the folder of assets."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--tokens", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, help="weights to go on from, of the tokenizer in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    node = demo_run("experiment=ovis_s1").model.build["decoder"]
    sizes = {name: value for name, value in node.items() if name != "_args_of_"}
    if args.begin is None:
        make_tokenizer(args.out / "tokenizer", sizes["vocab_size"])
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM(decoder_config(**sizes))
    if args.begin:
        model.load_state_dict({name.removeprefix("decoder."): t.float() for name, t in load_file(args.begin).items()})
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    fit(
        model,
        load_tokenizer(args.out / "tokenizer"),
        seconds=args.seconds,
        tokens=args.tokens,
        lr=args.lr,
        seed=args.seed,
    )
    state = {f"decoder.{name}": tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    save_file(state, args.out / "llm.safetensors")


if __name__ == "__main__":
    main()
