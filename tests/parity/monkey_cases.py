"""Monkey's golden cases: models with their weights, the examples of their ids and pictures, and Qwen's vocabulary."""

from __future__ import annotations

import lzma
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE, Batch, Example, Slot
from bestiary.variants.monkey import weights
from bestiary.variants.monkey.model import MonkeyVision, build_monkey
from bestiary.vision.resize import resize_bicubic
from data_modules.collate import collate_rows
from tests.parity.cases import has, read_json, read_tensors

PICTURES = {"text_only": (), "one_image": (0,), "two_images": (1, 2)}
"""The pictures of each sequence, in order; a batch holds the three of them (the goldens' README)."""
_VOCABULARY = Path(__file__).parents[1] / "vocabularies" / "qwen.tiktoken.xz"


def is_model_case(folder: Path) -> bool:
    """A whole model with its inputs and outputs."""
    if not has("config.json", "weights.safetensors", "io.safetensors")(folder):
        return False
    return "visual" in read_json(folder / "config.json")


def is_lora_case(folder: Path) -> bool:
    """The decoder's adapters for the model beside it."""
    return folder.name.endswith("llm_lora") and has("weights.safetensors", "io.safetensors")(folder)


class Case:
    """A golden model; adapters: the folder of the decoder's adapters, which are added to it."""

    def __init__(self, folder: Path, adapters: Path | None = None) -> None:
        self.config = read_json(folder / "config.json")
        self.scalars = self.config["scalars"]
        self.visual = self.config["visual"]
        self.io = read_tensors(folder / "io.safetensors")
        self.state = {name: tensor.float() for name, tensor in read_tensors(folder / "weights.safetensors").items()}
        self.has_decoder_adapters = adapters is not None
        if adapters is not None:
            extra = read_tensors(adapters / "weights.safetensors")
            self.state |= {name: tensor.float() for name, tensor in extra.items()}
        self.model = self.fresh_model()

    def fresh_model(self, **changes: Any) -> MultimodalLM:
        """The model with the golden's weights, in evaluation mode."""
        config = self.config
        decoder: dict[str, Any] = {
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"] // 2,
            "num_hidden_layers": config["num_hidden_layers"],
            "num_attention_heads": config["num_attention_heads"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": 8192,
            "rms_norm_eps": config["layer_norm_epsilon"],
            "rope_theta": config["rotary_emb_base"],
        }
        settings: dict[str, Any] = {
            "seq_length": config["seq_length"],
            "dynamic_ntk": config["use_dynamic_ntk"],
            "logn_attention": config["use_logn_attn"],
            "decoder_lora": self._decoder_lora() if self.has_decoder_adapters else None,
        }
        model = build_monkey(vision=self._vision(), decoder=decoder, **(settings | changes))
        report = weights.load_reference(model, self.state)
        assert not report.missing and not report.unexpected
        return model.eval()

    @property
    def vision(self) -> MonkeyVision:
        """The visual part."""
        assert isinstance(self.model.vision, MonkeyVision)
        return self.model.vision

    def pixels(self, picture: int) -> np.ndarray:
        """A golden's picture as the canvas, uint8[3, height, width]."""
        height, width = self.visual["image_size_hw"]
        source = self.io[f"image{picture}.uint8_hwc"].numpy()
        # The goldens were made with a Pillow that picks its passes.
        return resize_bicubic(source, (width, height), passes="pillow").transpose(2, 0, 1)

    def example(self, name: str, ids: Tensor, labels: Tensor | None = None) -> Example:
        """A sequence of the golden; what stands between its image tags is rows here."""
        tags = self.config["image_token_ids"]
        inside = (ids == tags["start"]).cumsum(0) - (ids == tags["end"]).cumsum(0)
        is_row = (inside > 0) & (ids != tags["start"])
        canvases = [self.pixels(picture) for picture in PICTURES[name]]
        none = np.zeros((0, 3, 1, 1), np.uint8)
        return Example(
            ids=ids.masked_fill(is_row, 0).long().numpy(),
            labels=(torch.full_like(ids, IGNORE) if labels is None else labels).long().numpy(),
            slots=np.where(is_row.numpy(), Slot.IMAGE, Slot.TEXT).astype(np.uint8),
            pixels=np.stack(canvases) if canvases else none,
            regions=None,
            num_views=len(canvases) * self.vision.num_views,
            key=name,
            source="golden",
            domain="golden",
        )

    def alone(self, name: str) -> Batch:
        """One sequence of the golden."""
        return collate_rows([[self.example(name, self.io[f"{name}.input_ids"])]])

    def examples(self, form: str) -> list[Example]:
        """The three sequences of `train` (right-padded in the golden) or `gen` (left-padded), without padding."""
        made = []
        for row, name in enumerate(PICTURES):
            real = self.io[f"{form}.attention_mask"][row].bool()
            labels = self.io[f"{form}.labels"][row][real] if f"{form}.labels" in self.io else None
            made.append(self.example(name, self.io[f"{form}.input_ids"][row][real], labels))
        return made

    def train_batch(self) -> Batch:
        """One row for each."""
        return collate_rows([[example] for example in self.examples("train")])

    def _vision(self) -> dict[str, Any]:
        visual = self.visual
        ranks = {"attention_rank": self._rank("attn.in_proj_lora.0"), "mlp_rank": self._rank("mlp_lora.0")}
        return {
            "image_px": visual["image_size_hw"],
            "window_px": visual["window"],
            "patch_px": visual["patch_size"],
            "width": visual["width"],
            "layers": visual["layers"],
            "heads": visual["heads"],
            "mlp_dim": int(visual["width"] * visual["mlp_ratio"]),
            "num_queries": visual["n_queries"],
            "adapters": {**ranks, "dropout": 0.0},
        }

    def _rank(self, place: str) -> int:
        return len(self.state[f"transformer.visual.transformer.resblocks.0.{place}.lora_a.weight"])

    def _decoder_lora(self) -> dict[str, Any]:
        return {"rank": len(self.state["transformer.h.0.attn.c_attn_lora.lora_a.weight"]), "dropout": 0.0}


@lru_cache(maxsize=8)
def load_case(folder: Path) -> Case:
    """The case of a folder, and that of the model beside it with its decoder's adapters."""
    if not is_lora_case(folder):
        return Case(folder)
    name = folder.name.removesuffix("llm_lora")
    return Case(folder.with_name(f"{name}model"), adapters=folder)


def vocabulary(folder: Path) -> Path:
    """Qwen's published vocabulary, uncompressed into `folder` unless $BESTIARY_QWEN_TIKTOKEN names it."""
    if given := os.environ.get("BESTIARY_QWEN_TIKTOKEN"):
        return Path(given)
    path = folder / "qwen.tiktoken"
    path.write_bytes(lzma.decompress(_VOCABULARY.read_bytes()))
    return path


def names_of(tensors: Sequence[str], end: str) -> list[str]:
    """Names of the golden sequences that have a tensor of this name."""
    return [name for name in PICTURES if f"{name}.{end}" in tensors]
