"""Published Ovis folders made of golden cases: config.json, weights, picture settings and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bestiary.variants.hf_folder import Format, plan_hf, write_hf
from tests.parity.cases import cases, has, read_bytes, read_json, read_tensors
from tests.parity.ovis_cases import above, is_model_case

CASES = cases("ovis", is_model_case)


def publish(folder: Path, case: Path, *, kind: Format = "safetensors", shard_bytes: int = 1 << 40) -> Path:
    """The folder as transformers would have saved the case's model."""
    folder.mkdir(parents=True)
    state = read_tensors(case / "weights.safetensors")
    if kind == "safetensors" and shard_bytes == 1 << 40:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        write_hf(folder, plan_hf(sizes, max_shard_bytes=shard_bytes, kind=kind), state.__getitem__)
    (folder / "config.json").write_bytes(read_bytes(case / "config.json"))
    pictures = has("preprocessor_config.json")(case)
    text = read_bytes(case / "preprocessor_config.json") if pictures else b'{"do_resize": true}\n'
    (folder / "preprocessor_config.json").write_bytes(text)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_p": 0.8}\n')
    for file in tokenizer_of(case).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def tokenizer_of(case: Path) -> Path:
    """The folder of the case's tokenizer."""
    told = read_json(case / "results.json")["tokenizer_dir"]
    return above(case, "tokenizers") / Path(told).name


def assert_same(one: Path, other: Path) -> None:
    """The same files; pickles equal in names, order, dtypes and bits, all others byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if not name.endswith(".bin"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
            continue
        theirs, ours = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert list(theirs) == list(ours)
        for key in theirs:
            assert theirs[key].dtype == ours[key].dtype and torch.equal(theirs[key], ours[key]), key


def changed(folder: Path, **words: Any) -> None:
    """Write other words into a folder's config.json; a word with two underscores is one of a nested object."""
    path = folder / "config.json"
    told = json.loads(path.read_text())
    for word, value in words.items():
        node, *rest = word.split("__")
        target = told
        for part in rest:
            target, node = target[node], part
        target[node] = value
    path.write_text(json.dumps(told))
