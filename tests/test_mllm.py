"""The multimodal model: rows in their places, losses that no packing changes, answers that no batch changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestiary import mllm
from bestiary.language.decoder import Decoder, llama_config
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Example, RegionRows, Slot
from data_modules.collate import collate_rows

VOCAB, DIM, SIDE, IMAGE_ROWS, SLOTS = 60, 32, 8, 6, 3


class Patches(nn.Module):
    """Four patches of a canvas between two tags; a frozen and a trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3 * 16, 24)
        self.frozen.requires_grad_(False)
        self.project = nn.Linear(24, DIM)
        self.tags = nn.Parameter(torch.randn(2, DIM))
        self.num_seen = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.num_seen += len(pixels)
        if not len(pixels):  # without an image its side is unknown
            pixels = pixels.new_zeros(0, 3, SIDE, SIDE)
        cut = pixels.float().div(255).unfold(2, 4, 4).unfold(3, 4, 4)
        flat = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), 4, 48)
        rows = self.project(self.frozen(flat).detach())
        start, end = (tag.expand(len(pixels), 1, DIM) for tag in self.tags)
        return torch.cat([start, rows, end], dim=1)


class Prompts(nn.Module):
    """Slots between two tags; points and boxes through their own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.box = nn.Linear(2, DIM), nn.Linear(4, DIM)
        self.tags = nn.Parameter(torch.randn(2, DIM))

    def forward(self, regions: RegionRows) -> Tensor:
        coords, kinds, counts = (torch.as_tensor(x) for x in (regions.coords, regions.kinds, regions.counts))
        rows = torch.zeros(len(coords), DIM)
        for kind, part, width in ((0, self.point, 2), (1, self.box, 4)):
            here = (kinds == kind).nonzero()[:, 0]
            if len(here):  # so a batch of points alone never reaches the boxes' parameters
                rows = rows.index_copy(0, here, part(coords[here, :width]))
        parts = []
        for own in torch.split(rows, counts.tolist()):
            parts += [self.tags[:1], own, self.tags[1:]]
        return torch.cat(parts) if parts else rows


@pytest.fixture
def model() -> MultimodalLM:
    torch.manual_seed(0)
    config = llama_config(dim=DIM, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=128)
    built = MultimodalLM(Decoder(config), Patches(), Prompts())
    for parameter in built.decoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return built


def example(num_text: int, seed: int, *, images: int = 0, points: int = 0, boxes: int = 0) -> Example:
    """[first id][images][prompts][text], a random third of the text without loss."""
    rng = np.random.default_rng(seed)
    num_slots = points + boxes
    gap = images * IMAGE_ROWS + (num_slots + 2 if num_slots else 0)
    ids = np.concatenate([[1], np.zeros(gap), rng.integers(3, VOCAB, num_text)]).astype(np.int64)
    slots = np.zeros(len(ids), np.uint8)
    slots[1 : 1 + images * IMAGE_ROWS] = Slot.IMAGE
    slots[1 + images * IMAGE_ROWS : 1 + gap] = Slot.REGION
    labels = np.where((np.arange(len(ids)) > gap) & (rng.random(len(ids)) > 0.3), ids, IGNORE)
    regions = None
    if num_slots:
        kinds = np.array([0] * points + [1] * boxes, np.int64)
        coords = rng.random((num_slots, 4)).astype(np.float32)
        regions = RegionRows(coords, kinds, np.ones(num_slots, bool), np.array([num_slots], np.int64))
    pixels = rng.integers(0, 256, (images, 3, SIDE, SIDE), dtype=np.uint8)
    return Example(ids, labels, slots, pixels, regions, 4 * images, f"key{seed}", "src", "natural")


def mixed() -> list[Example]:
    return [
        example(9, 1, images=1, points=2),
        example(12, 2),
        example(5, 3, images=2, boxes=SLOTS),
        example(9, 4, images=1),
        example(7, 5, images=1, points=1, boxes=2),
        example(12, 6),
    ]


def losses_of(model: MultimodalLM, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """The loss values of every example by key."""
    batch = collate_rows(rows)
    out = model(batch)
    assert out.values.dtype == torch.float32
    assert len(out.values) == batch.num_targets
    return {s.key: out.values[out.segment == n] for n, s in enumerate(batch.segments)}


def grads_of(model: MultimodalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_visual_rows_replace_their_placeholders_and_nothing_else(model: MultimodalLM) -> None:
    examples = mixed()
    batch = collate_rows([examples[:3], examples[3:]])
    embeds = model.eval().splice(batch)
    assert model.vision is not None
    assert model.regions is not None
    expected = model.decoder.embed(batch.ids).clone()
    expected[batch.slots == Slot.IMAGE] = model.vision(batch.pixels).flatten(0, 1)
    expected[batch.slots == Slot.REGION] = model.regions(batch.regions)
    assert torch.equal(embeds, expected)


def test_losses_are_cross_entropy_at_labelled_positions_with_their_segment(model: MultimodalLM) -> None:
    examples = mixed()
    batch = collate_rows([examples[:4], examples[4:]])
    out, logits = model(batch), model.logits(batch)
    values, segments = [], []
    for number, segment in enumerate(batch.segments):
        span = slice(segment.start, segment.start + segment.length)
        labels = batch.labels[segment.row, span]
        loss = F.cross_entropy(logits[segment.row, span][:-1], labels[1:], ignore_index=IGNORE, reduction="none")
        values.append(loss[labels[1:] != IGNORE])
        segments += [number] * len(values[-1])
    assert torch.allclose(out.values, torch.cat(values), atol=1e-6)
    assert out.segment.tolist() == segments


def test_the_first_label_of_a_segment_is_never_learned_from_its_neighbour(model: MultimodalLM) -> None:
    batch = collate_rows([[example(4, 1), example(4, 2)]])
    all_labelled = replace(batch, labels=batch.ids)
    out = model(all_labelled)
    assert torch.bincount(out.segment).tolist() == [4, 4]


def test_losses_and_gradients_do_not_depend_on_packing(model: MultimodalLM) -> None:
    examples = mixed()
    packings: list[list[list[Example]]] = [
        [[e] for e in examples],
        [examples],
        [examples[::-1][:2], examples[::-1][2:]],
    ]
    total = sum(e.num_targets for e in examples)
    results = []
    for rows in packings:
        losses = losses_of(model, rows)
        results.append((losses, grads_of(model, sum(v.sum() for v in losses.values()) / total)))  # type: ignore[arg-type]
    apart: dict[str, Tensor] = {}
    for e in examples:  # one micro-batch each, summed
        (loss,) = losses_of(model, [[e]]).values()
        for name, grad in grads_of(model, loss.sum() / total).items():
            apart[name] = apart.get(name, torch.zeros(())) + grad
    first_losses, first_grads = results[0]
    for losses, grads in [*results[1:], (first_losses, apart)]:
        for key in first_losses:
            assert torch.allclose(losses[key], first_losses[key], atol=1e-5), key
        assert grads.keys() == first_grads.keys()
        for name in grads:
            assert (grads[name] - first_grads[name]).norm() <= 1e-5 * max(first_grads[name].norm(), 1e-3), name


def test_the_head_in_chunks_gives_the_same_losses_and_gradients(
    model: MultimodalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate_rows([mixed()])
    whole = model(batch).values
    grads = grads_of(model, whole.sum())
    seen: list[int] = []
    model.decoder.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(mllm, "HEAD_ELEMENTS", 7 * VOCAB)
    chunked = model(batch).values
    assert max(seen) == 7
    assert torch.allclose(chunked, whole, atol=1e-6)
    for name, grad in grads_of(model, chunked.sum()).items():
        assert torch.allclose(grad, grads[name], atol=1e-5), name


@pytest.mark.parametrize("rows", [[[example(6, 1)]], [[example(6, 1, images=1, points=1)]], [[]]])
def test_every_trainable_part_has_a_gradient_whatever_the_batch_holds(
    model: MultimodalLM, rows: list[list[Example]]
) -> None:
    grads = grads_of(model.train(), model(collate_rows(rows)).values.sum())
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "vision.frozen.weight" not in grads
    assert not grads["regions.box.weight"].any()


def test_touching_parameters_changes_no_number(model: MultimodalLM) -> None:
    batch = collate_rows([[example(6, 1)], [example(9, 2, images=1)]])
    assert torch.equal(model.train()(batch).values, model.eval()(batch).values)


def test_counts_that_disagree_are_refused_with_both_numbers(model: MultimodalLM) -> None:
    batch = collate_rows([[example(6, 1, images=1, points=2)]])
    with pytest.raises(ValueError, match="6 IMAGE positions but 12 image rows"):
        model(replace(batch, pixels=batch.pixels.repeat(2, 1, 1, 1)))
    assert batch.regions is not None
    more = RegionRows(*(torch.cat([torch.as_tensor(x)] * 2) for x in (
        batch.regions.coords, batch.regions.kinds, batch.regions.valid, batch.regions.counts
    )))  # fmt: skip
    with pytest.raises(ValueError, match="4 REGION positions but 8 region rows"):
        model(replace(batch, regions=more))
    with pytest.raises(ValueError, match="4 REGION positions but 0 region rows"):
        model.eval()(replace(batch, regions=None))


def test_images_and_prompts_without_their_part_are_refused(model: MultimodalLM) -> None:
    blind, unprompted = MultimodalLM(model.decoder), MultimodalLM(model.decoder, model.vision)
    with pytest.raises(ValueError, match="1 images given to a model without a vision part"):
        blind(collate_rows([[example(6, 1, images=1)]]))
    with pytest.raises(ValueError, match="prompts of 1 samples"):
        unprompted(collate_rows([[example(6, 1, images=1, points=1)]]))


def test_a_batch_answers_as_each_prompt_alone(model: MultimodalLM) -> None:
    prompts = mixed()
    stop = [[2], [7, 9]]
    for sampling in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}):
        together = model.generate(prompts, max_new_tokens=25, stop=stop, **sampling)
        alone = [model.generate([p], max_new_tokens=25, stop=stop, **sampling)[0] for p in prompts]
        by_two = model.generate(prompts[::-1], max_new_tokens=25, stop=stop, batch_size=2, **sampling)[::-1]
        assert together == alone == by_two
        assert len({tuple(answer) for answer in together}) > 1


def test_equal_prompts_of_a_call_draw_differently_and_repeatably(model: MultimodalLM) -> None:
    prompts = [example(6, 1)] * 3
    first = model.generate(prompts, max_new_tokens=20, temperature=2.0, seed=1)
    assert len({tuple(answer) for answer in first}) == 3
    assert model.generate(prompts, max_new_tokens=20, temperature=2.0, seed=1) == first
    assert model.generate(prompts, max_new_tokens=20, temperature=2.0, seed=2) != first


def test_answers_end_at_stop_sequences_which_are_cut_and_at_the_last_position(model: MultimodalLM) -> None:
    prompt = example(6, 1, images=1)
    (free,) = model.generate([prompt], max_new_tokens=30)
    assert len(free) == 30
    stop = free[4:7]
    end = next(n for n in range(30) if free[n : n + 3] == stop)
    assert model.generate([prompt], max_new_tokens=30, stop=[stop, [stop[-1], 10**6]]) == [free[:end]]
    assert model.generate([prompt], max_new_tokens=30, stop=[stop[2:], stop]) == [free[: min(end, free.index(stop[2]))]]
    (to_the_end,) = model.generate([prompt], max_new_tokens=10**6)
    assert len(prompt) + len(to_the_end) == model.decoder.max_positions
    assert to_the_end[:30] == free
    with pytest.raises(ValueError, match=r"key2.*leaves no room"):
        model.generate([prompt, example(127, 2)], max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate([prompt], max_new_tokens=0)
    assert model.generate([], max_new_tokens=4) == []


def test_reference_batching_lets_shorter_prompts_run_to_the_common_length(model: MultimodalLM) -> None:
    prompts = mixed()
    outputs = model.generate(prompts, max_new_tokens=10, reference_batching=True, batch_size=2)
    assert {len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)} == {10 + max(map(len, prompts))}


def test_a_stream_gives_the_answer_and_never_a_part_of_a_stop_sequence(model: MultimodalLM) -> None:
    prompt = example(6, 1, images=1)
    (free,) = model.generate([prompt], max_new_tokens=30)
    for stop in ([], [free[8:11]], [[*free[8:10], 0]], [free[8:11], free[9:12]]):
        expected = model.generate([prompt], max_new_tokens=30, stop=stop)[0]
        assert list(model.stream(prompt, max_new_tokens=30, stop=stop)) == expected


def test_equal_images_are_encoded_once_and_modes_are_given_back(model: MultimodalLM) -> None:
    one = example(6, 1, images=1)
    prompts = [one, replace(example(9, 2, images=1), pixels=one.pixels.copy()), example(7, 3, images=1)]
    model.train()
    assert isinstance(model.vision, Patches)
    model.vision.frozen.eval()
    together = model.generate(prompts, max_new_tokens=5)
    assert model.vision.num_seen == 2
    assert together == [model.generate([p], max_new_tokens=5)[0] for p in prompts]
    assert model.training
    assert model.decoder.training
    assert not model.vision.frozen.training


def test_likelihoods_are_sums_of_the_losses(model: MultimodalLM) -> None:
    examples = [*mixed(), example(3, 9)]
    losses = losses_of(model, [[e] for e in examples])
    for e, scored in zip(examples, model.log_likelihood(examples, batch_size=4), strict=True):
        assert scored.log_likelihood == pytest.approx(-losses[e.key].sum().item(), rel=1e-5)
        assert scored.num_tokens == e.num_targets
        assert scored.mean_nll == pytest.approx(losses[e.key].mean().item(), rel=1e-5)
    prompt = example(6, 1, images=1)
    (answer,) = model.generate([prompt], max_new_tokens=5)
    for tail, is_greedy in ((answer, True), ([*answer[:4], (answer[4] + 1) % VOCAB], False)):
        ids = np.concatenate([prompt.ids, tail])
        labels = np.concatenate([np.full(len(prompt), IGNORE), tail])
        slots = np.concatenate([prompt.slots, np.zeros(5, np.uint8)])
        (scored,) = model.log_likelihood([replace(prompt, ids=ids, labels=labels, slots=slots)])
        assert (scored.is_greedy, scored.num_tokens) == (is_greedy, 5)


def test_nothing_to_score_is_no_error(model: MultimodalLM) -> None:
    silent = example(6, 1)
    silent = replace(silent, labels=np.full_like(silent.labels, IGNORE))
    (scored,) = model.log_likelihood([silent])
    assert (scored.log_likelihood, scored.num_tokens) == (0.0, 0)
    assert model(collate_rows([[silent]])).values.shape == (0,)


def test_bfloat16_autocast_trains_with_float32_losses_and_answers(model: MultimodalLM) -> None:
    examples = mixed()
    exact = model(collate_rows([examples])).values
    with torch.autocast("cpu", torch.bfloat16):
        values = model.train()(collate_rows([examples])).values
        answers = model.generate(examples, max_new_tokens=4)
    assert values.dtype == torch.float32
    assert (values - exact).abs().mean() < 0.2
    grads = grads_of(model, values.sum())
    assert all(grad.isfinite().all() for grad in grads.values())
    assert [len(answer) for answer in answers] == [4] * len(examples)


def test_a_bfloat16_model_trains_and_answers(model: MultimodalLM) -> None:
    model.decoder.to(torch.bfloat16)
    values = model(collate_rows([mixed()])).values
    assert values.dtype == torch.float32
    values.sum().backward()
    assert len(model.generate(mixed(), max_new_tokens=4)) == 6
