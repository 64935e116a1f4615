"""SPHINX-V: SPHINX-1K that also sees points and boxes drawn on the picture.

Nothing is added to SPHINX but the rows of the prompts between the picture and the text.
Source: Draw-and-Understand commit 28a1bd1, class `llama_ens5_vp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bestiary.language.attention import Attention
from bestiary.mllm import MultimodalLM
from bestiary.variants.sphinx.model import build_decoder, build_vision
from bestiary.variants.sphinx_v.prompt_encoder import PromptRows


def build_sphinx_v(
    *,
    vision: Mapping[str, Any],
    decoder: Mapping[str, Any],
    prompt_dim: int = 256,
    num_slots: int = 10,
    attention: Attention = "auto",
    reference_quirks: bool = False,
) -> MultimodalLM:
    """SPHINX-V from plain sizes; reads no files.

    vision: arguments of `SphinxVision` but out_dim. decoder: arguments of `llama_config`.
    prompt_dim: width of the prompt encoder, 256 in the published weights. num_slots: see `PromptRows`.
    reference_quirks: the published code's float16 rounding before each resize.
    """
    return MultimodalLM(
        decoder=build_decoder(decoder, attention),
        vision=build_vision(vision, out_dim=decoder["dim"], reference_quirks=reference_quirks),
        regions=PromptRows(out_dim=decoder["dim"], dim=prompt_dim, num_slots=num_slots),
    )
