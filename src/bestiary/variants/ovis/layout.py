"""Ovis' published folders as `bestiary weights` sees them: config.json, bin or safetensors shards, tokenizer, pictures.

    config.json  generation_config.json  preprocessor_config.json  tokenizer.json ...
    model-00001-of-00004.safetensors ... + index, or pytorch_model-00001-of-00004.bin ... + index

A folder that was imported is given back as it was; a model that never was one gets these files from its configuration.
Source: reference/ovis.md, section 1.8.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.text.tokenizer import load_tokenizer
from bestiary.variants.conversion import Converter
from bestiary.variants.hf_folder import HfFolder, HfRecord, plan_hf, read_object, write_hf
from bestiary.variants.layouts import FirstExport, Published, Shapes, Source
from bestiary.variants.ovis import config_json
from bestiary.variants.ovis.formatters import format_named
from bestiary.variants.ovis.model import build_ovis
from bestiary.variants.ovis.visual_tokenizer import OvisVision
from bestiary.variants.ovis.weights import OVIS, manifest
from bestiary.variants.tensor_file import DTYPES

FORMATS = {"ovis-safetensors": "safetensors", "ovis-bin": "bin"}
OURS = ("published.json", "MANIFEST.json", "state.json", "model.yaml")
"""Files of our own folders, which no side file may take the place of."""
TIED = {"llm.lm_head.weight": config_json.EMBEDDING}
DERIVED = re.compile(
    r"llm\.model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|visual_tokenizer\.backbone\.vision_model\.embeddings\.position_ids"
)
"""Tables that older files carry along and every model computes by itself."""
_NO_ROTATION = 2
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
    embedding: str = config_json.EMBEDDING
    allows_spare_ids: bool = True

    @property
    def identity(self) -> Mapping[str, str]:
        """Nothing: its config.json says it all."""
        return {}

    @property
    def converter(self) -> Converter:
        """The rules of names."""
        return OVIS

    @property
    def derived(self) -> re.Pattern[str]:
        """Names of tables that a model computes by itself."""
        return DERIVED

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
        return _NO_ROTATION

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


class _Source:
    """A published folder as `bestiary.weights` reads it, see `layouts.Source`."""

    is_delta = False

    def __init__(self, folder: HfFolder) -> None:
        self._folder = folder
        self.path, self.file_bytes = folder.path, folder.file_bytes
        self.shapes, self.dtypes = folder.shapes, folder.dtypes
        self.layout, self.wrapped = f"ovis-{folder.format}", bool(folder.wrapped)
        self.unequal: list[str] = []

    @property
    def record(self) -> str:
        """What the files looked like."""
        return self._folder.record.to_json()

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, mapped."""
        return self._folder.whole(name)


class OvisLayout:
    """Hugging Face folders whose config.json says model_type ovis."""

    formats: tuple[str, ...] = tuple(FORMATS)

    def recognises(self, path: Path) -> bool:
        """By config.json, except where the folder is one of ours."""
        file = path / "config.json"
        if not file.is_file() or (path / "published.json").exists():
            return False
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # whoever opens it says what is wrong
            return False
        return isinstance(told, dict) and told.get("model_type") == "ovis"

    def knows(self, names: Mapping[str, object]) -> bool:
        """Whether tensors have Ovis' names."""
        return any(name.startswith(("llm.", "vte.", "visual_tokenizer.")) for name in names)

    def config_of_list(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """config.json out of a list of names and shapes, as far as it says."""
        backbone = {"backbone_config": dict(told.get("_clip_config") or told.get("_backbone_config") or {})}
        return {"llm_config": dict(told.get("_llm_config") or {}), "visual_tokenizer_config": backbone}

    def open(self, path: Path) -> Source:
        """All shards of the folder."""
        return _Source(HfFolder(path))

    def cut_dim(self, name: str) -> int | None:
        """Files hold whole tensors."""
        return None

    def side_files(self, path: Path) -> dict[str, Path]:
        """Every small file beside the weights."""
        found = HfFolder(path).side_files
        if taken := [name for name in OURS if name in found]:
            raise ValueError(f"{path} holds {taken[0]}, which is a file of our own folders; is it one already?")
        return found

    def tokenizer(self, path: Path, side_files: Mapping[str, Path]) -> Path | None:
        """The folder itself, whose chat tokens a tokenizer.model beside it may not have."""
        return path if any(name in side_files for name in ("tokenizer.json", "vocab.json")) else None

    def config(self, side_files: Mapping[str, Path]) -> dict[str, Any]:
        """config.json; ValueError where it leaves out what no tensor shows."""
        if "config.json" not in side_files:
            return {}
        told = read_object(side_files["config.json"])
        config_json.require_heads(told)
        return told

    def config_name(self, layout: str) -> str:
        """Always the same."""
        return "config.json"

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

    def first_export(self, run: Run, model: MultimodalLM) -> FirstExport | None:
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
            OVIS_MODEL.key, "ovis-safetensors", _NO_ROTATION, {n: _json(told) for n, told in texts.items()}, files
        )

    def write(
        self,
        folder: Path,
        published: Published,
        whole: Callable[[str], torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        side_files: Mapping[str, Path],
        layout: str,
        num_shards: int | None,
    ) -> tuple[list[str], int]:
        """The recorded files again, or new ones where another format or number of them is asked for."""
        dtypes = {name: DTYPES[published.tensors[name]] for name in shapes if name in published.tensors}
        dtypes |= {name: dtypes[OVIS_MODEL.embedding] for name in shapes if name not in dtypes}
        tensors = {name: (dtypes[name], tuple(shape)) for name, shape in shapes.items()}
        is_same = published.record and layout == published.layout and num_shards is None
        record = HfRecord.from_json(published.record) if is_same else None
        if record is None or set(record.dtypes) != set(tensors):
            record = _planned(tensors, FORMATS[layout], num_shards)
        files = write_hf(folder, record, whole)
        for name, path in side_files.items():
            shutil.copyfile(path, folder / name)
        return files, sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def _planned(tensors: Any, kind: Any, num_shards: int | None) -> HfRecord:
    """A new shard map; a number of files is met as nearly as whole tensors allow."""
    if num_shards is None:
        return plan_hf(tensors, kind=kind)
    if num_shards < 1:
        raise ValueError(f"--shards {num_shards}: a folder has at least one file")
    room = -(-sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values()) // num_shards)
    record = plan_hf(tensors, kind=kind, max_shard_bytes=room)
    while len(record.files) > num_shards:
        room += max(1, room // 50)
        record = plan_hf(tensors, kind=kind, max_shard_bytes=room)
    return record


def _json(told: Mapping[str, Any]) -> str:
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


OVIS_LAYOUT = OvisLayout()
"""What `bestiary.weights.layouts` lists."""
