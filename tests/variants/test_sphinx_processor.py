from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import IGNORE, Lengths, Region, Sample, SampleError, SampleTooLongError, Slot, Turn
from bestiary.variants.sphinx.processor import SphinxProcessor

PHOTO = Path(__file__).parents[2] / "data_modules" / "embedded" / "assets" / "photo-china.jpg"
MODEL = str(Path(__file__).parents[1] / "goldens" / "sphinx" / "tiny_tokenizer.model")


def _png(width: int = 9, height: int = 5) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(file, "PNG")
    return file.getvalue()


SAMPLE = Sample(
    "a/1", "src", "natural", (Turn("human", "<image>\nWhat?"), Turn("assistant", "A dog.")), images=(_png(),)
)


def _make(**more: Any) -> SphinxProcessor:
    settings: dict[str, Any] = {"canvas_px": 16, "image_rows": 12, "num_views": 5, "max_tokens": 200}
    return SphinxProcessor(tokenizer=MODEL, **settings | more)


def test_the_image_stands_between_bos_and_the_text() -> None:
    ours = _make()(SAMPLE)
    assert ours.slots[:14].tolist() == [Slot.TEXT, *[Slot.IMAGE] * 12, Slot.TEXT]
    assert (ours.slots[14:] == Slot.TEXT).all()
    assert ours.ids[0] == 1 and ours.ids[-1] == 2 and not ours.ids[1:13].any()
    assert (ours.labels[:13] == IGNORE).all() and ours.labels[-1] == IGNORE
    assert (ours.pixels.shape, ours.pixels.dtype, ours.num_views) == ((1, 3, 16, 16), np.uint8, 5)
    assert (ours.key, ours.source, ours.domain, ours.regions) == ("a/1", "src", "natural", None)
    assert (ours.ids.dtype, ours.labels.dtype, ours.slots.dtype) == (np.int64, np.int64, np.uint8)


def test_what_is_learned_reads_as_the_answer_and_its_end() -> None:
    processor = _make()
    ours = processor(SAMPLE)
    assert processor.tokenizer.decode(ours.labels[ours.labels != IGNORE].tolist()) == "A dog.\n###"
    learned = ours.labels != IGNORE
    assert (ours.labels[learned] == ours.ids[learned]).all() and ours.num_targets == learned.sum()


def test_text_alone_has_no_image_positions() -> None:
    processor = _make()
    text_only = replace(SAMPLE, images=(), turns=(Turn("human", "What?"), Turn("assistant", "A dog.")))
    ours, with_image = processor(text_only), processor(SAMPLE)
    assert (ours.slots == Slot.TEXT).all() and ours.num_views == 0 and ours.pixels.shape == (0, 3, 16, 16)
    assert ours.ids.tolist() == with_image.ids[with_image.slots == Slot.TEXT].tolist()


def test_a_prompt_is_the_training_sequence_up_to_the_answer() -> None:
    processor = _make()
    prompt, training = processor.prompt(SAMPLE), processor(SAMPLE)
    first = int(np.flatnonzero(training.labels != IGNORE)[0])
    assert prompt.ids.tolist() == training.ids[:first].tolist()
    assert prompt.slots.tolist() == training.slots[:first].tolist()
    assert (prompt.labels == IGNORE).all() and (prompt.pixels == training.pixels).all()
    assert processor.tokenizer.decode(prompt.ids[prompt.slots == Slot.TEXT].tolist()).endswith(" Assistant:")
    without_answer = replace(SAMPLE, turns=SAMPLE.turns[:1])
    assert processor.prompt(without_answer).ids.tolist() == prompt.ids.tolist()


def test_answers_stop_at_eos_or_the_signal() -> None:
    processor = _make()
    eos, spaced, bare = processor.stop_sequences()
    assert eos == [2] and spaced[-len(bare) :] == bare
    assert processor.tokenizer.decode(bare) == "\n###"
    processor.stop_sequences()[0].append(5)
    assert processor.stop_sequences()[0] == [2]
    assert _make(template="alpaca").stop_sequences() == [[2]]
    assert processor.decode([1, *processor.tokenizer.encode(" A dog. "), 2]) == "A dog."


def test_nothing_of_the_sample_changes_and_calls_repeat() -> None:
    before = pickle.dumps(SAMPLE)
    for quirks in (False, True):
        processor = _make(reference_quirks=quirks)
        first, again = processor(SAMPLE), pickle.loads(pickle.dumps(processor))(SAMPLE)
        assert first.ids.tolist() == again.ids.tolist() and (first.pixels == again.pixels).all()
    assert pickle.dumps(SAMPLE) == before


