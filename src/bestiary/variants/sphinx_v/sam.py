"""Segment Anything's prompt encoder as the beginning of SPHINX-V's: transformers' layout and the released .pth.

Draw-and-Understand commit 28a1bd1 copies these five tensors of sam_vit_h_4b8939.pth when the model is built; image
encoder and mask decoder are not used, SPHINX-V's other prompt parts begin at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bestiary.variants.conversion import Converter, Rule
from bestiary.variants.parts import Part, size
from bestiary.variants.sphinx_v.prompt_encoder import SAM_NAMES, PromptEncoder

TARGET = "regions.encoder"
_TRANSFORMERS = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    **{f"prompt_encoder.point_embeddings.{n}.weight": f"prompt_encoder.point_embed.{n}.weight" for n in range(4)},
}
"""The released file's names and transformers'."""
_KEPT = "|".join(f"{TARGET}.{ours}".replace(".", r"\.") for ours in SAM_NAMES.values())


def _build(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> nn.Module:
    return PromptEncoder(2 * size(shapes, f"{TARGET}.gaussian", 2)[1])


def _part(names: Mapping[str, str], sign: str, types: tuple[str, ...]) -> Part:
    """names: published name -> ours inside the prompt encoder."""
    kept = "|".join(name.replace(".", r"\.") for name in names)
    return Part(
        "Segment Anything",
        TARGET,
        ("", sign),
        Converter(tuple(Rule(theirs, (f"{TARGET}.{ours}",)) for theirs, ours in names.items())),
        _build,
        types=types,
        dropped=rf"(?!(?:{kept})$)(?:image_encoder|vision_encoder|mask_decoder|prompt_encoder)\..+",
        keep=_KEPT,
    )


SAM_PARTS = (
    _part(SAM_NAMES, next(iter(SAM_NAMES)), ()),
    _part(
        {_TRANSFORMERS[name]: ours for name, ours in SAM_NAMES.items()}, next(iter(_TRANSFORMERS.values())), ("sam",)
    ),
)
"""Both layouts of Segment Anything's weights."""
