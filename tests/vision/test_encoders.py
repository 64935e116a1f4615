"""The encoder adapters at small sizes: what they need beyond the transformers classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bestiary.vision.encoders import (
    ClipTower,
    ConvNextTower,
    Dinov2Tower,
    QFormerTower,
    clip_to_imagenet,
    grid_side,
    normalise,
)

VIT = {"width": 16, "layers": 1, "heads": 2}
VIEWS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def clip_tower(**changes: object) -> ClipTower:
    return ClipTower(**{"view_px": 32, "patch_px": 8, "mlp_dim": 32, **VIT, **changes})  # type: ignore[arg-type]


def dinov2_tower(**changes: object) -> Dinov2Tower:
    return Dinov2Tower(**{"view_px": 32, "patch_px": 8, "position_grid": 7, **VIT, **changes})  # type: ignore[arg-type]


def test_normalise_takes_bytes_and_leaves_floats_alone() -> None:
    black, white = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert normalise(black)[0, :, 0, 0].tolist() == pytest.approx([-1.79226, -1.75210, -1.48022], abs=1e-4)
    assert normalise(white)[0, :, 0, 0].tolist() == pytest.approx([1.93034, 2.07488, 2.14590], abs=1e-4)
    assert normalise(VIEWS) is VIEWS
    assert white.max() == 255


def test_imagenet_statistics_replace_clips() -> None:
    white = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert clip_to_imagenet(white)[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_every_tower_gives_the_tokens_it_announces() -> None:
    clip, dino = clip_tower(), dinov2_tower()
    qformer = QFormerTower(
        view_px=32, patch_px=8, num_queries=5, width=12, layers=2, heads=2, mlp_dim=24, vit={**VIT, "mlp_dim": 32}
    )
    for tower in (clip, dino, qformer):
        assert tower(VIEWS).shape == (3, tower.num_tokens, tower.out_dim)
    convnext = ConvNextTower(input_px=32, depths=[1, 1], widths=[8, 12])
    assert convnext(VIEWS).shape == (3, convnext.map_side, convnext.map_side, 12) == (3, 4, 4, 12)


def test_clip_gives_all_tokens_after_the_last_norm() -> None:
    tokens = clip_tower()(VIEWS)
    assert tokens.mean(-1).abs().max() < 1e-5
    assert (tokens.var(-1, unbiased=False) - 1).abs().max() < 1e-2


def test_clip_activation_is_a_choice_of_two() -> None:
    torch.manual_seed(0)
    plain = clip_tower().eval()
    quick = clip_tower(activation="quick_gelu").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    quick.load_state_dict(plain.state_dict())
    assert (plain(VIEWS) - quick(VIEWS)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="choose gelu or quick_gelu"):
        clip_tower(activation="relu")


def test_clips_text_leftovers_are_kept_frozen_only_when_asked() -> None:
    text = {"embed_dim": 6, "context": 4, "vocab": 10, "width": 8}
    names = {name for name, p in clip_tower(text=text).named_parameters() if not p.requires_grad}
    assert len(names) == 7
    assert all(name.startswith("unused.") for name in names)
    assert not [name for name, _ in clip_tower().named_parameters() if name.startswith("unused.")]


def test_no_tower_has_buffers_that_a_checkpoint_could_not_fill() -> None:
    assert not list(clip_tower().buffers())
    assert not list(dinov2_tower().buffers())


def test_convnext_norms_share_one_epsilon_and_bad_sizes_are_named() -> None:
    tower = ConvNextTower(input_px=32, depths=[1, 1], widths=[8, 12])
    assert {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    with pytest.raises(ValueError, match=r"input_px=36 .* stride 8"):
        ConvNextTower(input_px=36, depths=[1, 1], widths=[8, 12])
    with pytest.raises(ValueError, match="one length"):
        ConvNextTower(input_px=32, depths=[1], widths=[8, 12])


def test_position_table_is_resized_by_the_offset_factor_and_keeps_the_class() -> None:
    tower = dinov2_tower().requires_grad_(False)
    stored = tower.tower.embeddings.position_embeddings
    table = tower.position_table()
    assert torch.equal(table[:, 0], stored[:, 0])
    square = stored[:, 1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
    by_size = nn.functional.interpolate(square, size=(4, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 16, -1)
    assert table[:, 1:].shape == by_size.shape
    assert not torch.allclose(table[:, 1:], by_size, atol=1e-4)


def test_position_table_is_reused_until_its_source_changes() -> None:
    tower = dinov2_tower().requires_grad_(False)
    first = tower.position_table()
    assert tower.position_table() is first
    other = dinov2_tower()
    tower.load_state_dict(other.state_dict())
    assert not torch.equal(tower.position_table(), first)
    with torch.no_grad():
        assert torch.equal(tower.position_table(), other.position_table())


def test_a_trainable_position_table_is_never_reused_and_gets_gradients() -> None:
    tower = dinov2_tower()
    tower(VIEWS).sum().backward()
    assert tower.tower.embeddings.position_embeddings.grad is not None
    assert tower.position_table() is not tower.position_table()


def test_a_grid_of_the_tables_own_size_takes_it_unchanged() -> None:
    tower = dinov2_tower(position_grid=4)
    assert tower.position_table() is tower.tower.embeddings.position_embeddings


def test_patches_that_do_not_fit_raise_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"view_px=30 .* patch_px=8"):
        grid_side(30, 8)


@pytest.mark.parametrize("make", [clip_tower, dinov2_tower])
def test_towers_in_bfloat16_take_float_views(make: type) -> None:
    assert make().to(torch.bfloat16)(VIEWS).dtype == torch.bfloat16
