"""Which model published names belong to, and what a whole checkpoint of it holds.

Sizes are read off the tensors themselves, the model is built on the meta device from them, and its published names
and shapes are what a checkpoint is compared with. So a checkpoint of any size is checked, also one that nobody has
written a yaml for.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter
from bestiary.variants.sphinx.model import build_decoder, build_vision
from bestiary.variants.sphinx.weights import SPHINX
from bestiary.variants.sphinx_v.prompt_encoder import PromptRows
from bestiary.variants.sphinx_v.weights import SPHINX_V

Shapes = Mapping[str, Sequence[int]]

CLIP, CONVNEXT, DINOV2, QFORMER = "llma.clip", "llma.openclip_convnext_xxl", "llma.dinov2_vitg14", "llma.qformer"
EMBEDDING = "llma.tok_embeddings.weight"
GAUSSIAN = "llma.vp_encoder.pe_layer.positional_encoding_gaussian_matrix"
DERIVED = re.compile(r"llma\.(?:layers\.\d+\.attention\.)?(?:rope\.freqs|rotary_emb\.inv_freq)")
"""Tables that Meta's files carry along and every model computes by itself."""
DECODER_KEYS = ("n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling")
WHOLE_NUMBERS = ("n_heads", "n_kv_heads", "multiple_of")
ANY_HEADS = 1
"""Heads of an encoder change no shape, so the comparison needs no right number."""

MAX_DEPTH = 1000
"""Layers of any part; a number beyond it is a damaged name, not a model to be built."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of published checkpoint. cuts: quarters or ninths of the picture along a side; 0 = no picture.

    llama_type: what meta.json calls it. name: ours.
    """

    llama_type: str
    name: str
    converter: Converter
    cuts: int = 0
    has_regions: bool = False


