"""Ovis' published folders as `bestiary weights` sees them: config.json, bin or safetensors shards, tokenizer, pictures.

    config.json  generation_config.json  preprocessor_config.json  tokenizer.json ...
    model-00001-of-00004.safetensors ... + index, or pytorch_model-00001-of-00004.bin ... + index

A folder that was imported is given back as it was; a model that never was one gets these files from its configuration.
Source: reference/ovis.md, section 1.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.conversion import Converter
from bestiary.variants.hf_layout import NO_ROTATION, HfLayout, json_text
from bestiary.variants.layouts import FirstExport, Shapes
from bestiary.variants.ovis import config_json
from bestiary.variants.ovis.formatters import format_named
from bestiary.variants.ovis.model import build_ovis
from bestiary.variants.ovis.temperature import tau_at_step, tau_ends
from bestiary.variants.ovis.visual_tokenizer import OvisVision
from bestiary.variants.ovis.weights import OVIS, manifest

TIED = {"llm.lm_head.weight": config_json.EMBEDDING}
DERIVED = re.compile(
    r"llm\.model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|visual_tokenizer\.backbone\.vision_model\.embeddings\.position_ids"
)
"""Tables that older files carry along and every model computes by itself."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OvisModel:
    """Ovis of any version and size: its config.json and tensors say which."""

    key: str = "ovis"
    name: str = "ovis"
    key_word: str = "model_type"
    converter: Converter = OVIS
    embedding: str = config_json.EMBEDDING
    derived: re.Pattern[str] = DERIVED
    allows_spare_ids: bool = True
    begins: str = ""

    @property
    def identity(self) -> Mapping[str, str]:
        """Nothing: its config.json says it all."""
        return {}

    def expected(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of a whole checkpoint of this config.json; tied ones only where they are there."""
        told = config_json.completed(config, shapes)
        with torch.device("meta"):
            model = build_ovis(
                vision=config_json.vision_arguments(told), decoder=config_json.decoder_arguments(told), attention="sdpa"
            )
        tied = self.tied(shapes, config)
        return {name: shape for name, shape in manifest(model).items() if name not in tied}

    def tied(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
        """The output head where it is the embedding and the files do not hold it twice."""
        told = config.get("llm_config") or {}
        return {n: at for n, at in TIED.items() if told.get("tie_word_embeddings") and n not in shapes}

    def head_dim(self, shapes: Shapes, config: Mapping[str, Any]) -> int:
        """No tensor's rows are ordered by heads."""
        return NO_ROTATION

    def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Version, decoder, backbone and visual vocabulary."""
        told = config_json.completed(config, shapes)
        decoder, vision = config_json.decoder_arguments(told), config_json.vision_arguments(told)
        backbone = vision["backbone"]
        return [
            ("version", f"{config_json.version_of(told)}, {vision['tokenize']}"),
            (
                "decoder",
                f"{decoder['family']}, {decoder['num_hidden_layers']} layers of {decoder['hidden_size']:,}, "
                f"vocabulary {decoder['vocab_size']:,}",
            ),
            (
                "vision",
                f"{backbone['kind']}, {backbone['layers']} layers of {backbone['width']:,}, {backbone['image_px']} px, "
                f"{vision['vocab_size']:,} visual words",
            ),
        ]


OVIS_MODEL = OvisModel()


class OvisLayout(HfLayout):
    """Hugging Face folders whose config.json says model_type ovis."""

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """By its model_type."""
        return config.get("model_type") == "ovis"

    def require(self, config: Mapping[str, Any]) -> None:
        """The heads of decoder and backbone."""
        config_json.require_heads(config)

    def knows(self, names: Mapping[str, object]) -> bool:
        """Whether tensors have Ovis' names."""
        return any(name.startswith(("llm.", "vte.", "visual_tokenizer.")) for name in names)

    def config_of_list(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """config.json out of a list of names and shapes, as far as it says."""
        backbone = {"backbone_config": dict(told.get("_clip_config") or told.get("_backbone_config") or {})}
        return {"llm_config": dict(told.get("_llm_config") or {}), "visual_tokenizer_config": backbone}

    def tokenizer(self, path: Path, side_files: Mapping[str, Path]) -> Path | None:
        """The folder itself, whose chat tokens a tokenizer.model beside it may not have."""
        return path if any(name in side_files for name in ("tokenizer.json", "vocab.json")) else None

    def model_of(
        self, names: Mapping[str, object], side_files: Mapping[str, Path], may_lack: Sequence[str] = ()
    ) -> OvisModel:
        """There is one."""
        return OVIS_MODEL

    def model_called(self, key: str) -> OvisModel:
        """There is one."""
        if key != OVIS_MODEL.key:
            raise ValueError(f"published.json names the model {key!r}, which is not {OVIS_MODEL.key}")
        return OVIS_MODEL

    def node(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What conf/model would say of it."""
        return config_json.model_node(config_json.completed(config, shapes))

    def first_export(self, run: Run, model: MultimodalLM, *, step: int) -> FirstExport | None:
        """The side files of a model that was never imported, made of its run's configuration."""
        if not isinstance(model.vision, OvisVision):
            return None
        if model.vision.connector != "table":
            raise ValueError(f"a model with connector={model.vision.connector} has no published layout; only Ovis' has")
        told = run.model.processor
        words = {"version": str(told["version"]), "chat_format": str(told["chat_format"])}
        config = config_json.config_of(
            model, **words, adaptive=bool(told.get("adaptive", False)), max_length=run.data.max_tokens
        )
        if model.vision.tokenize == "gumbel_argmax" and step:  # annealed; the last step's stays, as published
            asked = {name: run.model.module.get(name) for name in ("max_tau", "min_tau")}
            ends = dict(zip(asked, tau_ends(**asked), strict=True))
            config["visual_tokenizer_config"]["tau"] = tau_at_step(step - 1, run.stage.max_steps, **ends)
        folder = Path(told["tokenizer"])
        tokenizer = load_tokenizer(folder)
        stops = [tokenizer.encode(token)[0] for token in format_named(words["version"], words["chat_format"]).stops]
        config["llm_config"]["eos_token_id"] = stops[0]
        texts = {
            "config.json": config,
            "generation_config.json": {"do_sample": False, "eos_token_id": stops},
            "preprocessor_config.json": config_json.preprocessor_of(model.vision),
        }
        files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        return FirstExport(
            OVIS_MODEL.key, "ovis-safetensors", NO_ROTATION, {n: json_text(told) for n, told in texts.items()}, files
        )


OVIS_LAYOUT = OvisLayout("ovis")
"""What `bestiary.weights.layouts` lists."""
