"""Pictures of small and large words: where words stand, how large they are, what is held out."""

from __future__ import annotations

from random import Random

import pytest

from data_modules.embedded.assets import WORDS
from data_modules.embedded.generate import DOMAINS
from data_modules.embedded.plain import plain_sample
from data_modules.embedded.scene import is_heldout_pair
from data_modules.embedded.small_text import QUARTERS, SIZE_PX, draw, scene

SCENES = [(domain, split, scene(domain, 3, index, split)) for domain in DOMAINS for split in ("train", "heldout")
          for index in range(6)]  # fmt: skip


def test_every_quarter_holds_its_word_and_half_of_them_are_small():
    for _, _, picture in SCENES:
        assert picture.image.size == SIZE_PX
        assert sorted(thing.kind for thing in picture.things) == ["large", "large", "small", "small"]
        for place, thing in enumerate(picture.things):
            x, y = place % 2 * 96, place // 2 * 64
            assert x <= thing.box[0] < thing.box[2] <= x + 96 and y <= thing.box[1] < thing.box[3] <= y + 64


def test_small_words_are_far_smaller_than_large_ones_and_lie_on_no_border_of_windows():
    heights = {"small": [], "large": []}
    for _, _, picture in SCENES:
        for thing in picture.things:
            heights[thing.kind].append(thing.box[3] - thing.box[1])
            if thing.kind == "small":
                assert not any(thing.box[0] < border < thing.box[2] for border in (64, 96, 128))
    assert max(heights["small"]) <= 12 and min(heights["large"]) >= 17


def test_heldout_pictures_pair_words_that_training_never_pairs():
    for _, split, picture in SCENES:
        labels = [thing.label for thing in picture.things]
        assert set(labels) <= set(WORDS)
        assert any(is_heldout_pair(a, b) for a in labels for b in labels if a < b) == (split == "heldout")


def test_training_asks_about_every_quarter_and_heldout_questions_name_the_size_of_their_word():
    sample = plain_sample("monkey_texts", 0, 4)
    assert sorted(turn.text.split(" in the ")[1] for turn in sample.turns[::2]) == sorted(f"{q}?" for q in QUARTERS)
    truth = {q: (o["label"], o["kind"]) for q, o in zip(QUARTERS, sample.meta["objects"], strict=True)}
    asked = sample.turns[0].text.split(" in the ")[1].rstrip("?")
    assert sample.turns[1].text == truth[asked][0]
    held = plain_sample("monkey_texts_heldout", 0, 4)
    words = {o["label"]: o["kind"] for o in held.meta["objects"]}
    assert held.meta["task"] == words[held.meta["gt_answers"]] and len(held.turns) == 2


def test_a_word_that_crosses_a_border_wherever_it_stands_is_refused():
    with pytest.raises(ValueError, match="crosses a border in every place; print it smaller"):
        draw(Random(0), "document", "train", (96, 64), ["TEA"], [30], [((0, 0, 96, 64), (0.3, 0.5, 0.7))])
