"""Makes the vocabulary of Monkey's demo in Qwen's file format from the embedded texts (a second).

python -m experiments.demo_assets.monkey_vocabulary

Every byte, then merges by how often they occur, inside words alone: the words of questions and what pictures have
printed on them become one token each.
"""

from __future__ import annotations

import argparse
import base64
import logging
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from bestiary.text.qwen_tokenizer import CONTROLS, FILE_NAME, QwenTokenizer
from bestiary.variants.monkey.processor import QUESTION as FORM
from data_modules.embedded.assets import WORDS
from data_modules.embedded.plain import plain_sample

log = logging.getLogger("demo_assets")
ASSETS = Path("src/bestiary/variants/monkey/assets")
_SAMPLES = 400
_WORD = re.compile(r" ?[A-Za-z]+")


def texts() -> list[str]:
    """What the demo's model reads and writes."""
    turns = [turn for number in range(_SAMPLES) for turn in plain_sample("monkey_texts", 0, number).turns]
    return [FORM.format(turn.text) if turn.role == "human" else turn.text for turn in turns]


def merges(lines: list[str]) -> list[bytes]:
    """Tokens beyond single bytes, in the order of their ranks, until every word is one."""
    words = Counter(word.encode() for line in lines for word in _WORD.findall(line))
    split = {word: [bytes([byte]) for byte in word] for word in words}
    found: list[bytes] = []
    while True:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            return found
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best[0] + best[1])
        split = {word: _merged(pieces, best) for word, pieces in split.items()}


def _merged(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    done: list[bytes] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return done


def main() -> None:
    """Write the file and say how long it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([byte]) for byte in range(256)] + merges(texts())
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (args.out / FILE_NAME).write_text(lines, encoding="ascii")
    made = QwenTokenizer(args.out)
    assert all(len(made.encode(word)) == 1 for word in WORDS)
    log.info("%d ranks and %d control tokens", made.num_ranks, len(CONTROLS))


if __name__ == "__main__":
    main()
