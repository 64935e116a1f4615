"""Published checkpoint folders of tiny models with random weights, in every layout and number of shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bestiary.variants.sphinx import weights as sphinx_weights
from bestiary.variants.sphinx.consolidated import Format, file_name, save_shard, shard_of
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.sphinx_v import weights as sphinx_v_weights
from bestiary.variants.sphinx_v.model import build_sphinx_v
from tests.variants.sphinx_tiny import DECODER, TEXT, VISION

State = dict[str, torch.Tensor]
WITH_TEXT = {**VISION, "clip": {**VISION["clip"], "text": TEXT}}


def llama(
    dim: int = 16, layers: int = 2, vocab: int = 50, heads: int = 4, kv_heads: int = 2, hidden: int = 48
) -> State:
    """A LLaMA of random bfloat16 weights under published names."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    state = {"llma.tok_embeddings.weight": drawn(vocab, dim)}
    keys = dim * kv_heads // heads
    for layer in range(layers):
        rows = {"attention.wq": dim, "attention.wk": keys, "attention.wv": keys, "attention.wo": dim}
        state |= {f"llma.layers.{layer}.{name}.weight": drawn(size, dim) for name, size in rows.items()}
        state |= {f"llma.layers.{layer}.feed_forward.{name}.weight": drawn(hidden, dim) for name in ("w1", "w3")}
        state[f"llma.layers.{layer}.feed_forward.w2.weight"] = drawn(dim, hidden)
        state |= {f"llma.layers.{layer}.{name}.weight": drawn(dim) for name in ("attention_norm", "ffn_norm")}
    return state | {"llma.norm.weight": drawn(dim), "llma.output.weight": drawn(vocab, dim)}


@lru_cache
def sphinx(with_regions: bool = False) -> State:
    """A tiny SPHINX (or SPHINX-V) under published names; made once, so not to be changed in place."""
    torch.manual_seed(0)
    if with_regions:
        return sphinx_v_weights.to_reference(_weights(build_sphinx_v), build_sphinx_v(**_sizes(), prompt_dim=8))
    return sphinx_weights.to_reference(_weights(build_sphinx), build_sphinx(**_sizes()))


def _sizes() -> dict[str, Any]:
    return {"vision": WITH_TEXT, "decoder": DECODER}


def _weights(build: Any) -> State:
    more = {"prompt_dim": 8} if build is build_sphinx_v else {}
    return {name: tensor.detach() for name, tensor in build(**_sizes(), **more).state_dict().items()}


def config(state: Mapping[str, torch.Tensor], heads: int = 4) -> dict[str, Any]:
    """What config.json says of such a decoder."""
    vocab, dim = state["llma.tok_embeddings.weight"].shape
    hidden, keys = state["llma.layers.0.feed_forward.w1.weight"].shape[0], state["llma.layers.0.attention.wk.weight"]
    sizes = {"dim": dim, "n_heads": heads, "n_kv_heads": keys.shape[0] * heads // dim, "multiple_of": hidden}
    return {**sizes, "n_layers": sum(name.endswith("wq.weight") for name in state), "vocab_size": vocab}


def publish(
    folder: Path, state: State, *, shards: int = 2, layout: Format = "consolidated", llama_type: str | None = None
) -> Path:
    """Write the folder: shards, config.json (params.json in Meta's) and meta.json if a type is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        part = {name: shard_of(name, tensor, rank, shards) for name, tensor in state.items()}
        save_shard(part, folder / file_name(layout, rank, shards), layout=layout)
    if layout != "delta":
        sizes = config(state) | ({"vocab_size": -1} if layout == "meta" else {})
        (folder / ("params.json" if layout == "meta" else "config.json")).write_text(json.dumps(sizes))
    if llama_type is not None:
        (folder / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
    return folder


def assert_same_folders(one: Path, other: Path) -> None:
    """The same files; pickles equal in names, their order, dtypes and bits, the others byte for byte."""
    names = sorted(path.name for path in one.iterdir() if not path.name.startswith("_"))
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if not name.endswith(".pth"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
            continue
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert list(ours) == list(theirs)
        ours, theirs = ours.get("model", ours), theirs.get("model", theirs)
        assert list(ours) == list(theirs)
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
