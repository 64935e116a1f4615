"""Ovis' published names (llm.*, visual_tokenizer.*, vte.weight) and ours.

One table of rules for versions 1.0, 1.5 and 1.6; source: reference/ovis.md, section 1.1, and the manifests of the three
published models of 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter, Report, Rule
from bestiary.variants.hf_folder import HfFolder, read_object
from bestiary.variants.hf_layout import NO_ROTATION
from bestiary.variants.ovis import config_json
from bestiary.variants.ovis.model import decoder_config
from bestiary.variants.ovis.visual_tokenizer import OvisVision

OVIS_RULES = (
    Rule("llm.{rest}", ("decoder.{rest}",)),
    Rule("visual_tokenizer.backbone.vision_model.{rest}", ("vision.backbone.{rest}",)),
    Rule("visual_tokenizer.head.{i}.{p}", ("vision.head.{i}.{p}",)),
    Rule("vte.weight", ("vision.table.weight",)),
)
OVIS = Converter(OVIS_RULES)


def to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors under our names."""
    return OVIS.to_ours(state, head_dim=NO_ROTATION)


def to_reference(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors (a state, or gradients) under the published names."""
    return OVIS.to_reference(state, head_dim=NO_ROTATION)


def manifest(model: MultimodalLM) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model of any size, also on the meta device."""
    return OVIS.manifest(model, head_dim=NO_ROTATION)


def load_reference(model: MultimodalLM, state: Mapping[str, torch.Tensor], *, may_lack: Sequence[str] = ()) -> Report:
    """Put published tensors into the model, strictly; `may_lack` as in `conversion.load_state`."""
    return OVIS.load_reference(model, state, head_dim=NO_ROTATION, may_lack=may_lack)


def load_published(model: MultimodalLM, folder: str | Path, *, may_lack: Sequence[str] = ()) -> Report:
    """Put a published Hugging Face folder into the model, strictly; its config.json must tell of the same model.

    An output head that is the embedding (tie_word_embeddings) may be missing from the files.
    """
    path = Path(folder)
    opened = HfFolder(path)
    check_config(model, path)
    state = {ours: value for name in opened.shapes for ours, value in to_ours({name: opened.whole(name)}).items()}
    if "decoder.lm_head.weight" not in state and getattr(model.decoder.config, "tie_word_embeddings", False):
        state["decoder.lm_head.weight"] = state["decoder.model.embed_tokens.weight"]
    names = {name for name in state if not name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids"))}
    return load_reference(model, to_reference({name: state[name] for name in names}), may_lack=may_lack)


def check_config(model: MultimodalLM, folder: Path) -> None:
    """Raise where config.json beside weights tells of another Ovis, also in what no tensor shows (heads ...)."""
    if not (folder / "config.json").is_file():
        return
    vision = model.vision
    assert isinstance(vision, OvisVision)
    raw = read_object(folder / "config.json")
    told = config_json.completed(raw, manifest(model))
    version = config_json.version_of(told)
    own = config_json.config_of(model, chat_format="qwen", version=version, adaptive=False, max_length=0)
    theirs = {
        "llm_config": config_json.decoder_words(decoder_config(**config_json.decoder_arguments(told))),
        "visual_tokenizer_config": _words(config_json.vision_arguments(told)),
    }
    ours = {"llm_config": own["llm_config"], "visual_tokenizer_config": _words(config_json.vision_arguments(own))}
    if "num_attention_heads" not in (raw.get("llm_config") or {}):  # no config.json of a decoder: its sizes are enough
        del theirs["llm_config"]
    if "num_attention_heads" not in ((raw.get("visual_tokenizer_config") or {}).get("backbone_config") or {}):
        del theirs["visual_tokenizer_config"]["heads"]
    for part, words in theirs.items():
        for word, value in words.items():
            if ours[part].get(word) != value:
                raise ValueError(
                    f"{folder / 'config.json'} says {part}.{word}={value} but the model has {ours[part].get(word)}; "
                    "name the model and scale that these weights are of, or the model.yaml that an import writes"
                )


def _words(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the visual tokenizer, the backbone's beside the others; tau is a schedule's, not a size."""
    return {name: value for name, value in {**vision, **vision["backbone"]}.items() if name not in ("backbone", "tau")}
