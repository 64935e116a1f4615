"""A SPHINX-V of a few thousand parameters that a session can talk to, and its yaml."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bestiary.inference.session import Session
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.processor import SphinxVProcessor

from ..variants.sphinx_tiny import DECODER, VISION

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests/goldens/sphinxv/data/tokenizer.model"
PROMPTS = {"prompt_dim": 8, "num_slots": 4}


def decoder_sizes() -> dict[str, Any]:
    """Of a decoder with as many ids as the tokenizer has pieces."""
    return {**DECODER, "vocab_size": load_tokenizer(TOKENIZER).vocab_size}


@lru_cache
def tiny_session(seed: int = 0) -> Session:
    """A session with an untrained model; its answers are noise, but always the same noise."""
    torch.manual_seed(seed)
    model = build_sphinx_v(vision=VISION, decoder=decoder_sizes(), **PROMPTS)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(8)  # far from even odds, so that rounding decides nothing
    layout = {name: value for name, value in model.layout.items() if name != "num_slots"}
    processor = SphinxVProcessor(tokenizer=str(TOKENIZER), max_tokens=400, num_slots=4, **layout)
    return Session(model.eval(), processor)


def tiny_node() -> dict[str, Any]:
    """The model node a yaml would have for it."""
    return {
        "name": "tiny",
        "build": {
            "_target_": "bestiary.variants.sphinx_v.model.build_sphinx_v",
            "vision": VISION,
            "decoder": decoder_sizes(),
            **PROMPTS,
        },
        "processor": {
            "_target_": "bestiary.variants.sphinx_v.processor.SphinxVProcessor",
            "tokenizer": str(TOKENIZER),
        },
        "module": {"_target_": "bestiary.variants.sphinx_v.module.SphinxVModule"},
    }
