"""Trains the demo's sentencepiece model on the embedded conversations (a few seconds).

python -m experiments.demo_assets.tokenizer

As LLaMA's: byte-pair pieces with byte fallback, unk, bos, eos = 0, 1, 2, no normalisation, digits apart. Words that
every conversation repeats are whole pieces from the start, the chat's system sentence even one; names become one or two
pieces. Printed strings are left out of the training text, so that they are spelled letter by letter.
"""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import sentencepiece

from bestiary.text.chat import TEMPLATES
from data_modules.embedded.generate import DOMAINS, generate, scene

log = logging.getLogger("demo_assets")

SPACE = "\u2581"
WORDS = ("Human", "Assistant", "Please", "Mark", "Region", "What", "Where", "Which", "Is", "Yes", "No")
NAME_WEIGHT = 25
"""How often every name is added to the conversations, so that rare names become whole pieces too."""


def lines(per_domain: int) -> list[str]:
    """Conversations and names, line by line, without printed strings."""
    found, names = [], set()
    for domain in DOMAINS:
        for index in range(per_domain):
            sample = generate(domain, 123, index, "train")
            for turn in sample.turns:
                text = f" {'Human' if turn.role == 'human' else 'Assistant'}: {turn.text}\n###"
                found += [re.sub(r"\b[A-Z0-9]{3}\b", "", line) for line in text.split("\n")]
        if domain != "document":
            things = [thing for index in range(600) for thing in scene(domain, 124, index, "train").things]
            names |= {thing.label for thing in things}
    return [line for line in found if line.strip()] + [f" {name}" for name in sorted(names)] * NAME_WEIGHT


def main() -> None:
    """Write the model file and say how long a few texts become."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("src/bestiary/variants/sphinx_v/assets/tokenizer.model"))
    parser.add_argument("--vocab", type=int, default=768)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    system = TEMPLATES["current"].system
    sentence = SPACE + SPACE.join(["", *system.split("\n")[0].split(" ")]).lstrip(SPACE)
    with args.out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines(800)),
            model_writer=file,
            vocab_size=args.vocab,
            hard_vocab_limit=True,
            model_type="bpe",
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=1.0,
            required_chars="ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
            user_defined_symbols=[sentence, "###", *(SPACE + word for word in WORDS), "Mark", "Region"],
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(args.out))
    ask = " Human: Please {} of each marked {} in the image.\n### Assistant: {} 1: {}\n###"
    label, ocr = (
        ("identify the labels", "point", "Mark", "apple"),
        ("provide the ocr results", "region", "Region", "PKU"),
    )
    for text in ("", ask.format(*label), ask.format(*ocr)):
        ids = model.encode(system + text)
        log.info("%d ids: %s", len(ids), " ".join(model.id_to_piece(i) for i in ids[1:]))
        assert model.decode(ids) == system + text


if __name__ == "__main__":
    main()
