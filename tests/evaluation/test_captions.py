from __future__ import annotations

import pytest

from bestiary.evaluation import captions
from bestiary.evaluation.captions import caption_scores, tokenise


def test_missing_and_empty_captions_score_zero_and_stay_in_place() -> None:
    references = {"a": ["a red cat"], "b": ["the dog"], "c": ["one bird", "a bird"]}
    scores = caption_scores(references, {"a": "A red cat.", "b": "  ", "x": "extra"}, metrics=("CIDEr", "ROUGE_L"))
    assert scores.predictions == {"a": ["a red cat"], "b": [""], "c": [""]}
    assert scores.references["c"] == ["one bird", "a bird"]
    assert scores.per_key["a"]["ROUGE_L"] == pytest.approx(1.0)
    assert scores.per_key["b"] == scores.per_key["c"] == {"CIDEr": 0.0, "ROUGE_L": 0.0}
    assert scores.overall["CIDEr"] == pytest.approx(scores.per_key["a"]["CIDEr"] / 3)


def test_no_text_needs_no_tokens() -> None:
    assert tokenise({"a": [""], "b": []}) == {"a": [""], "b": []}


def test_bad_input_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no reference captions"):
        caption_scores({}, {})
    with pytest.raises(ValueError, match="'b' has no reference"):
        caption_scores({"a": ["x"], "b": [" "]}, {})
    with pytest.raises(ValueError, match="unknown caption metric 'SPICE'"):
        caption_scores({"a": ["x"]}, {"a": "x"}, metrics=("SPICE",))
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="Java"):
        caption_scores({"a": ["x"]}, {})
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="extra `eval`"):
        caption_scores({"a": ["x"]}, {})