def test_lengths_are_known_without_decoding() -> None:
    processor = _make()
    ours = processor(SAMPLE)
    broken = replace(SAMPLE, images=(b"no image",))
    assert processor.lengths(broken) == Lengths(len(ours), ours.num_views, ours.num_targets)


@pytest.mark.parametrize("more", [{}, {"reference_quirks": True}, {"template": "alpaca"}, {"template": "nov2023"}])
def test_targets_are_the_positions_that_carry_loss_after_any_cut(more: dict[str, Any]) -> None:
    for answer in ("A dog.", "A dog. " * 60):
        sample = replace(SAMPLE, turns=(SAMPLE.turns[0], Turn("assistant", answer)))
        processor = _make(too_long="truncate_text", **more)
        ours = processor(sample)
        assert processor.lengths(sample) == (len(ours), ours.num_views, ours.num_targets)


def test_a_measured_text_is_tokenised_once_and_gives_the_same_example() -> None:
    processor, fresh = _make(), _make()
    processor.lengths(SAMPLE)
    again = replace(SAMPLE, key="b/2", images=(_png(20, 20),))  # read anew: equal words, another object
    calls = []
    encode, processor._training_text = processor._training_text, calls.append  # type: ignore[method-assign]
    ours, expected = processor(again), fresh(again)
    assert not calls
    processor._training_text = encode  # type: ignore[method-assign]
    assert ours.ids.tolist() == expected.ids.tolist() and ours.labels.tolist() == expected.labels.tolist()
    assert (ours.pixels == expected.pixels).all() and ours.key == "b/2"
    assert not len(processor._memo)
    assert processor(again).ids.tolist() == expected.ids.tolist()


def test_what_was_measured_never_stands_for_another_sample() -> None:
    processor = _make(template="alpaca", max_tokens=300)
    processor.lengths(replace(SAMPLE, meta={"input": "a cat"}))
    ours = processor(SAMPLE)
    assert ours.ids.tolist() == _make(template="alpaca", max_tokens=300)(SAMPLE).ids.tolist()
    with pytest.raises(SampleError, match="SPHINX takes no prompts"):
        processor(replace(SAMPLE, regions=(Region("point", (0.5, 0.5), 1),)))
    by_hand = replace(SAMPLE, turns=list(SAMPLE.turns), meta={"input": "a cat"})  # type: ignore[arg-type]
    assert processor.lengths(by_hand).tokens == len(processor(by_hand)) and len(processor._memo) == 1


def test_a_slice_of_a_mapped_shard_is_as_good_as_bytes() -> None:
    processor = _make()
    mapped = memoryview(b"before" + _png() + b"after")[6:-5]
    assert (processor(replace(SAMPLE, images=(mapped,))).pixels == processor(SAMPLE).pixels).all()


@pytest.mark.parametrize("text", ["\ud800", "a\0b", "\ufeffword", "\u202e" * 50, "x" * 5000, " \n\t"])
def test_odd_characters_are_tokens_or_one_refusal(text: str) -> None:
    processor = _make(too_long="truncate_text")
    sample = replace(SAMPLE, turns=(Turn("human", text), Turn("assistant", f"yes{text}")))
    try:
        assert processor.lengths(sample).tokens == len(processor(sample)) <= 200
    except SampleError as error:
        assert str(error).startswith("sample a/1: ") and "\n" not in str(error)


def test_large_photographs_are_decoded_smaller_and_look_the_same() -> None:
    sample = replace(SAMPLE, images=(PHOTO.read_bytes(),))
    small, full = _make(canvas_px=48)(sample).pixels, _make(canvas_px=48, exact_pil=True)(sample).pixels
    assert small.shape == full.shape and (small != full).any()
    assert np.abs(small.astype(int) - full).mean() < 2


