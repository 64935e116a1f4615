from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.schema import IGNORE, Turn
from bestiary.text import chat
from bestiary.text.tokenizer import FolderTokenizer, SentencePieceTokenizer, load_tokenizer

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
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a folder without tokenizer.json, .* or tokenizer.model"):
        load_tokenizer(tmp_path / "empty")


QWEN = Path(__file__).parents[1] / "goldens" / "ovis" / "tokenizers" / "qwen"
TEXTS = st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=40)


def _llama_like(folder: Path, **config: Any) -> Path:
    """A folder as transformers writes LLaMA's: a space in front, byte fallback, pieces with their space."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"adgormyn.:#", "my", "▁my"]
    merges = [("m", "y"), ("▁", "my")]
    bpe = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    says = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    return folder


@pytest.fixture(scope="module", params=["qwen", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    path = QWEN if request.param == "qwen" else _llama_like(tmp_path_factory.mktemp("hf") / "llama")
    found = load_tokenizer(path)
    assert isinstance(found, FolderTokenizer)
    return found


@given(text=TEXTS)
def test_spans_of_a_folder_tile_the_text_too(folder: FolderTokenizer, text: str) -> None:
    ids, begins, ends = folder.encode_spans(text)
    assert ids == folder.encode(text)
    assert begins == sorted(begins) and ends == sorted(ends)
    covered = [k for begin, end in zip(begins, ends, strict=True) for k in range(begin, end)]
    assert covered == (list(range(len(text))) if ids else [])
    emoji = folder.encode_spans("a🙂b")
    assert (emoji[1][-1], emoji[2][-2:]) == (2, [2, 3]) and all(end == 1 for end in emoji[2][-5:-2])


def test_a_folder_speaks_as_a_sentencepiece_model_does(folder: FolderTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(folder))
    text = "my dog ran. " * 30  # far longer than what the folder's own truncation would keep
    ids = copy.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (copy.bos_id, copy.eos_id) and copy.decode(ids).strip() == text.strip()
    assert ids[1:-1] == folder.encode(text) and copy.sha256 == folder.sha256
    with pytest.raises(ValueError, match=f"has {copy.vocab_size} pieces"):
        copy.decode([copy.vocab_size])
    segment, bare = folder.encode_segment("my dog"), folder.encode_wo_prefix_space(".dog")
    assert folder.encode("gray my dog")[-len(segment) :] == segment
    assert folder.encode("gray.dog")[-len(bare) :] == bare


def test_labels_of_a_folder_are_the_answers(folder: FolderTokenizer) -> None:
    turns = [Turn("human", "my dog?"), Turn("assistant", "a dog."), Turn("human", "and?"), Turn("assistant", "no 🙂")]
    ids, labels = chat.encode_rendered(folder, chat.render(chat.TEMPLATES["current"], turns))
    learned = [label for label in labels if label != IGNORE]
    assert [part.strip() for part in folder.decode(learned).split("\n###")] == ["a dog.", "no 🙂", ""]
    assert learned and (ids[0], ids[-1], labels[-1]) == (folder.bos_id, folder.eos_id, IGNORE)


def test_a_vocabulary_without_a_beginning_begins_with_its_end() -> None:
    qwen = load_tokenizer(QWEN)
    assert qwen.bos_id == qwen.eos_id == qwen.encode("<|im_end|>")[0]


def test_folders_are_read_from_the_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert load_tokenizer(_llama_like(tmp_path / "plain")).vocab_size == 3 + 256 + 1 + 12 + 2
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="asks for code of its own, auto_map, which is never run"):
        load_tokenizer(_llama_like(tmp_path / "code", auto_map={"AutoTokenizer": ["evil.Evil", None]}))


def test_wrong_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    broken = _llama_like(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"broken cannot be read \(.*\); fetch its files again, or") as error:
        load_tokenizer(broken)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="endless names no eos_token"):
        load_tokenizer(_llama_like(tmp_path / "endless", eos_token=None))


def test_a_folder_with_a_sentencepiece_model_alone_is_that_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == TOKENIZER.sha256
