"""Ovis as a variant of the house: what its processor refuses, how rows are spliced, what stage 1 draws anew."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bestiary.config import Optimizer, Schedule, Stage
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Example, Region, Sample, SampleError, SampleTooLongError, Slot, Turn
from bestiary.variants.ovis.model import build_ovis, redraw_layers
from bestiary.variants.ovis.module import OvisModule, whole_warmup
from bestiary.variants.ovis.processor import OvisProcessor
from bestiary.variants.ovis.visual_tokenizer import OvisVision
from bestiary.vision.image import image_size
from data_modules.collate import collate_rows

TOKENIZER = Path(__file__).parents[1] / "goldens/ovis/tokenizers/qwen"
MARKS = {"1.0": 2, "1.5": 2, "1.6": 5}


def tiny(version: str = "1.6", **vision: Any) -> MultimodalLM:
    """A model of a version, drawn from a fixed seed."""
    torch.manual_seed(0)
    backbone = {"image_px": 20, "patch_px": 5, "width": 16, "layers": 3, "heads": 2, "mlp_dim": 24}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["num_key_value_heads"] = 2
    return build_ovis(
        vision={
            "backbone": {"kind": "clip" if version == "1.0" else "siglip", **backbone},
            "vocab_size": 40,
            "num_marks": MARKS[version],
            "num_views": 5 if version == "1.5" else 1,
            "stride": 1 if version == "1.0" else 2,
            **vision,
        },
        decoder={
            "family": "qwen2",
            "vocab_size": 340,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            **sizes,
        },
    )


def processor(model: MultimodalLM, version: str = "1.6", **changes: Any) -> OvisProcessor:
    """The processor of a model."""
    settings = {"tokenizer": str(TOKENIZER), "version": version, "chat_format": "qwen", "max_tokens": 512}
    return OvisProcessor(**(settings | model.layout | changes))


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A picture's file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def sample(text: str = "<image>\nWhat?", *images: bytes, answer: str = "a boat", key: str = "k", **rest: Any) -> Sample:
    """One question and its answer."""
    return Sample(key, "s", "d", (Turn("human", text), Turn("assistant", answer)), images, **rest)


WIDE, TALL = picture(55, 18), picture(15, 60, seed=1)


@pytest.mark.parametrize("version", MARKS)
def test_measured_and_made_lengths_agree_and_rows_match_the_model(version: str) -> None:
    model = tiny(version)
    made_by = processor(model, version, max_partition_many=3)
    for number, item in enumerate(
        [sample("How many?"), sample("<image> and <image>", WIDE, TALL), sample("What?", TALL), sample("<image>", WIDE)]
    ):
        told, example = made_by.lengths(item), made_by(item)
        assert told == (len(example), example.num_views, example.num_targets), number
        with torch.no_grad():
            rows = model.splice(collate_rows([[example]]))
        assert torch.isfinite(rows).all()


@torch.no_grad()
@pytest.mark.parametrize("version", MARKS)
def test_packed_samples_of_unequal_pictures_lose_what_they_lose_alone(version: str) -> None:
    model = tiny(version).eval()
    made_by = processor(model, version, max_partition_many=4)
    items = [sample("<image> or <image>?", TALL, WIDE), sample("How many?"), sample("<image>", WIDE)]
    examples = [made_by(item) for item in items]
    together = model(collate_rows([examples]))
    for number, example in enumerate(examples):
        alone = model(collate_rows([[example]])).values
        assert (together.values[together.segment == number] - alone).abs().max() < 1e-4


@torch.no_grad()
def test_marks_are_the_last_rows_of_the_table_and_pictures_never_reach_them() -> None:
    model = tiny()
    vision = model.vision
    assert isinstance(vision, OvisVision)
    example = processor(model)(sample("<image>", WIDE))
    before = model.splice(collate_rows([[example]]))[0]
    where = torch.from_numpy(example.slots == Slot.MARK)
    assert torch.equal(before[where], vision.table.weight[-5:][torch.from_numpy(example.ids)[where]])
    vision.table.weight[-5:] += 1
    after = model.splice(collate_rows([[example]]))[0]
    assert torch.equal(before[~where], after[~where])
    assert (after[where] - before[where] - 1).abs().max() < 1e-6


def test_a_batch_of_texts_still_gives_every_visual_parameter_a_gradient_of_zero() -> None:
    model = tiny().train()
    model(collate_rows([[processor(model)(sample("How many?"))]])).values.mean().backward()
    assert model.vision is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.vision.parameters())


@pytest.fixture(scope="module")
def made_by_1_0() -> OvisProcessor:
    """A processor of 1.0."""
    return processor(tiny("1.0"), "1.0")


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (sample("<image> <image>", WIDE), "the text has 2 <image> for 1 pictures"),
        (sample("<image>", WIDE, TALL), "the text has 1 <image> for 2 pictures"),
        (sample("<image>", b""), "the image is"),
        (sample("<image>", picture(50, 1)), "of 50x1 pixels is too thin"),
        (sample("Hi", answer=""), "an assistant answer is empty"),
        (Sample("k", "s", "d", (Turn("human", "Hi"),)), "no assistant answer to learn"),
        (Sample("k", "s", "d", ()), "the conversation is empty"),
        (sample("Hi", regions=(Region("point", (0.5, 0.5), 1),)), "Ovis takes no prompts"),
        (Sample("k", "s", "d", (Turn("assistant", "a boat"),), (WIDE,)), "1 pictures and no human turn for them"),
        (sample("\ud800"), "lone surrogate"),
        (sample("<image>", WIDE, answer="", meta={"data_format": "caption"}), "nothing of it is learned"),
    ],
)
def test_bad_samples_are_one_line_that_names_them(item: Sample, told: str, made_by_1_0: OvisProcessor) -> None:
    with pytest.raises(SampleError, match=told) as found:
        made_by_1_0(item)
    assert str(found.value).startswith("sample k: ")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": "1.7"}, "choose one of 1.0, 1.5, 1.6"),
        ({"chat_format": "phi"}, "choose one of qwen, llama3, gemma"),
        ({"chat_format": "llama3"}, "has no token <|eot_id|>"),
        ({"num_marks": 2}, "Ovis 1.6 has 5 marks"),
        ({"quirks": ["blank"]}, "quirk 'blank' is unknown"),
        ({"too_long": "cut"}, "choose one of error, skip, truncate_text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("|", r"\|")):
        processor(tiny(), **changes)


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({"tokenize": "hardmax"}, "choose one of softmax"),
        ({"num_views": 3}, "a canvas has 1 view, or 5"),
        ({"keep_class": True}, "keep_class needs a clip backbone"),
        ({"num_marks": 40}, "choose fewer marks"),
    ],
)
def test_models_that_cannot_be_are_refused(vision: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny(**vision)


def test_a_tokenizer_that_lacks_a_token_which_turns_are_written_with_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("<|im_start|>", "<|opening|>"))
    with pytest.raises(ValueError, match=r"has no token <\|im_start\|>"):
        processor(tiny(), tokenizer=str(folder))


def cut(example: Example, whole: Example) -> bool:
    """Whether an example is the beginning of another."""
    n = len(example)
    return np.array_equal(example.ids, whole.ids[:n]) and np.array_equal(example.slots, whole.slots[:n])


def test_a_row_that_is_too_long_is_refused_cut_in_its_text_or_cut_blindly_as_asked() -> None:
    model = tiny()
    item = sample("<image>", WIDE, answer="a boat on the lake " * 5)
    whole = processor(model)(item)
    last_row = int(np.flatnonzero(whole.slots)[-1])
    room = len(whole) - 10
    with pytest.raises(SampleTooLongError, match=f"holds max_tokens={room}"):
        processor(model, max_tokens=room)(item)
    made = processor(model, max_tokens=room, too_long="truncate_text")(item)
    assert len(made) == room
    assert cut(made, whole)
    with pytest.raises(SampleTooLongError):  # never through a picture
        processor(model, max_tokens=last_row, too_long="truncate_text")(item)
    blind = processor(model, max_tokens=last_row, quirks=["blind_truncation", "untaught_samples"])(item)
    assert cut(blind, whole)
    assert len(blind) <= last_row
    assert np.count_nonzero(blind.slots == Slot.IMAGE) == len(blind.pixels) * model.layout["image_rows"]
    assert (blind.labels == IGNORE).all()


def test_a_prompt_is_the_training_sequence_up_to_the_answer() -> None:
    made_by = processor(tiny())
    item = sample("<image>\nWhat?", WIDE)
    assert cut(made_by.prompt(item), made_by(item))
    untagged = made_by.prompt(sample("What?", WIDE))
    assert np.array_equal(untagged.ids, made_by.prompt(item).ids), "a picture without a tag stands in front"
    several = made_by.prompt(sample("What?", WIDE, TALL))
    assert np.array_equal(several.ids, made_by.prompt(sample("<image>\n<image>\nWhat?", WIDE, TALL)).ids)


def test_a_prompt_may_hold_the_first_words_of_its_answer() -> None:
    made_by = processor(tiny())
    item = sample("<image>\nWhat?", WIDE, answer="a boat on the lake")
    begun = made_by.prompt(item, answer_start="a boat")
    assert len(begun) > len(made_by.prompt(item)) and cut(begun, made_by(item))
    caption = sample("<image>'s caption: ", WIDE, answer="a boat on the lake", meta={"data_format": "caption"})
    begun = made_by.prompt(caption, answer_start="a boat")
    assert len(begun) > len(made_by.prompt(caption)) and cut(begun, made_by(caption))


def test_redrawing_changes_the_chosen_layers_alone_and_is_the_same_for_a_seed() -> None:
    model = tiny("1.0")
    vision = model.vision
    assert isinstance(vision, OvisVision)
    before = {name: p.detach().clone() for name, p in vision.named_parameters()}
    names = redraw_layers(vision, 2, seed=3)
    moved = {name for name, p in vision.named_parameters() if not torch.equal(p, before[name])}
    assert len(names) == 16
    assert moved == {name for name in names if name.endswith("weight") and "layer_norm" not in name}
    first = {name: p.detach().clone() for name, p in vision.named_parameters()}
    redraw_layers(vision, 2, seed=3)
    assert all(torch.equal(p, first[name]) for name, p in vision.named_parameters())
    query = vision.get_parameter("backbone.encoder.layers.2.self_attn.q_proj.weight")
    assert query.std().item() == pytest.approx(16**-0.5 * 6**-0.5, rel=0.2)  # d^-0.5 * (2 L)^-0.5
    with pytest.raises(ValueError, match="the backbone has 3"):
        redraw_layers(vision, 3, seed=0)


def test_the_module_anneals_tau_warms_up_in_whole_steps_and_redraws_once() -> None:
    model = tiny("1.0", tokenize="gumbel_argmax")
    layer = "vision.backbone.encoder.layers.2.mlp.fc1.weight"
    before = model.get_parameter(layer).detach().clone()
    stage = Stage(
        name="s1",
        train=["vision.head.*", "vision.table.*"],
        max_steps=57,
        batch_size=1,
        optimizer=Optimizer(lr=1.0),
        schedule=Schedule(warmup=0.1),
    )
    module = OvisModule(model, stage, redraw_from=2)
    assert not torch.equal(model.get_parameter(layer), before)
    drawn = model.get_parameter(layer).detach().clone()
    OvisModule(model, stage, redraw_from=2, seed=1)
    assert not torch.equal(model.get_parameter(layer), drawn), "the run's seed draws them"
    assert [module.temperature(0), module.temperature(57)] == pytest.approx([5.0, 0.05])
    assert [module.learning_rate(step) for step in (0, 3, 6)] == pytest.approx([0.0, 0.5, 1.0])
    assert whole_warmup(0.1, 52) * 52 == pytest.approx(6), "5.2 steps are rounded up"
    with pytest.raises(ValueError, match="min_tau"):
        OvisModule(model, stage, min_tau=0.0)
    with pytest.raises(ValueError, match=r"max_tau=3.0.*only tokenize=gumbel_argmax has a temperature"):
        OvisModule(tiny("1.0"), stage, max_tau=3.0)


def test_the_one_picture_of_a_sample_is_cut_into_more_tiles_than_one_of_several() -> None:
    made_by = processor(tiny(), max_partition=9, max_partition_many=1)
    assert len(made_by(sample("<image>", WIDE)).pixels) > 1
    assert len(made_by(sample("<image><image>", WIDE, WIDE)).pixels) == 2


def test_gumbel_words_have_noise_in_training_alone() -> None:
    model = tiny("1.0", tokenize="gumbel_argmax", tau=5.0)
    assert model.vision is not None
    pixels = torch.from_numpy(processor(model, "1.0")(sample("<image>", WIDE)).pixels)
    torch.manual_seed(1)
    first, second = model.vision.train()(pixels), model.vision(pixels)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model.vision(pixels), first)
    model.vision.eval()
    assert torch.equal(model.vision(pixels), model.vision(pixels))
    with torch.no_grad():
        published = tiny("1.0", tokenize="gumbel_argmax", tau=5.0, noisy_eval=True).eval().vision
        assert published is not None
        assert not torch.equal(published(pixels), published(pixels)), "the published code draws noise always"
    with pytest.raises(ValueError, match="noisy_eval: only tokenize=gumbel_argmax draws noise, not softmax"):
        tiny("1.0", noisy_eval=True)
    with pytest.raises(ValueError, match=r"tau=5.0: only tokenize=gumbel_argmax has a temperature, not softmax"):
        tiny("1.0", tau=5.0)


@torch.no_grad()
def test_adaptive_views_of_a_small_picture_leave_the_quarters_half_of_its_features_empty() -> None:
    model = tiny("1.5")
    vision = model.vision
    assert isinstance(vision, OvisVision)
    small, large = sample("<image>", picture(29, 40)), sample("<image>", picture(30, 40))
    made_by = processor(model, "1.5", adaptive=True)
    pixels = torch.from_numpy(np.concatenate([made_by(small).pixels, made_by(large).pixels]))
    quarters = vision.features(pixels).unflatten(-1, (4, 2, 16))[..., 1, :]  # stride 2 x 2, whole and quarters
    assert not quarters[0].any()
    assert quarters[1].all()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_size_of_a_picture_is_read_from_its_header(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (55, 18)).save(buffer, form)
    assert image_size(buffer.getvalue()) == (55, 18)
    with pytest.raises(ValueError, match="none or damaged"):
        image_size(buffer.getvalue()[:8])
