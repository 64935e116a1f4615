"""Published checkpoint folders as model cases: their shards, and what a model made from the folder says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bestiary.language.decoder import Decoder, llama_config
from bestiary.language.llama_names import to_decoder
from bestiary.mllm import MultimodalLM
from bestiary.variants.sphinx import weights
from bestiary.variants.sphinx.consolidated import FILE_NAME, read_published, shard_dim
from bestiary.variants.sphinx.model import build_sphinx
from tests.parity import test_sphinx_llama, test_sphinx_model
from tests.parity.cases import ROOT, cases, has, read_json
from tests.parity.sphinx_examples import assert_close
from tests.parity.sphinx_sizes import decoder_sizes, sphinx_arguments

FOLDERS = pytest.mark.parametrize("folder", cases("sphinx", has("_shards.json", "meta.json", "config.json")))
Case = test_sphinx_llama.Case | test_sphinx_model.Case


@FOLDERS
def test_every_shard_has_the_published_shapes(folder: Path) -> None:
    files = [path for path in folder.glob("*.pth") if FILE_NAME.fullmatch(path.name)]
    expected = read_json(folder / "_shards.json")["shard_shapes"]
    for path in files:
        shard = torch.load(path, weights_only=True, mmap=True)["model"]
        assert {name: list(x.shape) for name, x in shard.items()} == expected
    for name, whole in read_published(folder).items():
        shape = list(whole.shape)
        if (dim := shard_dim(name)) is not None:
            shape[dim] //= len(files)
        assert shape == expected[name], name


@FOLDERS
@torch.no_grad()
def test_a_model_made_from_the_folder_gives_the_logits_of_its_case(folder: Path) -> None:
    state = read_published(folder)
    case = _case_of(folder, state)
    model = _built(case, folder, state).eval()
    logits, expected = model.logits(case.batch()), case.io["output.logits"]
    assert_close(logits[:, -expected.shape[1] :], expected, 5e-4, "logits")


def _case_of(folder: Path, state: dict[str, torch.Tensor]) -> Case:
    """The model case that has its kind and its weights."""
    kind = read_json(folder / "meta.json")["llama_type"]
    for path in sorted((ROOT / "sphinx").rglob("weights.safetensors")):
        config = read_json(path.with_name("config.json"))
        if config.get("llama_type") != kind:
            continue
        own = load_file(path)
        if own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own):
            return (test_sphinx_model if config.get("with_visual") else test_sphinx_llama)._load(path.parent)
    raise AssertionError(f"no case has the weights of {folder}")


def _built(case: Case, folder: Path, state: dict[str, torch.Tensor]) -> MultimodalLM:
    """The decoder of the folder's own config.json, the visual part (of which it tells nothing) of the case's."""
    args = read_json(folder / "config.json")
    if isinstance(case, test_sphinx_model.Case):
        model = build_sphinx(**sphinx_arguments({**case.config, "model_args": args}), reference_quirks=True)
        weights.load_reference(model, state)
        return model
    sizes = decoder_sizes(args, vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"])
    model = MultimodalLM(Decoder(llama_config(**sizes)))
    bare = {name.removeprefix(test_sphinx_llama.PREFIX): tensor for name, tensor in state.items()}
    model.decoder.load_state_dict(to_decoder(bare, n_heads=args["n_heads"], n_kv_heads=args.get("n_kv_heads")))
    return model
