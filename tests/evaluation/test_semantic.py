from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bestiary.evaluation import semantic
from bestiary.evaluation.scorers import Pair
from bestiary.evaluation.semantic import SentenceEncoder, load_sentence_encoder


class Letters(torch.nn.Module):
    """Embeds a letter as its own axis, so that cosines can be worked out by hand."""

    config = SimpleNamespace(hidden_size=8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 8).float())


def letters(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
    width = max(len(text) for text in texts) + 1
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor([ord(letter) - ord("a") + 1 for letter in text])
        mask[i, : max(1, len(text))] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_and_batching_do_not_change_a_vector() -> None:
    texts = ["ab", "a", "abcabc", "ab", ""]
    whole = SentenceEncoder(Letters(), letters).encode(texts)
    alone = np.concatenate([SentenceEncoder(Letters(), letters).encode([text]) for text in texts])
    pieces = SentenceEncoder(Letters(), letters, batch_size=2).encode(texts)
    np.testing.assert_allclose(whole, alone, atol=1e-7)
    np.testing.assert_allclose(whole, pieces, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_similarity_is_the_cosine_and_zero_for_a_missing_prediction() -> None:
    pairs = [Pair(1, "ab", "a"), Pair(2, None, "a"), Pair(3, "c", "c")]
    np.testing.assert_allclose(SentenceEncoder(Letters(), letters).similarity(pairs), [2**-0.5, 0, 1], atol=1e-6)
    assert SentenceEncoder(Letters(), letters).similarity([]).shape == (0,)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="extra `eval`"):
        load_sentence_encoder()
