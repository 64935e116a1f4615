"""Tokenizers: text to ids and back, and which characters every id covers.

A label mask is decided on characters ("this answer and its end signal"), a model learns ids; `encode_spans` joins the
two in one pass, so no text is tokenised twice. The segment functions answer another question: how would this text be
tokenised inside a longer one, after a space (`encode_segment`) or right after other characters
(`encode_wo_prefix_space`)? Stop sequences need both (LLaMA2-Accessory accessory/model/tokenizer.py @ 3777c43).

Three kinds stand behind one interface: sentencepiece models, folders in Hugging Face's layout, and Qwen's tiktoken file
(`qwen_tokenizer.py`). None ever leaves the disk or runs code that lies beside its files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PREFIXES = ("@", "\n", "\\", "=", ">", "`")
"""Characters that rarely merge with what follows them, in the reference's order of trial (accessory tokenizer.py)."""
_FOLDER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""What says how a Hugging Face folder tokenises; the rest of it names templates and special pieces."""
_JSON = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer(ABC):
    """Text to ids and back; picklable, loaded once.

    path: where it was read. sha256: of its content, what weights depend on.
    """

    path: Path
    sha256: str
    need_space_before_segment: bool
    pad_id = 0
    """LLaMA's vocabulary has no padding piece; the reference pads with `<unk>`, whatever the tokenizer."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of pieces."""

    @property
    @abstractmethod
    def bos_id(self) -> int:
        """The id that opens every sequence."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id that closes every training sequence."""

    @abstractmethod
    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of `text` with the characters they cover, in one tokenisation.

        Returns (ids, begins, ends): token k covers `text[begins[k]:ends[k]]`. Both lists never decrease. Of a character
        written as several byte pieces the last piece carries the span, the others are empty spans at its begin.
        """

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Ids of `text` alone."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """Text of ids that are all in the vocabulary."""

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the sequence's ends where asked."""
        return [self.bos_id] * bos + self._ids(text) + [self.eos_id] * eos

    def control_id(self, token: str) -> int:
        """The id of a control token that a model's sequences are written with; ValueError where there is none."""
        ids = self.encode(token)
        if len(ids) != 1:
            raise ValueError(
                f"tokenizer {self.path} has no token {token}, which this model's sequences are written with; give the "
                "tokenizer of its decoder, or another conversation format"
            )
        return ids[0]

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
        return self._text([int(i) for i in ids])

    def _probe_segment_space(self) -> bool:
        """Whether a segment needs its space spelled out (InternLM's way) or gets one by itself (LLaMA's)."""
        whole, segment = self.encode("Hi my darling"), self.encode("my darling")
        return whole[-len(segment) :] != segment


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with LLaMA's conventions."""

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"tokenizer {self.path}: no such file; give a sentencepiece .model, or a folder with a tokenizer.json"
            )
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

    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """See `Tokenizer.encode_spans`."""
        found = self._model.encode(text, return_type="offset_mapping")
        begins = [begin for begin, _ in found["offsets"]]
        ends = [end for _, end in found["offsets"]]
        return list(found["ids"]), begins, ends

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def _text(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class FolderTokenizer(Tokenizer):
    """A tokenizer in Hugging Face's layout: a folder with tokenizer.json, or what transformers makes one from.

    As in the reference, the end of a sequence also opens it where the vocabulary has no piece of its own for that, and
    control pieces spelled out in a text become those pieces.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        loaded = _from_folder(self.path)
        self._size, self._bos, self._eos = len(loaded), loaded.bos_token_id, loaded.eos_token_id
        if self._eos is None:
            raise ValueError(f"tokenizer {self.path} names no eos_token; add it to tokenizer_config.json")
        if self._bos is None:
            self._bos = self._eos
        self._backend: Any = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.sha256 = self._digest()
        self.need_space_before_segment = self._probe_segment_space()

    @property
    def vocab_size(self) -> int:
        """Number of pieces, added ones included."""
        return self._size

    @property
    def bos_id(self) -> int:
        """The id that opens every sequence."""
        return int(self._bos)

    @property
    def eos_id(self) -> int:
        """The id that closes every training sequence."""
        return int(self._eos)

    def encode_spans(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """See `Tokenizer.encode_spans`."""
        found = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = list(found.ids), list(found.offsets)
        # Pieces of one character all claim it, and some tokenizers leave the spaces before a word to nobody.
        nexts = [begin for begin, _ in offsets[1:]]
        ends = [min(end, max(begin, follower)) for (begin, end), follower in zip(offsets, nexts, strict=False)]
        ends += [len(text)] if ids else []
        for k in range(1, len(ends)):
            ends[k] = max(ends[k], ends[k - 1])
        return ids, [0, *ends[:-1]] if ids else [], ends

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _text(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.vocab_size} {self._bos} {self._eos}".encode())
        for name in _FOLDER_FILES:
            if (self.path / name).is_file():
                digest.update((self.path / name).read_bytes())
        return digest.hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer stored at `path`: a sentencepiece model, a qwen.tiktoken, or a folder in Hugging Face's layout.

    A folder with nothing but a tokenizer.model beside the weights, as Meta publishes it, is that model; one with a
    qwen.tiktoken is Qwen's, whatever code beside it its tokenizer_config.json names.
    """
    folder = Path(path)
    if folder.suffix == ".tiktoken" or (folder / "qwen.tiktoken").is_file():
        from bestiary.text.qwen_tokenizer import QwenTokenizer

        return QwenTokenizer(path)
    if not folder.is_dir():
        return SentencePieceTokenizer(path)
    if any((folder / name).is_file() for name in _FOLDER_FILES):
        return FolderTokenizer(path)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    raise ValueError(
        f"tokenizer {folder} is a folder without {', '.join(_FOLDER_FILES)} or tokenizer.model; "
        "give the folder of a Hugging Face tokenizer, or a sentencepiece .model"
    )


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warning that config.json is of a model transformers does not know: only its tokenizer is read."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _from_folder(folder: Path) -> Any:
    """transformers' fast tokenizer of a folder: local files alone, and never the code that may lie beside them."""
    from transformers import AutoTokenizer

    try:
        found = {
            name: json.loads((folder / name).read_text(encoding="utf-8")) for name in _JSON if (folder / name).is_file()
        }
        if "auto_map" in found.get("tokenizer_config.json", {}):
            raise ValueError("its tokenizer_config.json asks for code of its own, auto_map, which is never run")
        with _unwarned():
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"tokenizer {folder} cannot be read ({reason}); fetch its files again, or name another"
        ) from error
    if not loaded.is_fast:
        raise ValueError(f"tokenizer {folder} has no fast form; save it once with a tokenizer.json")
    return loaded
