"""The published sizes of SPHINX(-1K, -V) 13B as builder arguments (sphinx report sections 1 to 3)."""

from __future__ import annotations

from typing import Any

from tests.parity.sphinx_sizes import views_of

PAPER_DECODER: dict[str, Any] = {
    "dim": 5120,
    "n_layers": 40,
    "n_heads": 40,
    "vocab_size": 32000,
    "multiple_of": 256,
    "max_seq_len": 4096,
}


def paper_vision(canvas_px: int = 448) -> dict[str, Any]:
    """CLIP ViT-L/14, ConvNeXt-XXL, DINOv2 ViT-g/14, BLIP-2 ViT-g with its Q-Former."""
    return {
        "canvas_px": canvas_px,
        "view_px": 224,
        "patch_px": 14,
        "views": views_of(canvas_px),
        "clip": {
            "width": 1024,
            "layers": 24,
            "heads": 16,
            "mlp_dim": 4096,
            "text": {"embed_dim": 768, "context": 77, "vocab": 49408, "width": 768},
        },
        "convnext": {"input_px": 256, "depths": [3, 4, 30, 3], "widths": [384, 768, 1536, 3072]},
        "dinov2": {"width": 1536, "layers": 40, "heads": 24},
        "qformer": {
            "num_queries": 32,
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "vit": {"width": 1408, "layers": 39, "heads": 16, "mlp_dim": 6144},
        },
    }
