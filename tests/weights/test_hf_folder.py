"""Hugging Face folders: read whatever their files are, written back as they were, refused when they are not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.variants.hf_folder import HfFolder, HfRecord, plan_hf, write_hf

Tensors = dict[str, torch.Tensor]


def _tensors() -> Tensors:
    return {
        "b.weight": torch.randn(3, 4),
        "a.bias": torch.randn(5).half(),
        "c.scale": torch.tensor(2.0, dtype=torch.bfloat16),
        "d.steps": torch.arange(3),
    }


def _publish(folder: Path, kind: str, *, shards: int = 2) -> Tensors:
    """A folder as transformers writes it, with a tokenizer and a config beside the weights."""
    folder.mkdir()
    tensors = _tensors()
    names = list(tensors)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}-{n:05d}-of-{shards:05d}.{suffix}" for n in range(1, shards + 1)]
    files = files if shards > 1 else [f"{stem}.{suffix}"]
    placed = {name: files[number % shards] for number, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if placed[name] == file}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt", "odd": "ü"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        told = {"weight_map": placed, "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(told, indent=3))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb")
    return tensors


def test_an_index_that_tells_of_other_bytes_is_refused(tmp_path: Path) -> None:
    _publish(tmp_path / "in", "safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["metadata"]["total_size"] += 2
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"index\.json says metadata\.total_size \d+, but its shards hold \d+ bytes"):
        HfFolder(tmp_path / "in")
    del told["metadata"]
    index.write_text(json.dumps(told))
    assert HfFolder(tmp_path / "in").shapes


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_written_back_as_it_was(tmp_path: Path, kind: str, shards: int) -> None:
    tensors = _publish(tmp_path / "in", kind, shards=shards)
    folder = HfFolder(tmp_path / "in")
    assert folder.config == {"model_type": "x"} and folder.shapes.keys() == tensors.keys()
    assert all(torch.equal(folder.whole(name), tensor) for name, tensor in tensors.items())
    assert sorted(folder.side_files) == ["config.json", "preprocessor_config.json", "vocab.txt"]
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", HfRecord.from_json(folder.record.to_json()), folder.whole)
    weights = [path for path in (tmp_path / "in").iterdir() if path.name not in folder.side_files]
    assert sorted(p.name for p in weights) == sorted(p.name for p in (tmp_path / "out").iterdir())
    for path in weights:
        if path.suffix != ".bin":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
            continue
        ours, theirs = (torch.load(place, weights_only=True) for place in (tmp_path / "out" / path.name, path))
        assert list(ours) == list(theirs)
        assert all(ours[name].dtype == t.dtype and torch.equal(ours[name], t) for name, t in theirs.items())


def test_tied_tensors_of_a_pickle_stay_tied(tmp_path: Path) -> None:
    table = torch.randn(100, 100)
    torch.save({"embed": table, "head": table}, tmp_path / "pytorch_model.bin")
    folder = HfFolder(tmp_path)
    assert folder.record.aliases == {"head": "embed"}
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", folder.record, folder.whole)
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert written["embed"].data_ptr() == written["head"].data_ptr() and torch.equal(written["head"], table)


def test_a_new_shard_map_is_one_that_reads_back(tmp_path: Path) -> None:
    tensors = _tensors()
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    record = plan_hf(plan, max_shard_bytes=50)
    assert list(record.files) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_hf(tmp_path, record, tensors.__getitem__)
    assert all(torch.equal(HfFolder(tmp_path).whole(name), tensor) for name, tensor in tensors.items())
    assert load_file(tmp_path / "model-00001-of-00002.safetensors").keys() == {"b.weight"}
    assert list(plan_hf(plan).files) == ["model.safetensors"] and plan_hf(plan).index is None


class Code:
    """What a pickle must not bring along."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("ran",))


def _index(change: Callable[[dict[str, str]], None], suffix: str = "safetensors") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = next(folder.glob(f"*.{suffix}.index.json"))
        told = json.loads(path.read_text())
        change(told["weight_map"])
        path.write_text(json.dumps(told))

    return spoil


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
BIN = "pytorch_model-00001-of-00002.bin"
SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing shard": ("safetensors", lambda f: (f / SECOND).unlink(), rf"missing {SECOND}, 1 of 2 shards"),
    "truncated": ("safetensors", lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]), "not a whole"),
    "no header": ("safetensors", lambda f: (f / FIRST).write_bytes(b"12"), "not a whole safetensors file"),
    "no index": (
        "safetensors",
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "has no index.json beside it",
    ),
    "broken index": ("safetensors", lambda f: (f / "model.safetensors.index.json").write_text("{"), "is not JSON"),
    "empty index": (
        "safetensors",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "mixed formats": ("safetensors", _index(lambda m: m.update({"b.weight": BIN})), "shards of mixed formats"),
    "outside": (
        "safetensors",
        _index(lambda m: m.update({"b.weight": "../x.safetensors"})),
        "no safetensors file of this",
    ),
    "other place": ("safetensors", _index(lambda m: m.update({"b.weight": SECOND})), r"b\.weight is in model-00001"),
    "told too much": ("safetensors", _index(lambda m: m.update({"e": SECOND})), "e is in no file"),
    "told too little": ("safetensors", _index(lambda m: m.pop("a.bias")), r"says no file"),
    "two sets": ("safetensors", lambda f: save_file(_tensors(), f / "model.safetensors"), "two sets of weights"),
    "code": ("bin", lambda f: torch.save({"b.weight": Code()}, f / BIN), "not a whole checkpoint of tensors"),
    "truncated bin": ("bin", lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:-9]), "not a whole checkpoint"),
    "no tensors": ("bin", lambda f: torch.save({"b.weight": 3}, f / BIN), "holds no tensors by name"),
    "nothing": ("bin", lambda f: [p.unlink() for p in f.iterdir()], "neither model.safetensors nor"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_is_not_one_whole_set_is_one_line(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil, message = SPOILT[what]
    _publish(tmp_path / "in", kind)
    spoil(tmp_path / "in")
    with pytest.raises(ValueError, match=message) as caught:
        HfFolder(tmp_path / "in")
    assert "\n" not in str(caught.value) and "ran" not in capsys.readouterr().out
