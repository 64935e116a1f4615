"""SPHINX's visual part and its weights at tiny sizes: invariants that parity cases cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.sphinx.consolidated import shard_dim
from bestiary.variants.sphinx.model import SphinxVision, build_sphinx
from bestiary.variants.sphinx.weights import (
    load_published,
    load_reference,
    manifest,
    to_ours,
    to_reference,
)
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.weights import load_published as load_published_v
from tests.variants.sphinx_tiny import DECODER, TEXT, VISION

PIXELS = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def vision(**changes: Any) -> SphinxVision:
    torch.manual_seed(0)
    return SphinxVision(**{**VISION, "out_dim": 16, **changes})


def model(**changes: Any) -> MultimodalLM:
    torch.manual_seed(0)
    return build_sphinx(vision={**VISION, **changes}, decoder=DECODER)


def test_rows_of_an_image_are_start_queries_tokens_end_of_every_view() -> None:
    eyes = vision()
    assert (eyes.num_views, eyes.rows_per_view, eyes.image_rows) == (3, 3 + 37 + 2, 126)
    rows = eyes(PIXELS)
    assert rows.shape == (2, 126, 16)
    by_view = rows.view(2, 3, 42, 16)
    assert torch.equal(by_view[:, :, 0], eyes.start.expand(2, 3, -1, -1)[:, :, 0])
    assert torch.equal(by_view[:, :, -1], eyes.end.expand(2, 3, -1, -1)[:, :, 0])


def test_cuts_are_slices_in_the_order_asked_for() -> None:
    eyes = vision()
    views = eyes.cut(PIXELS)
    exact = eyes.cut(PIXELS.flip(-1))
    assert views.shape == (2, 3, 3, 24, 24)
    canvas = vision(views=["whole"], canvas_px=24).cut(PIXELS[..., :24, 24:])[:, 0]
    assert torch.equal(views[:, 1], canvas)
    assert not torch.equal(views[:, 1], exact[:, 1])


def test_the_rows_depend_on_their_own_image_only() -> None:
    eyes = vision()
    changed = PIXELS.clone()
    changed[1] = 255 - changed[1]
    assert torch.allclose(eyes(PIXELS)[0], eyes(changed)[0], atol=1e-6)
    assert not torch.allclose(eyes(PIXELS)[1], eyes(changed)[1], atol=1e-3)


def test_projecting_stored_features_equals_the_whole() -> None:
    eyes = vision()
    features = eyes.encode(PIXELS)
    assert not features.tokens.requires_grad
    assert torch.equal(eyes.project(features), eyes(PIXELS))


def test_frozen_encoders_stay_in_eval_mode_and_out_of_the_graph() -> None:
    eyes = vision().train()
    assert eyes.visual_proj.training
    assert not any(module.training for tower in eyes.towers for module in tower.modules())
    assert torch.equal(eyes(PIXELS), eyes(PIXELS)), "the Q-Former's dropout is off"
    eyes(PIXELS).sum().backward()
    with_grad = {name.split(".")[0] for name, p in eyes.named_parameters() if p.grad is not None}
    assert with_grad == {"qformer_proj", "visual_proj", "start", "end"}


def test_unfrozen_encoders_learn() -> None:
    eyes = vision(frozen=False).train()
    eyes(PIXELS).square().sum().backward()
    grads = {name: p.grad for name, p in eyes.named_parameters()}
    assert grads["clip.tower.embeddings.patch_embedding.weight"] is not None
    assert grads["dinov2.tower.embeddings.position_embeddings"] is not None
    assert grads["qformer.query_tokens"] is not None


@pytest.mark.parametrize("side", [0, 48])
def test_no_images_give_no_rows_and_zero_gradients(side: int) -> None:
    eyes = vision()
    rows = eyes(torch.zeros(0, 3, side, side, dtype=torch.uint8))
    assert rows.shape == (0, 126, 16)
    rows.sum().backward()
    for name, parameter in eyes.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_half_rounding_is_an_option_that_changes_little() -> None:
    plain, rounded = vision()(PIXELS), vision(half_resize=True)(PIXELS)
    assert 0 < (plain - rounded).abs().max() < 5e-2


def test_published_quirks_switch_the_rounding_on() -> None:
    quirky = build_sphinx(vision=VISION, decoder=DECODER, reference_quirks=True).vision
    assert isinstance(quirky, SphinxVision) and quirky.half_resize
    plain = model().vision
    assert isinstance(plain, SphinxVision) and not plain.half_resize


def test_convnexts_map_is_repeated_up_to_the_patch_grid() -> None:
    eyes = vision()
    views = eyes.cut(PIXELS).flatten(0, 1)
    tokens, places = eyes.map_tokens(views), eyes.feature_map(views)
    grid = tokens[:, 1:].view(6, 6, 6, -1)
    assert torch.equal(grid[:, ::2, ::2], places) and torch.equal(grid[:, 1::2, 1::2], places)
    assert torch.allclose(tokens[:, 0], tokens[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convnext": {"input_px": 32, "depths": [1, 1], "widths": [4, 6]}}, "6 places a side and ConvNeXt's map 4"),
        ({"views": ["whole", [0, 2]]}, r"view \[0, 2\] of 24 px lies outside the canvas of 48 px"),
        ({"views": ["quarter"]}, "'quarter'"),
        ({"views": []}, "views is empty"),
        ({"patch_px": 5}, "view_px=24 is not a multiple of patch_px=5"),
    ],
)
def test_sizes_that_do_not_fit_raise_with_their_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision(**changes)


def test_a_canvas_of_another_size_raises() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 24, 24\).* 48 x 48"):
        vision()(PIXELS[:1, :, :24, :24])


def test_weights_survive_the_way_to_published_names_and_back_with_grouped_heads() -> None:
    ours = model(clip={**VISION["clip"], "text": TEXT})
    state = ours.state_dict()
    published = to_reference(state, ours)
    assert published["llma.layers.0.attention.wk.weight"].shape == (8, 16)
    assert published["llma.clip.visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (24, 8)
    assert not torch.equal(
        published["llma.layers.0.attention.wk.weight"], state["decoder.model.layers.0.self_attn.k_proj.weight"]
    )
    back = to_ours(published, ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert manifest(ours) == {name: tuple(tensor.shape) for name, tensor in published.items()}


def test_published_tensors_load_strictly_and_the_report_counts_conversions() -> None:
    ours = model()
    published = to_reference(ours.state_dict(), ours)
    other = build_sphinx(vision=VISION, decoder=DECODER)
    report = load_reference(other, published)
    assert len(report.matched) + len(report.converted) == len(ours.state_dict())
    assert "decoder.model.layers.1.self_attn.q_proj.weight" in report.converted
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values(), strict=True))
    published["llma.layers.0.attention.wx.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"no rule .*attention\.wx.*nearest: llma\.layers"):
        load_reference(other, published)


def test_published_tensors_load_whole_or_not_at_all() -> None:
    ours, other = model(), build_sphinx(vision=VISION, decoder=DECODER)
    published = to_reference(ours.state_dict(), ours)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks .* tensors \(decoder\.model\.embed_tokens"):
        load_reference(other, {name: tensor for name, tensor in published.items() if "clip" in name})
    with pytest.raises(ValueError, match=r"vision\.start has shape \(1, 1, 3\), the model has \(1, 1, 16\)"):
        load_reference(other, published | {"llma.start_img": torch.zeros(1, 1, 3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_encoders_alone_load_only_when_the_rest_may_be_missing() -> None:
    ours, other = model(), build_sphinx(vision=VISION, decoder=DECODER)
    encoders = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith("vision.")}
    published = to_reference(encoders, ours)
    report = load_reference(other, published, may_lack=["decoder.*"])
    assert {*report.matched, *report.converted} == set(encoders)
    assert set(report.missing) == set(ours.state_dict()) - set(encoders)
    assert other.vision is not None and ours.vision is not None
    assert torch.equal(other.vision(PIXELS), ours.vision(PIXELS))
    with pytest.raises(ValueError, match=r"may_lack 'decodr.*' matches no name"):
        load_reference(other, published, may_lack=["decodr.*"])


def publish(ours: MultimodalLM, folder: Path, num_shards: int = 2) -> None:
    """Write a published folder: shards cut where the published code cuts."""
    whole = to_reference(ours.state_dict(), ours)
    for rank in range(num_shards):
        dims = {name: dim for name in whole if (dim := shard_dim(name)) is not None}
        cut = {name: whole[name].chunk(num_shards, dim)[rank].clone() for name, dim in dims.items()}
        path = folder / f"consolidated.{rank:02d}-of-{num_shards:02d}.model.pth"
        torch.save({"model": {**whole, **cut}}, path)


def test_a_published_folder_of_shards_loads_whole(tmp_path: Path) -> None:
    ours, other = model(), build_sphinx(vision=VISION, decoder=DECODER)
    publish(ours, tmp_path)
    report = load_published(other, tmp_path)
    assert not report.missing and report.converted
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values(), strict=True))


def test_sphinxs_folder_starts_sphinx_v_whose_prompt_part_is_reported_missing(tmp_path: Path) -> None:
    publish(model(), tmp_path)
    with_prompts = build_sphinx_v(vision=VISION, decoder=DECODER, prompt_dim=8)
    report = load_published_v(with_prompts, tmp_path, may_lack=["regions.*"])
    assert len(report.missing) == 15 and all(name.startswith("regions.") for name in report.missing)


def test_damaged_published_folders_are_refused_with_a_reason(tmp_path: Path) -> None:
    ours = model()
    with pytest.raises(ValueError, match=r"no consolidated\.RR-of-NN"):
        load_published(ours, tmp_path)
    publish(ours, tmp_path)
    first, second = sorted(tmp_path.iterdir())
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_published(ours, tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=r"missing .*of one set"):
        load_published(ours, tmp_path)
    torch.save({"optimizer": {}}, first.with_name("consolidated.01-of-02.model.pth"))
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_published(ours, tmp_path)
    torch.save({"model": {"llma.norm.weight": Path("x")}}, second)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_published(ours, tmp_path)


def test_a_model_built_on_meta_runs_once_weights_are_loaded() -> None:
    ours = model().eval()
    with torch.device("meta"):
        other = build_sphinx(vision=VISION, decoder=DECODER).eval()
    load_reference(other, to_reference(ours.state_dict(), ours))
    assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    trains = [p.requires_grad for p in ours.parameters()]
    assert [p.requires_grad for p in other.parameters()] == trains
    assert ours.vision is not None and other.vision is not None
    assert torch.equal(ours.vision(PIXELS), other.vision(PIXELS))
    embeds, positions = torch.randn(1, 5, 16), torch.arange(5)[None]
    assert torch.equal(ours.decoder(embeds, positions), other.decoder(embeds, positions))