@pytest.mark.parametrize("turns", [1, 5000])
def test_absurd_lengths_are_refused_before_they_cost_seconds(turns: int) -> None:
    words = "word " * (200_000 // turns)
    absurd = replace(SAMPLE, turns=(Turn("human", words), Turn("assistant", words)) * turns)
    for policy, kind in (("skip", SampleTooLongError), ("truncate_text", SampleError)):
        with pytest.raises(kind, match=r"the conversation has 20\d+ characters in \d+ turns, a row max_tokens=200"):
            _make(too_long=policy).lengths(absurd)


def test_too_long_names_both_numbers_or_cuts_the_text_only() -> None:
    turns = (Turn("human", "What?"), Turn("assistant", "A dog. " * 60))
    long = replace(SAMPLE, turns=turns)
    for policy in ("error", "skip"):
        with pytest.raises(
            SampleTooLongError, match=r"sample a/1: \d+ text tokens and 12 visual .* max_tokens=200"
        ) as info:
            _make(too_long=policy)(long)
        assert info.value.num_tokens > info.value.max_tokens == 200
        assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    whole, cut = _make(max_tokens=2000)(long), _make(too_long="truncate_text")(long)
    assert len(cut) == 200 and (cut.slots == Slot.IMAGE).sum() == 12
    assert cut.ids.tolist() == whole.ids[:200].tolist() and cut.labels.tolist() == whole.labels[:200].tolist()
    assert len(_make(reference_quirks=True)(long)) == 200


def test_a_row_that_lacks_room_for_the_end_alone_names_the_last_turn() -> None:
    whole = len(_make()(SAMPLE))
    assert len(_make(max_tokens=whole)(SAMPLE)) == whole
    with pytest.raises(SampleTooLongError, match=r"turn 2 \(assistant\) is the first to pass"):
        _make(max_tokens=whole - 1)(SAMPLE)


def test_a_question_that_fills_the_row_leaves_nothing_to_learn() -> None:
    turns = (Turn("human", "long " * 200), Turn("assistant", "A dog."))
    with pytest.raises(SampleError, match="no answer is left; raise max_tokens"):
        _make(too_long="truncate_text")(replace(SAMPLE, turns=turns))
    with pytest.raises(SampleTooLongError):
        _make(too_long="truncate_text").prompt(replace(SAMPLE, turns=turns))


BAD = {
    "the conversation is empty": {"turns": ()},
    "no assistant answer": {"turns": SAMPLE.turns[:1]},
    "an assistant answer is empty": {"turns": (SAMPLE.turns[0], Turn("assistant", " "))},
    "turn 1 has role 'system'": {"turns": (Turn("system", "x"), *SAMPLE.turns)},  # type: ignore[arg-type]
    "turn 2 is 7, not text": {"turns": (SAMPLE.turns[0], Turn("assistant", 7))},  # type: ignore[arg-type]
    "2 images, but this model takes one": {"images": (_png(), _png())},
    "speaks of an <image> but the sample has none": {"images": ()},
    "further input is 5, not text": {"meta": {"input": 5}},
    "the image is damaged": {"images": (_png()[:-30],)},
    "the image is empty": {"images": (b"",)},
    "SPHINX takes no prompts": {"regions": (Region("point", (0.5, 0.5), 1),)},
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_samples_are_named_in_one_line(problem: str) -> None:
    with pytest.raises(SampleError, match=problem) as info:
        _make()(replace(SAMPLE, **BAD[problem]))
    assert str(info.value).startswith("sample a/1: ") and "\n" not in str(info.value)


def test_a_prompt_needs_a_question() -> None:
    with pytest.raises(SampleError, match="no human turn"):
        _make().prompt(replace(SAMPLE, images=(), turns=SAMPLE.turns[1:]))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens=100 leaves no room .* an image takes 90 positions"):
        _make(max_tokens=100, image_rows=90)
    with pytest.raises(ValueError, match="set max_tokens well above") as told:
        _make(max_tokens=1)
    frame = int(str(told.value).rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match=f"max_tokens={frame} leaves no room"):
        _make(max_tokens=frame)
    assert _make(max_tokens=frame + 1).max_tokens == frame + 1
    with pytest.raises(ValueError, match="too_long='drop' is unknown; choose one of error, skip, truncate_text"):
        _make(too_long="drop")
    with pytest.raises(ValueError, match="chat template 'alpacca' is unknown"):
        _make(template="alpacca")


def test_fingerprints_tell_settings_apart() -> None:
    assert _make().fingerprint() == _make().fingerprint()
    others = [_make(max_tokens=201), _make(template="nov2023"), _make(reference_quirks=True), _make(image_rows=13)]
    assert len({p.fingerprint() for p in [_make(), *others]}) == 5


def test_single_questions_learn_the_answer_and_eos() -> None:
    processor = _make(template="alpaca", max_tokens=300)
    ours = processor(replace(SAMPLE, meta={"input": "a cat"}))
    text = processor.tokenizer.decode(ours.ids[ours.slots == Slot.TEXT].tolist())
    assert "### Instruction:\nWhat?\n\n### Input:\na cat\n\n### Response:A dog." in text
    assert processor.tokenizer.decode(ours.labels[ours.labels != IGNORE].tolist()) == "A dog."
    assert ours.labels[-1] == 2
    with pytest.raises(SampleError, match="takes one question and one answer, not 4 turns"):
        processor(replace(SAMPLE, turns=SAMPLE.turns * 2))
