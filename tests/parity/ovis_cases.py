"""Ovis' golden cases: files as they are or compressed by xz, the sizes in their config.json, and their samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bestiary.mllm import MultimodalLM
from bestiary.schema import Sample, Turn
from bestiary.variants.ovis import weights
from bestiary.variants.ovis.model import build_ovis
from bestiary.variants.ovis.processor import OvisProcessor
from bestiary.variants.ovis.visual_tokenizer import BACKBONES, OvisVision
from tests.parity.cases import find_file, has, read_json, read_tensors

DECODER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)
VERSIONS = {"v10": "1.0", "v15": "1.5", "v16": "1.6"}


def above(folder: Path, name: str) -> Path:
    """The nearest place of that name in a folder or above it."""
    return next(up / name for up in (folder, *folder.parents) if (up / name).exists())


def is_model_case(folder: Path) -> bool:
    """A model of a version that we build, with its inputs and outputs."""
    if not has("config.json", "weights.safetensors", "inputs.safetensors", "results.json")(folder):
        return False
    tokenizer = read_json(folder / "config.json").get("visual_tokenizer_config", {})
    return str(tokenizer.get("model_type", "")).partition("_")[0] in BACKBONES


def tensor_names(folder: Path, function: str) -> set[str]:
    """Names of the golden tensors of a tokenize function, without its name in front."""
    return set(_outputs(folder, function))


def functions(folder: Path) -> list[str]:
    """The tokenize functions that a case has results and tensors for."""
    return [name for name in read_json(folder / "results.json")["results"] if _outputs(folder, name)]


@lru_cache(maxsize=16)
def _outputs(folder: Path, function: str) -> dict[str, Tensor]:
    if find_file(folder / f"outputs_{function}.safetensors") is not None:
        return read_tensors(folder / f"outputs_{function}.safetensors")
    if find_file(folder / "outputs.safetensors") is None:
        return {}
    tensors = read_tensors(folder / "outputs.safetensors")
    own = {name.removeprefix(f"{function}."): x for name, x in tensors.items() if name.startswith(f"{function}.")}
    shared = {name: x for name, x in tensors.items() if "." not in name or name.startswith("grad.")}
    # What has no function's name in front belongs to the first one.
    return own | shared if function == next(iter(read_json(folder / "results.json")["results"])) else own


def vision_arguments(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `OvisVision` from a published visual_tokenizer_config."""
    kind = config["model_type"].partition("_")[0]
    return {
        "backbone": {
            "kind": kind,
            "image_px": backbone["image_size"],
            "patch_px": backbone["patch_size"],
            "width": backbone["hidden_size"],
            "layers": backbone["num_hidden_layers"],
            "heads": backbone["num_attention_heads"],
            "mlp_dim": backbone["intermediate_size"],
            "activation": backbone["hidden_act"],
        },
        "vocab_size": config["vocab_size"],
        "num_marks": 2 * config["use_indicators"] if "use_indicators" in config else 5,
        "num_views": 5 if config.get("hd_booster") else 1,
        "stride": config["hidden_stride"],
        "keep_class": kind == "clip" and not config["drop_cls_token"],
    }


class Case:
    """A golden, loaded once, with the model that carries its weights and the processor of its version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.results = read_json(folder / "results.json")
        self.inputs = read_tensors(folder / "inputs.safetensors")
        self.state = read_tensors(folder / "weights.safetensors")
        self.version = VERSIONS[self.results["case"].partition("_")[0]]
        self.tokenizer = above(folder, "tokenizers") / Path(self.results["tokenizer_dir"]).name
        self.model = self.fresh_model()

    def fresh_model(self, **quirks: bool) -> MultimodalLM:
        """The model with the golden's weights."""
        tokenizer, llm = self.config["visual_tokenizer_config"], self.config["llm_config"]
        model = build_ovis(
            vision=vision_arguments(tokenizer, tokenizer["backbone_config"]),
            decoder={"family": llm["model_type"], **{name: llm[name] for name in DECODER_SIZES}},
            **quirks,
        )
        report = weights.load_reference(model, self.state)
        assert len(report.matched) == len(self.state)
        return model

    @property
    def vision(self) -> OvisVision:
        """The visual part."""
        assert isinstance(self.model.vision, OvisVision)
        return self.model.vision

    def processor(self, **changes: Any) -> OvisProcessor:
        """The processor of the case."""
        settings = {
            "tokenizer": str(self.tokenizer),
            "version": self.version,
            "chat_format": self.tokenizer.name,
            "max_tokens": self.config["multimodal_max_length"],
            "adaptive": self.config["visual_tokenizer_config"].get("hd_booster") == "s2wrapper-adaptive",
            **self.model.layout,
        }
        return OvisProcessor(**(settings | changes))

    def samples(self) -> list[Sample]:
        """The golden's training samples as a shard would hold them."""
        return [self._sample(number, told) for number, told in enumerate(self.results["samples"])]

    def question(self, told: Mapping[str, Any]) -> Sample:
        """A golden's generation as a sample."""
        return Sample(
            str(told["image"]), "golden", "golden", (Turn("human", told["query"]),), self._images([told["image"]])
        )

    def outputs(self, function: str) -> dict[str, Tensor]:
        """The golden's tensors of a tokenize function, without its name in front."""
        return _outputs(self.folder, function)

    def num_tensors(self) -> list[int]:
        """Canvases of every sample as published: one of zeros for a text."""
        name = "num_images_train" if "num_images_train" in self.inputs else "num_tensors_train"
        return [int(count) for count in self.inputs[name]]

    def places(self) -> list[list[int]]:
        """Of every sample, where its own canvases are among the published ones."""
        starts = np.cumsum([0, *self.num_tensors()])
        has = [bool(told["images"]) for told in self.results["samples"]]
        return [list(range(a, b)) if h else [] for a, b, h in zip(starts, starts[1:], has, strict=False)]

    def _sample(self, number: int, told: Mapping[str, Any]) -> Sample:
        meta: dict[str, Any] = {}
        if told.get("caption") is not None:
            turns = (Turn("human", told["caption_template"]), Turn("assistant", told["caption"]))
            meta["data_format"] = "caption"
        else:
            said = told["conversation"]
            if said[0]["from"] == "system":
                meta["system"], said = said[0]["value"], said[1:]
            turns = tuple(Turn("human" if m["from"] == "human" else "assistant", m["value"]) for m in said)
        return Sample(str(number), "golden", "golden", turns, self._images(told["images"]), meta=meta)

    def _images(self, numbers: Sequence[int]) -> tuple[bytes, ...]:
        return tuple(png(self.inputs[f"image_{number}"].numpy()) for number in numbers)


@lru_cache(maxsize=8)
def load_case(folder: Path) -> Case:
    """The case of a folder, in evaluation mode."""
    case = Case(folder)
    case.model.eval()
    return case


def png(pixels_HWC: np.ndarray) -> bytes:
    """Pixels as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "png")
    return buffer.getvalue()


def normalised(pixels: Tensor, vision: OvisVision) -> Tensor:
    """Canvases uint8[N, 4 * W, S, S] as the published float[N, 3 * W, S, S]; missing views are infinite."""
    views, is_there = vision._views(pixels)
    views = torch.where(is_there[..., None, None, None] > 0, views, torch.inf)
    return views.flatten(1, 2)
