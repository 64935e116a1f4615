"""The SPHINX family's published checkpoints as `bestiary weights` sees them, SPHINX-V's with its prompt parts.

Files are read and written by `variants.sphinx.consolidated`; here stand the models and the files beside the weights.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter
from bestiary.variants.hf_folder import read_object
from bestiary.variants.layouts import FirstExport, Published, Shapes, Source, Writing, tokenizer_of
from bestiary.variants.sphinx.consolidated import (
    FILE_NAMES,
    Format,
    ShardFolder,
    check_cut,
    file_name,
    save_shard,
    shard_dim,
    shard_of,
)
from bestiary.variants.sphinx.model import build_decoder, build_vision, views_identity
from bestiary.variants.sphinx.sizes import (
    CLIP,
    CONVNEXT,
    CUTS,
    DINOV2,
    EMBEDDING,
    QFORMER,
    decoder_sizes,
    head_dim,
    shape_of,
    views_of,
    vision_sizes,
)
from bestiary.variants.sphinx.weights import SPHINX
from bestiary.variants.sphinx_v.prompt_encoder import PromptRows
from bestiary.variants.sphinx_v.weights import SPHINX_V

GAUSSIAN = "llma.vp_encoder.pe_layer.positional_encoding_gaussian_matrix"
DERIVED = re.compile(r"llma\.(?:layers\.\d+\.attention\.(?:inner_attention\.)?)?(?:rope\.freqs|rotary_emb\.inv_freq)")
"""Tables that files carry along and every model computes by itself: one in LLaMA-2, one in each layer of LLaMA-1."""
REGION_PREFIXES = ("llma.vp_", "llma.start_vp", "llma.end_vp")
SPHINX_V_ONLY = ("llma.start_vp", "llma.end_vp", GAUSSIAN, "llma.vp_proj.0.weight")
"""Some of the prompt parts' tensors, by which a glob is known to mean them."""
PROMPT_DIM = 256
"""Width of the prompt encoder where no tensor tells it (sphinx_v.md section 1.3, embed_dim)."""
SIDE_FILES = ("config.json", "params.json", "meta.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
"""What lies beside published weights and is kept byte for byte."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of published checkpoint. is_guess: its tensors could be another kind's with other views, too.

    key: what meta.json calls it (llama_type). name: ours.
    """

    key: str
    name: str
    converter: Converter
    has_regions: bool = False
    is_guess: bool = False
    key_word: str = "llama_type"
    embedding: str = EMBEDDING
    derived: re.Pattern[str] = DERIVED
    allows_spare_ids: bool = False
    begins: str = ""

    @property
    def cuts(self) -> int:
        """Quarters or ninths of the picture along a side; 0 = no picture."""
        return CUTS.get(self.key, 0)

    @property
    def identity(self) -> dict[str, str]:
        """The views of a picture, where the files say which."""
        return views_identity(views_of(self.cuts)) if self.cuts and not self.is_guess else {}

    def expected(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of a whole checkpoint at the sizes these tensors tell."""
        decoder = decoder_sizes(shapes, config)
        with torch.device("meta"):
            vision = None
            if self.cuts:
                sizes = vision_sizes(shapes, self.cuts)
                vision = build_vision(sizes, out_dim=decoder["dim"], reference_quirks=False)
            regions = None
            if self.has_regions:
                lacks = not any(name.startswith(REGION_PREFIXES) for name in shapes)
                dim = PROMPT_DIM if lacks else 2 * shape_of(shapes, GAUSSIAN)[1]
                regions = PromptRows(out_dim=decoder["dim"], dim=dim, num_slots=1)
            model = MultimodalLM(build_decoder(decoder, "sdpa"), vision, regions)
        return self.converter.manifest(model, head_dim=decoder["dim"] // decoder["n_heads"])

    def tied(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
        """None: every tensor is in the files."""
        return {}

    def head_dim(self, shapes: Shapes, config: Mapping[str, Any]) -> int:
        """Of the config's heads; without one nobody knows."""
        if not config.get("n_heads"):
            raise ValueError(
                "there is no config.json or params.json that says n_heads, which the order of the rotary rows needs; "
                "give --config FILE"
            )
        decoder_sizes(shapes, config)  # says what is wrong with a config before its heads are believed
        return head_dim(shape_of(shapes, EMBEDDING)[1], int(config["n_heads"]))

    def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The decoder's sizes."""
        if EMBEDDING not in shapes:
            return []
        sizes = decoder_sizes(shapes, config)
        heads = f", {sizes['n_heads']} heads" if config.get("n_heads") else ""
        words = f"{sizes['n_layers']} layers of {sizes['dim']:,}{heads}, vocabulary {sizes['vocab_size']:,}"
        return [("decoder", words)]


FAMILIES = (
    Family("llama", "llama", SPHINX),
    Family("llama_ens", "sphinx", SPHINX),
    Family("llama_ens5", "sphinx_1k / sphinx_v2_1k", SPHINX),
    Family("llama_ens10", "sphinx with ten views", SPHINX),
    Family("llama_ens5_vp", "sphinx_v", SPHINX_V, has_regions=True),
)


class SphinxLayout:
    """consolidated.RR-of-NN.model.pth, differences to them, and Meta's consolidated.RR.pth."""

    formats: tuple[str, ...] = tuple(FILE_NAMES)

    def recognises(self, path: Path) -> bool:
        """By the names of files."""
        names = [file.name for file in path.glob("consolidated*.pth")] if path.is_dir() else []
        return any(pattern.fullmatch(name) for name in names for pattern in FILE_NAMES.values())

    def knows(self, names: Mapping[str, object]) -> bool:
        """By their prefix."""
        return any(name.startswith("llma.") for name in names)

    def config_of_list(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Its model_args."""
        config = told.get("model_args")
        return config if isinstance(config, dict) else {}

    def open(self, path: Path) -> Source:
        """All shards of one set."""
        return ShardFolder(path)

    def cut_dim(self, name: str) -> int | None:
        """That of tensor-parallel shards."""
        return shard_dim(name)

    def side_files(self, path: Path) -> dict[str, Path]:
        """Those of `SIDE_FILES` that are there."""
        return {name: path / name for name in SIDE_FILES if (path / name).is_file()}

    def tokenizer(self, path: Path, side_files: Mapping[str, Path]) -> Path | None:
        """tokenizer.model, or the folder of a Hugging Face one."""
        return tokenizer_of(path, side_files)

    def config(self, side_files: Mapping[str, Path]) -> dict[str, Any]:
        """config.json, or Meta's params.json."""
        path = side_files.get("config.json") or side_files.get("params.json")
        return read_object(path) if path else {}

    def config_name(self, layout: str) -> str:
        """Meta calls it params.json."""
        return "params.json" if layout == "meta" else "config.json"

    def model_of(
        self, names: Mapping[str, object], side_files: Mapping[str, Path], may_lack: Sequence[str] = ()
    ) -> Family:
        """The family meta.json names; without one, the smallest whose parts are there.

        Where the prompt parts may lack and do, it is SPHINX-V's beginning: a SPHINX without them.
        """
        if not any(name.startswith(REGION_PREFIXES) for name in names):
            regions = [*SPHINX_V_ONLY, *(ours for name in SPHINX_V_ONLY for ours in SPHINX_V.names_of(name))]
            if any(fnmatch.filter(regions, glob) and not fnmatch.filter(names, glob) for glob in may_lack):
                return self.model_called("llama_ens5_vp")
        told = read_object(side_files["meta.json"]).get("llama_type") if "meta.json" in side_files else None
        if told is not None:
            return self.model_called(told)
        has_regions = any(name.startswith(REGION_PREFIXES) for name in names)
        has_vision = any(name.startswith((CLIP, CONVNEXT, DINOV2, QFORMER)) for name in names)
        family = self.model_called("llama_ens5_vp" if has_regions else "llama_ens" if has_vision else "llama")
        return replace(family, is_guess=family.key == "llama_ens")

    def model_called(self, key: str) -> Family:
        """The family with this llama_type."""
        for family in FAMILIES:
            if family.key == key:
                return family
        known = ", ".join(family.key for family in FAMILIES)
        raise ValueError(f"meta.json says llama_type {key!r}, which is none of {known}")

    def node(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """None: its files do not say how the pictures are made."""
        return None

    def first_export(self, run: Run, model: MultimodalLM, *, step: int) -> FirstExport | None:
        """None: the order of the shards' tensors and their dtypes are an import's."""
        return None

    def write(self, folder: Path, asked: Writing) -> tuple[list[str], int]:
        """Shards one after another, each of them in memory, and the side files in the target's words."""
        published, target = asked.published, cast(Format, asked.layout)
        if target == "meta" and published.llama_type != "llama":
            name = self.model_called(published.llama_type).name
            raise ValueError(f"Meta's layout holds LLaMA alone, not {name}; use --layout consolidated")
        total = published.num_shards if asked.num_shards is None else asked.num_shards
        check_cut(asked.shapes, total)
        files = [file_name(target, rank, total) for rank in range(total)]
        num_bytes = 0
        for rank, name in enumerate(files):
            tensors = {theirs: shard_of(theirs, asked.whole(theirs), rank, total) for theirs in asked.shapes}
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            save_shard(tensors, folder / name, layout=target, wrapped=published.wrapped or target != published.layout)
            del tensors
        _write_side_files(folder, asked.side_files, published, target, asked.shapes)
        return files, num_bytes


def _write_side_files(
    folder: Path, side_files: Mapping[str, Path], published: Published, target: Format, shapes: Shapes
) -> None:
    """Byte for byte, and in the words of the other layout where that is wanted."""
    for name, path in side_files.items():
        shutil.copyfile(path, folder / name)
    wanted, other = ("params.json", "config.json") if target == "meta" else ("config.json", "params.json")
    crosses = "meta" in (target, published.layout) and target != published.layout
    if crosses and not (folder / wanted).exists() and (folder / other).is_file() and EMBEDDING in shapes:
        config = read_object(folder / other) | {"vocab_size": shapes[EMBEDDING][0]}
        (folder / wanted).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / other).unlink()
    if target == "consolidated" and not (folder / "meta.json").exists() and published.layout == "meta":
        (folder / "meta.json").write_text(json.dumps({"llama_type": published.llama_type}, indent=2), encoding="utf-8")


SPHINX_LAYOUT = SphinxLayout()
"""What `bestiary.weights.layouts` lists."""
