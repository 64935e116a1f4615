"""Monkey as a variant of the house: windows and adapters, what its processor makes and refuses, Qwen's vocabulary."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Region, Sample, SampleError, SampleTooLongError, Slot, Turn
from bestiary.text.qwen_tokenizer import CONTROLS, QwenTokenizer
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.monkey import weights
from bestiary.variants.monkey.chat import END, START, chat_context
from bestiary.variants.monkey.decoder import QwenDecoder
from bestiary.variants.monkey.model import MonkeyVision, build_monkey
from bestiary.variants.monkey.processor import MonkeyProcessor
from bestiary.variants.monkey.resampler import Resampler
from bestiary.variants.monkey.tags import check_places
from data_modules.collate import collate_rows
from tests.parity.ovis_cases import png

NUM_MERGES = 3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in Qwen's format: every byte, and three merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"wh", b"at", b"what"]
    path = tmp_path_factory.mktemp("tiny") / "qwen.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def tiny(image_px: Any = (16, 24), *, adapters: Any = "default", seed: int = 0, **changes: Any) -> MultimodalLM:
    """A model of windows of 8 px, drawn from a fixed seed."""
    torch.manual_seed(seed)
    return build_monkey(
        vision={
            "image_px": image_px,
            "window_px": 8,
            "patch_px": 4,
            "width": 16,
            "layers": 2,
            "heads": 2,
            "num_queries": 4,
            "adapters": {"attention_rank": 2, "mlp_rank": 3} if adapters == "default" else adapters,
        },
        decoder={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 256 + NUM_MERGES + len(CONTROLS) + 5,
            "max_position_embeddings": 512,
        },
        **changes,
    )


def eye(model: MultimodalLM) -> MonkeyVision:
    assert isinstance(model.vision, MonkeyVision)
    return model.vision


def pictures(count: int, model: MultimodalLM) -> torch.Tensor:
    vision = eye(model)
    size = (count, 3, vision.height_px, vision.width_px)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def processor(vocabulary: Path, model: MultimodalLM, **changes: Any) -> MonkeyProcessor:
    return MonkeyProcessor(**({"tokenizer": str(vocabulary), "max_tokens": 512} | model.layout | changes))


PICTURE = png(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))


def sample(text: str = "what?", *, images: int = 1, answer: str = "a boat", **rest: Any) -> Sample:
    return Sample("k", "s", "d", (Turn("human", text), Turn("assistant", answer)), (PICTURE,) * images, **rest)


# Windows and adapters


@pytest.mark.parametrize(("image_px", "num_windows"), [(8, 1), ([16, 16], 4), ([8, 24], 3), ([24, 16], 6)])
def test_a_picture_takes_the_rows_of_its_grid_and_of_the_whole(image_px: Any, num_windows: int) -> None:
    model = tiny(image_px)
    assert model.layout["image_rows"] == (num_windows + 1) * 4
    assert eye(model)(pictures(2, model)).shape == (2, (num_windows + 1) * 4, 24)
    assert eye(model)(pictures(0, model)).shape == (0, (num_windows + 1) * 4, 24)


@pytest.mark.parametrize("image_px", [12, [16, 20], [4, 8]])
def test_windows_that_do_not_divide_the_picture_are_refused(image_px: Any) -> None:
    with pytest.raises(ValueError, match=r"do not divide a picture of .* make both sides multiples"):
        tiny(image_px)


@torch.no_grad()
def test_adapters_begin_as_nothing_and_as_published_only_where_asked() -> None:
    model, bare = tiny(), tiny(adapters=None)
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if "_lora" not in n})
    pixels = pictures(2, model)
    assert torch.equal(eye(model)(pixels), eye(bare)(pixels))
    published = eye(tiny(adapters={"start": "reference"}))
    drawn = [p for name, p in published.named_parameters() if name.endswith("lora_b.weight")]
    assert torch.cat([p.flatten() for p in drawn]).std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="choose noop or reference"):
        tiny(adapters={"start": "zero"})


@torch.no_grad()
def test_a_window_answers_to_its_own_adapters_and_to_no_other() -> None:
    model = tiny([16, 16], adapters={"start": "reference"}).eval()
    pixels = pictures(2, model)
    before = eye(model)(pixels).view(2, 5, 4, -1)
    for name, parameter in eye(model).named_parameters():
        if "_lora.2." in name:
            parameter.add_(0.5)
    changed = (eye(model)(pixels).view(2, 5, 4, -1) - before).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.slow
def test_dropout_of_adapters_is_for_training_alone() -> None:
    model = tiny(adapters={"start": "reference", "dropout": 0.5})
    pixels = pictures(1, model)
    assert torch.equal(eye(model.eval())(pixels), eye(model)(pixels))
    assert not torch.equal(eye(model.train())(pixels), eye(model)(pixels))


def test_what_is_frozen_in_front_of_the_adapters_is_not_recorded() -> None:
    vision = eye(tiny()).train()
    for name, parameter in vision.named_parameters():
        parameter.requires_grad_("_lora" in name)
    assert not vision.vit.first_tokens(torch.rand(7, 1, 3, 8, 8)).requires_grad
    vision(torch.rand(1, 3, 16, 24)).sum().backward()
    assert {n for n, p in vision.named_parameters() if p.grad is not None} == {
        n for n, _ in vision.named_parameters() if "_lora" in n
    }


def recorded_views(vision: MonkeyVision) -> list[int]:
    """How many views go through the last block with a record for the backward pass, call by call of the next one."""
    kept: list[int] = []

    def look(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            kept.append(len(output))

    handle = vision.vit.blocks[-1].register_forward_hook(look)
    vision.resampler.register_forward_hook(lambda *_: handle.remove())
    return kept


@pytest.mark.parametrize("image_px", [[16, 24], [8, 8]])
def test_a_backward_pass_without_the_global_view_gives_the_adapters_the_same_gradients(image_px: Any) -> None:
    vision = eye(tiny(image_px)).eval()
    for parameter in vision.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    found = []
    for learned in ("", "_lora."):
        vision.requires_grad_(False)
        for name, parameter in vision.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(learned in name)
        assert vision.vit.only_windows_learn() == bool(learned)
        kept = recorded_views(vision)
        rows = vision(torch.rand(2, 3, *image_px, generator=torch.Generator().manual_seed(0)))
        rows.square().sum().backward()
        assert sum(kept) == vision.num_windows + (not learned), "what nobody learns from is not recorded"
        found.append((rows.detach(), [p.grad for n, p in vision.named_parameters() if "_lora." in n]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None and other is not None and (one - other).norm() <= 1e-4 * max(one.norm(), 1e-3)
    with torch.no_grad():
        assert not vision.vit.only_windows_learn()


def test_only_weights_with_adapters_say_for_which_windows() -> None:
    assert eye(tiny([16, 24])).identity != eye(tiny([24, 16])).identity != {}
    assert eye(tiny(adapters=None)).identity == {}


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (192, 1), (256, 2), (320, 2)])
def test_the_resampler_has_a_head_for_every_whole_128_of_its_width(width: int, heads: int) -> None:
    resampler = Resampler(num_queries=4, in_dim=8, out_dim=width)
    assert resampler.heads == heads and resampler(torch.rand(1, 4, 8)).shape == (1, 4, width)


@pytest.mark.slow
def test_weights_of_another_grid_are_refused_and_weights_without_adapters_leave_them_as_they_are() -> None:
    state = weights.to_reference(tiny([16, 24]).state_dict())
    with pytest.raises(ValueError, match=r"adapters for 6 windows, but .*16 x 16 px has 4"):
        weights.load_reference(tiny([16, 16]), state)
    bare = weights.to_reference(tiny(adapters=None, seed=1).state_dict())
    report = weights.load_reference(tiny(), bare, may_lack=[weights.ADAPTER_GLOB])
    assert len(report.missing) == 2 * 3 * 6 * 3


def test_a_batch_of_texts_still_gives_every_trainable_visual_parameter_a_gradient_of_zero(vocabulary: Path) -> None:
    model = tiny().train()
    model(collate_rows([[processor(vocabulary, model)(sample(images=0))]])).values.mean().backward()
    named = [(n, p) for n, p in eye(model).named_parameters() if p.requires_grad]
    assert named and all(p.grad is not None and not p.grad.any() for _, p in named)


# The decoder


@torch.no_grad()
def test_a_failed_call_leaves_no_stretching_behind() -> None:
    decoder = tiny(seq_length=4).decoder.eval()
    assert isinstance(decoder, QwenDecoder)
    embeds, positions = torch.rand(1, 12, 24), torch.arange(12)[None]
    expected = decoder(embeds, positions)
    with pytest.raises(RuntimeError):
        decoder(torch.rand(1, 12, 23), positions)
    assert decoder.rotary.alpha is None
    assert torch.equal(decoder(embeds, positions), expected)
    assert not torch.equal(decoder.train()(embeds, positions), expected)


@pytest.mark.slow
@torch.no_grad()
def test_long_answers_do_not_depend_on_their_neighbours(vocabulary: Path) -> None:
    model = tiny(seq_length=16).eval()
    made_by = processor(vocabulary, model)
    prompts = [made_by.prompt(sample("what " * n, images=n % 2)) for n in (1, 4, 9)]
    together = model.generate(prompts, max_new_tokens=12)
    assert together == [model.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]


def test_decoder_adapters_train_and_begin_as_nothing() -> None:
    model, adapted = tiny(), tiny(decoder_lora={"rank": 2})
    adapted.load_state_dict(model.state_dict(), strict=False)
    embeds, positions = torch.rand(1, 6, 24), torch.arange(6)[None]
    assert torch.equal(model.eval().decoder(embeds, positions), adapted.eval().decoder(embeds, positions))
    adapted.decoder(embeds, positions).sum().backward()
    trained = [n for n, p in adapted.decoder.named_parameters() if "lora_b" in n and p.grad is not None]
    assert len(trained) == 2 * 4


# The processor


def test_every_answer_is_learned_with_its_end_and_pictures_stand_where_they_are_named(vocabulary: Path) -> None:
    model = tiny([8, 8])
    made_by = processor(vocabulary, model)
    tokenizer = made_by.tokenizer
    assert isinstance(tokenizer, QwenTokenizer)
    turns = (
        *(Turn("human", "<image>\n what?"), Turn("assistant", "a boat")),
        *(Turn("human", "<img>b.png</img>and <image>this"), Turn("assistant", "a car")),
    )
    example = made_by(Sample("k", "s", "d", turns, (PICTURE,) * 3))
    learned = [i for i in example.labels.tolist() if i != IGNORE]
    assert learned == [*tokenizer.encode("a boat", eos=True), *tokenizer.encode("a car", eos=True)]
    text = tokenizer._encoding.decode(example.ids[example.slots == Slot.TEXT].tolist())
    span = "<img></img>"
    end = "<|endoftext|>"
    assert text == f"{span} what? Answer: a boat{end}{span} and {span}this Answer: a car{end}"
    assert example.pixels.shape == (3, 3, 8, 8)
    assert int((example.slots == Slot.IMAGE).sum()) == 3 * 8


def test_measured_and_made_lengths_agree_and_rows_match_the_model(vocabulary: Path) -> None:
    model = tiny().eval()
    made_by = pickle.loads(pickle.dumps(processor(vocabulary, model)))
    items = [sample(), sample(images=0), sample("<image> or <image>", images=2), sample("{} {x}")]
    for item in items:
        told, example = made_by.lengths(item), made_by(item)
        assert told == (len(example), example.num_views, example.num_targets)
    examples = [made_by(item) for item in items]
    with torch.no_grad():
        together = model(collate_rows([examples]))
        for number, example in enumerate(examples):
            alone = model(collate_rows([[example]])).values
            assert (together.values[together.segment == number] - alone).abs().max() < 1e-4


@pytest.fixture(scope="module")
def refusing(vocabulary: Path) -> MonkeyProcessor:
    """The processor of one window."""
    return processor(vocabulary, tiny([8, 8]))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": "<img>a.png what?"}, "<img> has no partner"),
        ({"text": "what?</img>"}, "</img> has no partner"),
        ({"text": "<img><img>a</img>"}, "<img> has no partner"),
        ({"text": "<imgpad>"}, "<imgpad> has no partner"),
        ({"text": "<image><image>"}, "the text has 2 pictures, the sample 1"),
        ({"answer": "<image>"}, "is an answer and holds a picture"),
        ({"answer": " "}, "answer is empty"),
        ({"answer": "<ref>cat"}, "<ref> is not closed"),
        ({"answer": "cat</ref>"}, "</ref> has no partner"),
        ({"answer": "<ref>a<box>(1,2),(3,4)</box></ref>"}, "<box> inside <ref>"),
        ({"answer": "<box>(1,2),(3,1001)</box>"}, "has 1001, outside 0..1000"),
        ({"answer": "<box>(-1,2),(3,4)</box>"}, "has -1, outside 0..1000"),
        ({"answer": "<box>(1,2)</box>"}, "is no place; write 2 points"),
        ({"answer": "<quad>(1,2),(3,4),(5,6),(7.5,8)</quad>"}, "is no place; write 4 points"),
        ({"regions": (Region("point", (0.5, 0.5), 1),)}, "regions, but Monkey takes none"),
    ],
)
def test_what_is_wrong_with_a_sample_is_told_in_one_line(
    refusing: MonkeyProcessor, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SampleError) as error:
        refusing(sample(**changes))
    assert problem in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("sample k: ")


def test_the_picture_itself_is_a_box() -> None:
    check_places("<ref>all</ref><box>(0,0),(1000,1000)</box><quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad>")


def test_the_published_single_turn_does_not_move_pictures_of_later_turns(vocabulary: Path) -> None:
    made_by = processor(vocabulary, tiny([8, 8]), quirks=["single_turn"])
    turns = (Turn("human", "a"), Turn("assistant", "b"), Turn("human", "<image>c"), Turn("assistant", "d"))
    with pytest.raises(SampleError, match="behind the first two turns"):
        made_by(Sample("k", "s", "d", turns, (PICTURE,)))


def test_the_oldest_exchanges_go_where_a_chat_outgrows_its_window() -> None:
    history = [("first", "one"), ("second", "two")]

    def kept(room: int) -> list[bool]:
        text, ids = chat_context(lambda said: list(said.encode()), "q", history=history, system="s", max_window=room)
        assert bytes(ids).decode() == text
        return ["first" in text, "second" in text]

    sizes = [len(f"{START}system\ns{END}")]
    for question, answer in reversed(history):
        sizes.append(sizes[-1] + len(f"\n{START}user\n{question}{END}\n{START}assistant\n{answer}{END}"))
    assert kept(sizes[1]) == [False, False] and kept(sizes[1] + 1) == kept(sizes[2]) == [False, True]
    assert kept(sizes[2] + 1) == [True, True]


@pytest.mark.slow
def test_a_picture_is_never_cut_and_text_only_where_asked(vocabulary: Path) -> None:
    model = tiny([8, 8])
    whole = processor(vocabulary, model)(sample())
    end_of_span = int(np.flatnonzero(whole.slots)[-1]) + 2
    for room in range(2, len(whole)):
        strict, cutting = (
            processor(vocabulary, model, max_tokens=room, too_long=how) for how in ("error", "truncate_text")
        )
        with pytest.raises(SampleTooLongError, match="a row holds max_tokens"):
            strict(sample())
        if room < end_of_span:
            with pytest.raises(SampleTooLongError, match=r"span, up to position .* would be cut"):
                cutting(sample())
        elif (whole.labels[1:room] == IGNORE).all():
            with pytest.raises(SampleTooLongError, match="no answer would be left"):
                cutting(sample())
        else:
            assert cutting(sample()).ids.tolist() == whole.ids[:room].tolist()


# Qwen's vocabulary


def test_control_tokens_follow_the_last_rank_and_merges_are_used(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary.parent)
    assert isinstance(tokenizer, QwenTokenizer)
    assert tokenizer.vocab_size == 256 + NUM_MERGES + len(CONTROLS)
    assert tokenizer.encode("what", eos=True) == [258, 259]
    assert tokenizer.decode([258, tokenizer.eos_id, 32, 0xC3]) == "what \ufffd"
    ids, begins, ends = tokenizer.encode_spans("é<ref>what")
    assert ids == [0xC3, 0xA9, tokenizer.control_id("<ref>"), 258]
    assert (begins, ends) == ([0, 0, 1, 6], [0, 1, 6, 10])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.sha256, again.encode("what?")) == (tokenizer.sha256, tokenizer.encode("what?"))


def test_a_file_that_is_no_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.tiktoken"
    with pytest.raises(ValueError, match=r"broken\.tiktoken: no such file"):
        load_tokenizer(path)
    path.write_text("no tokens here\n")
    with pytest.raises(ValueError, match="this is no tiktoken file"):
        load_tokenizer(path)
    path.write_text(f"{base64.b64encode(b'a').decode()} 0\n")
    with pytest.raises(ValueError, match="1 tokens, but none for byte 0"):
        load_tokenizer(path)
