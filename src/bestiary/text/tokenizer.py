"""Tokenizers: text to ids and back, and which characters every id covers.

A label mask is decided on characters ("this answer and its end signal"), a model learns ids; `encode_spans` joins the
two in one pass, so no text is tokenised twice. The segment functions answer another question: how would this text be
tokenised inside a longer one, after a space (`encode_segment`) or right after other characters
(`encode_wo_prefix_space`)? Stop sequences need both (LLaMA2-Accessory accessory/model/tokenizer.py @ 3777c43).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PREFIXES = ("@", "\n", "\\", "=", ">", "`")
"""Characters that rarely merge with what follows them, in the reference's order of trial (accessory tokenizer.py)."""


class SentencePieceTokenizer:
    """A sentencepiece model with LLaMA's conventions; picklable, loaded once."""

    pad_id = 0
    """LLaMA's vocabulary has no padding piece; the reference pads with `<unk>`."""

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"tokenizer {self.path}: no such file; give the path of a sentencepiece .model")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {self.path}: not a sentencepiece model ({error})") from error
        self.need_space_before_segment = self._probe_segment_space()

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._model.vocab_size())

    @property
    def bos_id(self) -> int:
        """The id that opens every sequence."""
        return int(self._model.bos_id())

    @property
    def eos_id(self) -> int:
        """The id that closes every training sequence."""
        return int(self._model.eos_id())

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the sequence's ends where asked."""
        ids: list[int] = self._model.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of `text` with the characters they cover, in one tokenisation.

        Returns (ids, begins, ends): token k covers `text[begins[k]:ends[k]]`. Both lists never decrease. Of a character
        written as several byte pieces the last piece carries the span, the others are empty spans at its begin.
        """
        found = self._model.encode(text, return_type="offset_mapping")
        begins = [begin for begin, _ in found["offsets"]]
        ends = [end for _, end in found["offsets"]]
        return list(found["ids"]), begins, ends

    def encode_segment(self, text: str) -> list[int]:
        """Ids that `text` has inside a longer text, after a space (leading spaces of its own are dropped)."""
        text = text.lstrip(" ")
        return self.encode(" " + text if self.need_space_before_segment else text)

    def encode_wo_prefix_space(self, text: str) -> list[int]:
        """Ids that `text` has right after other characters, without the space piece the tokenizer puts in front."""
        if self.need_space_before_segment:
            return self.encode(text)
        for prefix in _PREFIXES:
            head, whole = self.encode(prefix), self.encode(prefix + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        raise ValueError(f"tokenizer {self.path}: {text!r} merges with every one of {_PREFIXES}; cannot cut it free")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids (BOS, EOS) vanish, incomplete byte pieces become U+FFFD."""
        worst = max(ids, default=0)
        if worst >= self.vocab_size or min(ids, default=0) < 0:
            raise ValueError(
                f"token ids {min(ids)}..{worst} but tokenizer {self.path} has {self.vocab_size} pieces; "
                "is it the tokenizer of these weights?"
            )
        return str(self._model.decode([int(i) for i in ids]))

    def _probe_segment_space(self) -> bool:
        """Whether a segment needs its space spelled out (InternLM's way) or gets one by itself (LLaMA's)."""
        whole, segment = self.encode("Hi my darling"), self.encode("my darling")
        return whole[-len(segment) :] != segment


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer:
    """The tokenizer stored at `path`: a sentencepiece model file."""
    if Path(path).is_dir():
        raise ValueError(f"tokenizer {path} is a folder; give the sentencepiece .model file in it")
    return SentencePieceTokenizer(path)
