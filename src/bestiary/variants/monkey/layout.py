"""Monkey's and Qwen-VL's published folders as `bestiary weights` sees them.

    config.json  generation_config.json  tokenizer_config.json  qwen.tiktoken  *.py (kept, never run)
    model-00001-of-00002.safetensors ... + index, or pytorch_model-00001-of-00002.bin ... + index

A Qwen-VL is the beginning of a Monkey of any grid: the windows' adapters are not in it. A folder that was imported is
given back as it was; a model that never was one gets these files from its configuration.
Source: reference/monkey.md, sections 2, 3.1 and 3.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.text.qwen_tokenizer import FILE_NAME, QwenTokenizer
from bestiary.variants.conversion import Converter
from bestiary.variants.hf_folder import read_object
from bestiary.variants.hf_layout import NO_ROTATION, HfLayout, json_text
from bestiary.variants.layouts import FirstExport, Shapes
from bestiary.variants.monkey import config_json
from bestiary.variants.monkey.decoder import QwenDecoder, qwen_config
from bestiary.variants.monkey.model import MonkeyVision, build_monkey, grid_identity
from bestiary.variants.monkey.tags import IMAGE_START
from bestiary.variants.monkey.weights import DERIVED, MONKEY, manifest


@dataclass(frozen=True, slots=True)
class MonkeyModel:
    """Monkey or Qwen-VL of any size: config.json and tensors say which. identity: the grid its adapters are for."""

    key: str
    name: str
    begins: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    key_word: str = "model_type"
    converter: Converter = MONKEY
    embedding: str = config_json.EMBEDDING
    derived: re.Pattern[str] = DERIVED
    allows_spare_ids: bool = True

    def expected(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of a whole checkpoint of these sizes; the decoder's adapters where it has any."""
        arguments = config_json.build_arguments(config_json.completed(config, shapes), shapes)
        with torch.device("meta"):
            return manifest(build_monkey(**arguments, attention="sdpa"))

    def tied(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
        """None: every tensor is in the files."""
        return {}

    def head_dim(self, shapes: Shapes, config: Mapping[str, Any]) -> int:
        """No tensor's rows are ordered by heads."""
        return NO_ROTATION

    def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Decoder, ViT, resampler, windows and adapters."""
        told = config_json.build_arguments(config_json.completed(config, shapes), shapes)
        decoder, vision, lora = told["decoder"], told["vision"], told["decoder_lora"]
        adapters = vision["adapters"]
        ranks = adapters and f"ranks {adapters['attention_rank']} and {adapters['mlp_rank']}"
        words = [f"{len(config_json.window_numbers(shapes))} windows, {ranks}"] if ranks else ["no window"]
        words += [f"decoder, rank {lora['rank']}"] if lora else []
        size = " x ".join(map(str, vision["image_px"])) if config_json.visual_of(config).get("image_size") else "unsaid"
        return [
            (
                "decoder",
                f"{decoder['num_hidden_layers']} layers of {decoder['hidden_size']:,}, "
                f"vocabulary {decoder['vocab_size']:,}",
            ),
            (
                "vision",
                f"{vision['layers']} layers of {vision['width']:,}, {vision['num_queries']} queries a view, "
                f"picture {size} px",
            ),
            ("adapters", "; ".join(words)),
        ]


@dataclass(frozen=True, slots=True)
class DecoderAdapters(MonkeyModel):
    """The tensors that the variant for small GPUs adds to a Monkey, alone (section 3.4)."""

    def expected(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Those of a decoder of this size."""
        with torch.device("meta"):
            sizes = qwen_config(**config_json.adapted_decoder(shapes))
            model = MultimodalLM(QwenDecoder(sizes, attention="sdpa", lora=config_json.decoder_lora(shapes)))
        return {name: shape for name, shape in manifest(model).items() if config_json.only_decoder_adapters([name])}

    def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Rank and what they stand beside."""
        sizes, lora = config_json.adapted_decoder(shapes), config_json.decoder_lora(shapes)
        assert lora is not None
        beside = f"beside {sizes['num_hidden_layers']} layers of {sizes['hidden_size']:,}"
        return [("adapters", f"decoder, rank {lora['rank']}, {beside}; a Monkey's other tensors are not in it")]


MONKEY_MODEL = MonkeyModel(config_json.MONKEY_TYPE, "monkey")
QWEN_VL_MODEL = MonkeyModel(
    config_json.QWEN_TYPE,
    "qwen_vl",
    begins="a Monkey of any grid of windows, whose adapters are not in it and start as no-ops",
)


DECODER_ADAPTERS = DecoderAdapters("monkey_decoder_adapters", "adapters of monkey's decoder")


class MonkeyLayout(HfLayout):
    """Hugging Face folders whose config.json says model_type monkey, or qwen with a visual part."""

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """By its model_type."""
        return config.get("model_type") == config_json.MONKEY_TYPE or config_json.is_qwen_vl(config)

    def require(self, config: Mapping[str, Any]) -> None:
        """Heads and the picture's size."""
        config_json.require_heads(config)

    def knows(self, names: Mapping[str, object]) -> bool:
        """Whether tensors have Qwen-VL's names, or those of its decoder's adapters."""
        return any(name.startswith(("transformer.visual.", "transformer.h.")) for name in names)

    def config_of_list(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: the published lists have names and shapes alone."""
        return {}

    def tokenizer(self, path: Path, side_files: Mapping[str, Path]) -> Path | None:
        """qwen.tiktoken."""
        return side_files.get(FILE_NAME)

    def model_of(
        self, names: Mapping[str, object], side_files: Mapping[str, Path], may_lack: Sequence[str] = ()
    ) -> MonkeyModel:
        """What config.json says; without one by the adapters, which Qwen-VL lacks."""
        if config_json.only_decoder_adapters(names):
            return DECODER_ADAPTERS
        config = read_object(side_files["config.json"]) if "config.json" in side_files else {}
        windows = config_json.window_numbers(names)
        if config_json.is_qwen_vl(config) or not (config or windows):
            return QWEN_VL_MODEL
        image_size = config_json.visual_of(config).get("image_size")
        if not windows or image_size is None:
            return MONKEY_MODEL
        shapes = {name: shape for name, shape in names.items() if isinstance(shape, Sequence)}
        visual = config_json.completed(config, shapes)["visual"]
        height, width = visual["image_size"]
        return replace(MONKEY_MODEL, identity=grid_identity(height, width, visual["window"]))

    def model_called(self, key: str) -> MonkeyModel:
        """Monkey or Qwen-VL."""
        for model in (MONKEY_MODEL, QWEN_VL_MODEL, DECODER_ADAPTERS):
            if model.key == key:
                return model
        raise ValueError(f"published.json names the model {key!r}, which is neither monkey nor qwen")

    def node(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What conf/model would say of a Monkey; a Qwen-VL is none yet."""
        if config_json.is_qwen_vl(config) or not config:
            return None
        return config_json.model_node(config_json.completed(config, shapes), shapes)

    def first_export(self, run: Run, model: MultimodalLM, *, step: int) -> FirstExport | None:
        """The side files of a model that was never imported, made of its run's configuration."""
        if not isinstance(model.vision, MonkeyVision):
            return None
        tokenizer = QwenTokenizer(run.model.processor["tokenizer"])
        end = tokenizer.eos_id
        texts = {
            "config.json": config_json.config_of(model, image_start_id=tokenizer.control_id(IMAGE_START)),
            "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": end},
            "tokenizer_config.json": {
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
                "clean_up_tokenization_spaces": True,
                "model_max_length": run.data.max_tokens,
                "padding_side": "right",
                "tokenizer_class": "QWenTokenizer",
            },
        }
        written = {name: json_text(told) for name, told in texts.items()}
        return FirstExport(MONKEY_MODEL.key, "monkey-safetensors", NO_ROTATION, written, {FILE_NAME: tokenizer.path})


MONKEY_LAYOUT = MonkeyLayout("monkey")
"""What `bestiary.weights.layouts` lists."""
