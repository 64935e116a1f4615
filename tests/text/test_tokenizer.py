from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.text.tokenizer import SentencePieceTokenizer, load_tokenizer

MODEL = Path(__file__).parents[1] / "goldens" / "sphinx" / "tiny_tokenizer.model"
TOKENIZER = SentencePieceTokenizer(MODEL)


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=40))
def test_spans_tile_the_text_and_their_ids_are_those_of_encode(text: str) -> None:
    ids, begins, ends = TOKENIZER.encode_spans(text)
    assert ids == TOKENIZER.encode(text)
    assert begins == sorted(begins) and ends == sorted(ends)
    covered = [k for begin, end in zip(begins, ends, strict=True) for k in range(begin, end)]
    assert covered == list(range(len(text)))


def test_bytes_of_one_character_share_its_place() -> None:
    _, begins, ends = TOKENIZER.encode_spans("a🙂b")
    assert begins[-5:] == [1, 1, 1, 1, 2]
    assert ends[-5:] == [1, 1, 1, 2, 3]


def test_ends_are_added_only_when_asked() -> None:
    ids = TOKENIZER.encode("dog")
    assert TOKENIZER.encode("dog", bos=True, eos=True) == [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id]
    assert TOKENIZER.encode("") == []


def test_a_text_comes_back_without_control_ids() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a dog é", bos=True, eos=True)) == "a dog é"
    assert TOKENIZER.decode([]) == ""


def test_a_pickled_tokenizer_needs_no_file(tmp_path: Path) -> None:
    copy = tmp_path / "t.model"
    copy.write_bytes(MODEL.read_bytes())
    packed = pickle.dumps(load_tokenizer(copy))
    copy.unlink()
    loaded = pickle.loads(packed)
    assert loaded.encode("a dog") == TOKENIZER.encode("a dog")
    assert loaded.sha256 == TOKENIZER.sha256


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=f"has {TOKENIZER.vocab_size} pieces; is it the tokenizer of these weights"):
        TOKENIZER.decode([5, TOKENIZER.vocab_size])


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.model: no such file"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    with pytest.raises(ValueError, match="is a folder"):
        load_tokenizer(tmp_path)
