"""Qwen's byte-level vocabulary in tiktoken's file format (`qwen.tiktoken`), with the control tokens Qwen-VL adds.

The file lists byte strings with their ranks; the control tokens are not in it: their ids follow the last rank in a
fixed order. Source: reference/monkey.md, section 1.6, and the goldens' list of ids.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import unicodedata
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bestiary.text.tokenizer import Tokenizer

FILE_NAME = "qwen.tiktoken"
_NUM_EXTRAS = 205
CONTROLS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(_NUM_EXTRAS)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *("<img>", "</img>", "<imgpad>"),
)
"""In the order of their ids, from the number of ranks on."""
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text falls into words that no token crosses (Qwen's published tokenizer)."""


class QwenTokenizer(Tokenizer):
    """A qwen.tiktoken file. Control tokens spelled out in a text become those tokens; text is brought to NFC first.

    A sequence is closed by <|endoftext|>, which is also what stands for a beginning; Qwen has no other.
    """

    pad_id: int
    need_space_before_segment = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / FILE_NAME
        if not self.path.is_file():
            raise ValueError(f"tokenizer {self.path}: no such file; give a {FILE_NAME}, or a folder that holds it")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._encoding, self.controls = _load(content)
        except ValueError as error:
            raise ValueError(f"tokenizer {self.path}: {error}; fetch the file again") from error
        self.num_ranks = self.controls[CONTROLS[0]]
        self.pad_id = self.eos_id

    def __reduce__(self) -> tuple[type[QwenTokenizer], tuple[Path]]:
        return QwenTokenizer, (self.path,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return self.num_ranks + len(CONTROLS)

    @property
    def bos_id(self) -> int:
        """The id that may open a sequence: the same as its end."""
        return self.controls["<|endoftext|>"]

    @property
    def eos_id(self) -> int:
        """The id that closes every training sequence."""
        return self.controls["<|endoftext|>"]

    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """See `Tokenizer.encode_spans`; the characters are those of the text in NFC."""
        ids = self._ids(text)
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in ids]
        starts = _characters_at_bytes(unicodedata.normalize("NFC", text))
        cuts = [starts[end] for end in accumulate(lengths, initial=0)]
        spans = list(pairwise(cuts))
        return ids, [begin for begin, _ in spans], [end for _, end in spans]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        return ids

    def _text(self, ids: list[int]) -> str:
        return str(self._encoding.decode([i for i in ids if i < self.num_ranks], errors="replace"))


@lru_cache(maxsize=1)
def _load(content: bytes) -> tuple[Any, dict[str, int]]:
    """The vocabulary of a file's content and the ids of its control tokens; the last one is kept, it takes a second."""
    import tiktoken

    ranks = _ranks(content)
    first = max(ranks.values()) + 1
    controls = {token: first + place for place, token in enumerate(CONTROLS)}
    return tiktoken.Encoding("qwen", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=controls), controls


def _ranks(content: bytes) -> dict[bytes, int]:
    """The byte strings of a file with their ranks."""
    try:
        pairs = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"this is no tiktoken file, whose lines are base64 and a rank ({error})") from error
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(ranks)} tokens, but none for byte {lacking[0]}, the file is not whole")
    return ranks


def _characters_at_bytes(text: str) -> list[int]:
    """For every byte offset of the text in UTF-8, its end included, how many characters are complete before it."""
    starts = []
    for place, character in enumerate(text):
        starts += [place] * len(character.encode())
    return [*starts, len(text)]
