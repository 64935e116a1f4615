"""A SPHINX(-V) of a few thousand parameters: 48 px canvas, three views of 24 px in 6 x 6 patches."""

from __future__ import annotations

from typing import Any

VIT = {"width": 8, "layers": 1, "heads": 2}

VISION: dict[str, Any] = {
    "canvas_px": 48,
    "view_px": 24,
    "patch_px": 4,
    "views": ["whole", [0, 1], [1, 0]],
    "clip": {**VIT, "mlp_dim": 16},
    "convnext": {"input_px": 24, "depths": [1, 1], "widths": [4, 6]},
    "dinov2": {**VIT, "position_grid": 5},
    "qformer": {
        "num_queries": 3,
        "width": 8,
        "layers": 2,
        "heads": 2,
        "mlp_dim": 16,
        "vit": {**VIT, "mlp_dim": 16},
    },
}

DECODER: dict[str, Any] = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 50,
    "multiple_of": 8,
    "max_seq_len": 400,
}

TEXT = {"embed_dim": 6, "context": 4, "vocab": 10, "width": 8}