FAMILIES = (
    Family("llama", "llama", SPHINX),
    Family("llama_ens", "sphinx", SPHINX, cuts=1),
    Family("llama_ens5", "sphinx_1k / sphinx_v2_1k", SPHINX, cuts=2),
    Family("llama_ens10", "sphinx with ten views", SPHINX, cuts=3),
    Family("llama_ens5_vp", "sphinx_v", SPHINX_V, cuts=2, has_regions=True),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """How published tensors fit the model they claim to be, by published names.

    matched: renamed only. converted: values are reordered or cut, too. wrong: of another shape, as lines of text.
    """

    matched: tuple[str, ...]
    converted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def num_mapped(self) -> int:
        """Tensors that have their place."""
        return len(self.matched) + len(self.converted)

    @property
    def num_names(self) -> int:
        """Tensors that are there or should be."""
        return self.num_mapped + len(self.missing) + len(self.unexpected) + len(self.wrong)

    def __str__(self) -> str:
        counts = [f"{len(self.matched):,} matched", f"{len(self.converted):,} converted"]
        counts += [f"{len(self.missing):,} missing", f"{len(self.unexpected):,} unexpected"]
        return ", ".join(counts + ([f"{len(self.wrong):,} of another shape"] if self.wrong else []))


def family_of(names: Mapping[str, object], llama_type: str | None) -> Family:
    """The family meta.json names; without one, the smallest whose parts are there."""
    has_regions = any(name.startswith(("llma.vp_", "llma.start_vp", "llma.end_vp")) for name in names)
    has_vision = any(name.startswith((CLIP, CONVNEXT, DINOV2, QFORMER)) for name in names)
    if llama_type is None:
        llama_type = "llama_ens5_vp" if has_regions else "llama_ens" if has_vision else "llama"
    for family in FAMILIES:
        if family.llama_type == llama_type:
            return family
    known = ", ".join(family.llama_type for family in FAMILIES)
    raise ValueError(f"meta.json says llama_type {llama_type!r}, which is none of {known}")


def compare(family: Family, shapes: Shapes, config: Mapping[str, Any]) -> Fit:
    """Published names and whole shapes against the model of these sizes; config: of config.json, may be empty."""
    return fit(family.converter, shapes, published_shapes(family, shapes, config))


def fit(converter: Converter, shapes: Shapes, expected: Shapes) -> Fit:
    """Compare names and shapes with what is expected."""
    wrong = [name for name in shapes if name in expected and tuple(shapes[name]) != tuple(expected[name])]
    agreed = [name for name in shapes if name in expected and name not in set(wrong)]
    moved = {name for name in agreed if any(r.converts and r.their_pattern.fullmatch(name) for r in converter.rules)}
    return Fit(
        matched=tuple(name for name in agreed if name not in moved),
        converted=tuple(name for name in agreed if name in moved),
        missing=tuple(name for name in expected if name not in shapes),
        unexpected=tuple(name for name in shapes if name not in expected),
        wrong=tuple(f"{name}: {tuple(shapes[name])}, not {tuple(expected[name])}" for name in wrong),
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names most like this one, for the end of a line."""
    return ", ".join(difflib.get_close_matches(name, known, n=2, cutoff=0.4)) or "none"


def published_shapes(family: Family, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a whole checkpoint of the family at the sizes these tensors tell."""
    decoder = decoder_sizes(shapes, config)
    with torch.device("meta"):
        vision = None
        if family.cuts:
            sizes = vision_sizes(shapes, family.cuts)
            vision = build_vision(sizes, out_dim=decoder["dim"], reference_quirks=False)
        regions = None
        if family.has_regions:
            regions = PromptRows(out_dim=decoder["dim"], dim=2 * _shape(shapes, GAUSSIAN)[1], num_slots=1)
        model = MultimodalLM(build_decoder(decoder, "sdpa"), vision, regions)
    return family.converter.manifest(model, head_dim=decoder["dim"] // decoder["n_heads"])


def decoder_sizes(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `llama_config`: the config's where it speaks, else what the tensors tell."""
    vocab, dim = _shape(shapes, EMBEDDING)
    layers = _depth(shapes, "llma.layers")
    for key, found in (("dim", dim), ("n_layers", layers), ("vocab_size", vocab)):
        told = config.get(key)
        if told not in (None, -1, found):  # Meta writes -1 for "ask the tokenizer"
            raise ValueError(f"the config says {key}={told} but the tensors have {found}; is it the config of others?")
    config_says = {key: config[key] for key in DECODER_KEYS if config.get(key) is not None}
    for key, value in config_says.items():
        if not isinstance(value, int | float) or value <= 0 or (key in WHOLE_NUMBERS and value != int(value)):
            raise ValueError(f"the config says {key}={value!r}, which is no size; fetch it again")
    queries, keys = (_shape(shapes, f"llma.layers.0.attention.{name}.weight")[0] for name in ("wq", "wk"))
    heads = int(config_says.get("n_heads") or max(ANY_HEADS, queries // max(1, keys)))
    head_dim(dim, heads)
    tensors_say: dict[str, Any] = {"n_heads": heads, "n_kv_heads": max(1, heads * keys // max(1, queries))}
    if "multiple_of" not in config_says:  # a factor and a step that round up to the very width
        hidden = _shape(shapes, "llma.layers.0.feed_forward.w1.weight")[0]
        config_says |= {"multiple_of": hidden, "ffn_dim_multiplier": (hidden - 0.5) / max(1, int(8 * dim / 3))}
    size = {"dim": dim, "n_layers": layers, "vocab_size": vocab, "max_seq_len": 4096}
    return {**tensors_say, **config_says, **size}


def head_dim(dim: int, heads: int) -> int:
    """Width of an attention head; raises when the heads do not divide the width evenly."""
    if heads < 1 or dim % heads or (dim // heads) % 2:
        raise ValueError(f"a width of {dim} does not divide into {heads} heads of an even width; is the config right?")
    return dim // heads


def vision_sizes(shapes: Shapes, cuts: int) -> dict[str, Any]:
    """Arguments of `SphinxVision` as far as shapes tell; heads and the pixels of ConvNeXt's input are stand-ins."""
    positions = _shape(shapes, f"{CLIP}.visual.positional_embedding")[0]
    patch_px = _shape(shapes, f"{CLIP}.visual.conv1.weight")[-1]
    view_px = math.isqrt(positions - 1) * patch_px
    quarters = [[row, column] for row in range(cuts) for column in range(cuts)] if cuts > 1 else []
    return {
        "canvas_px": cuts * view_px,
        "view_px": view_px,
        "patch_px": patch_px,
        "views": ["whole", *quarters],
        "clip": _clip(shapes),
        "convnext": _convnext(shapes),
        "dinov2": _dinov2(shapes),
        "qformer": _qformer(shapes),
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    blocks = f"{CLIP}.visual.transformer.resblocks"
    context, text_width = _shape(shapes, f"{CLIP}.positional_embedding")
    return {
        "width": _shape(shapes, f"{CLIP}.visual.class_embedding")[0],
        "layers": _depth(shapes, blocks),
        "heads": ANY_HEADS,
        "mlp_dim": _shape(shapes, f"{blocks}.0.mlp.c_fc.weight")[0],
        "text": {
            "embed_dim": _shape(shapes, f"{CLIP}.text_projection")[1],
            "context": context,
            "vocab": _shape(shapes, f"{CLIP}.token_embedding.weight")[0],
            "width": text_width,
        },
    }


def _convnext(shapes: Shapes) -> dict[str, Any]:
    stages = range(_depth(shapes, f"{CONVNEXT}.stages"))
    stem_px = _shape(shapes, f"{CONVNEXT}.stem.0.weight")[-1]
    return {
        "depths": [_depth(shapes, f"{CONVNEXT}.stages.{stage}.blocks") for stage in stages],
        "widths": [_shape(shapes, f"{CONVNEXT}.stages.{stage}.blocks.0.gamma")[0] for stage in stages],
        "stem_px": stem_px,
        "input_px": stem_px * 2 ** (len(stages) - 1),
    }


def _dinov2(shapes: Shapes) -> dict[str, Any]:
    return {
        "width": _shape(shapes, f"{DINOV2}.cls_token")[-1],
        "layers": _depth(shapes, f"{DINOV2}.blocks"),
        "heads": ANY_HEADS,
        "position_grid": math.isqrt(_shape(shapes, f"{DINOV2}.pos_embed")[1] - 1),
        "swiglu": f"{DINOV2}.blocks.0.mlp.w12.weight" in shapes,
    }


def _qformer(shapes: Shapes) -> dict[str, Any]:
    layers, vit = f"{QFORMER}.qformer.encoder.layer", f"{QFORMER}.vision_model"
    _, queries, width = _shape(shapes, f"{QFORMER}.query_tokens")
    depth = _depth(shapes, layers)
    crossing = [n for n in range(depth) if f"{layers}.{n}.crossattention.attention.query.weight" in shapes]
    return {
        "num_queries": queries,
        "width": width,
        "layers": depth,
        "heads": ANY_HEADS,
        "mlp_dim": _shape(shapes, f"{layers}.0.intermediate_query.dense.weight")[0],
        "cross_every": crossing[1] if len(crossing) > 1 else depth,
        "vit": {
            "width": _shape(shapes, f"{vit}.embeddings.class_embedding")[-1],
            "layers": _depth(shapes, f"{vit}.encoder.layers"),
            "heads": ANY_HEADS,
            "mlp_dim": _shape(shapes, f"{vit}.encoder.layers.0.mlp.fc1.weight")[0],
        },
    }


def _shape(shapes: Shapes, name: str) -> Sequence[int]:
    try:
        return shapes[name]
    except KeyError:
        near = nearest(name, list(shapes))
        raise ValueError(f"{name}, which tells a size of the model, is missing; nearest there: {near}") from None


def _depth(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix."""
    number = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    depth = 1 + max((int(match[1]) for name in shapes if (match := number.match(name))), default=-1)
    if depth > MAX_DEPTH:
        raise ValueError(f"{prefix}.{depth - 1} is beyond {MAX_DEPTH} layers; are these tensors of this family?")
    return depth
