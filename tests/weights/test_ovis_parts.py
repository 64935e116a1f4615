"""Public weights of Ovis' parts: what transformers computes with them, our model computes after an import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from bestiary.mllm import MultimodalLM
from bestiary.training.parents import load_first_weights
from bestiary.variants.hf_folder import HfFolder
from bestiary.variants.ovis.config_json import decoder_arguments
from bestiary.variants.ovis.model import build_ovis, decoder_config
from bestiary.variants.ovis.visual_tokenizer import OvisVision
from bestiary.weights.layouts import PARTS
from bestiary.weights.parts import import_part, part_of

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SIZES, "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 64}
EYES = {**SIZES, "image_size": 24, "patch_size": 6}
TEXT = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def shaken(module: nn.Module) -> Any:
    """Random everywhere: biases, norms and tables, which begin as zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


DECODERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**DECODER, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    ),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, rms_norm_eps=1e-3)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)),
}
BACKBONES: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**EYES)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=EYES)),
}


def built(settings: tuple[str, ...]) -> MultimodalLM:
    """The model that the printed settings describe, other sizes as they are here."""
    torch.manual_seed(1)
    node: dict[str, Any] = {
        "vision": {"backbone": {"kind": "clip", "image_px": 24, "patch_px": 6, "width": 16, "layers": 2, "heads": 2,
                                "mlp_dim": 24}, "vocab_size": 20, "num_marks": 2},
        "decoder": {"family": "llama", **DECODER},
    }  # fmt: skip
    part: dict[str, Any] = {}
    for setting in settings:
        path, _, word = setting.removeprefix("model.build.").rpartition("=")
        *inner, name = path.split(".")
        part.setdefault(tuple(inner), {})[name] = parsed(word)
    for inner, words in part.items():
        target = node
        for step in inner[:-1]:
            target = target[step]
        target[inner[-1]] = words | ({"image_px": 24, "patch_px": 6} if inner[-1] == "backbone" else {})
    return build_ovis(**node, attention="sdpa").eval()


def parsed(word: str) -> Any:
    """A value of the command line."""
    import yaml

    value = yaml.safe_load(word)
    return float(value) if isinstance(value, str) and value.replace("e-", "").replace(".", "").isdigit() else value


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_a_public_decoder_gives_its_own_logits(tmp_path: Path, kind: str) -> None:
    theirs = shaken(DECODERS[kind]())
    theirs.save_pretrained(tmp_path / "in")
    done = import_part(tmp_path / "in", tmp_path / "out", model="ovis")
    assert done.target == "decoder" and not done.fit.missing and not done.fit.unexpected
    ours = built(done.settings)
    load_first_weights(ours, [str(tmp_path / "out")], {})
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        hidden = ours.decoder(ours.decoder.embed(ids), torch.arange(9).expand(2, -1))
        torch.testing.assert_close(ours.decoder.head(hidden), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_a_public_encoder_gives_its_own_last_layer(tmp_path: Path, kind: str) -> None:
    theirs = shaken(BACKBONES[kind]())
    theirs.save_pretrained(tmp_path / "in")
    done = import_part(tmp_path / "in", tmp_path / "out", model="ovis")
    assert done.target == "vision.backbone" and not done.fit.missing and not done.fit.unexpected
    ours = built(done.settings)
    load_first_weights(ours, [str(tmp_path / "out")], {})
    assert isinstance(ours.vision, OvisVision)
    views = torch.randn(2, 3, 24, 24)
    vision = getattr(theirs, "vision_model", theirs)
    with torch.no_grad():
        expected = vision(views, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(ours.vision._last_layer(views), expected, rtol=1e-4, atol=1e-5)


def test_both_spellings_of_a_rotation_mean_the_same_decoder() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    told = {"model_type": "llama", **DECODER}
    before = {**told, "rope_theta": 5e5, "rope_scaling": scaling}
    now = {**told, "rope_parameters": {"rope_theta": 5e5, **scaling}, "rope_scaling": None}
    arguments = [decoder_arguments({"llm_config": words}) for words in (before, now)]
    assert arguments[0] == arguments[1] and arguments[0]["rope_scaling"] == scaling
    assert decoder_config(**arguments[0]).rope_parameters == now["rope_parameters"]


def test_whose_part_an_encoder_is_must_be_said_where_two_models_have_it(tmp_path: Path) -> None:
    BACKBONES["clip"]().save_pretrained(tmp_path)
    folder = HfFolder(tmp_path)
    assert [part_of(folder, model).target for model in (None, "sphinx", "ovis")] == ["vision.clip"] * 2 + [
        "vision.backbone"
    ]
    with pytest.raises(ValueError, match=r"--for 'moneky' is none of .*ovis, sphinx"):
        part_of(folder, "moneky")
    assert {part.model for part in PARTS} >= {"sphinx", "ovis"}
