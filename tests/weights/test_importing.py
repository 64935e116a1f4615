"""Imports: whole or nothing, the same tensors from any number of shards, and errors that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bestiary.config import Stage
from bestiary.training.parents import load_first_weights, load_parent
from bestiary.variants.sphinx import weights as sphinx_weights
from bestiary.variants.sphinx.consolidated import find_shards
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.tensor_file import TensorFile
from bestiary.weights.importing import Asked, import_weights
from tests.variants.sphinx_tiny import DECODER
from tests.weights import making

ASKED = Asked()


def test_any_number_of_shards_imports_to_the_same_tensors(tmp_path: Path) -> None:
    state = making.llama()
    outs = []
    for shards in (1, 2):
        folder = making.publish(tmp_path / f"in{shards}", state, shards=shards)
        import_weights([folder], tmp_path / f"out{shards}", ASKED)
        outs.append(load_file(tmp_path / f"out{shards}" / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])
    assert {tensor.dtype for tensor in outs[0].values()} == {torch.bfloat16}


def test_an_import_is_a_parent_and_first_weights_with_the_published_values(tmp_path: Path) -> None:
    state = making.sphinx()
    report = import_weights([making.publish(tmp_path / "in", state, llama_type="llama_ens5")], tmp_path / "out", ASKED)
    assert len(report.fit.matched) + len(report.fit.converted) == len(state)
    expected = build_sphinx(vision=making.WITH_TEXT, decoder=DECODER)
    sphinx_weights.load_reference(expected, state)
    model = build_sphinx(vision=making.WITH_TEXT, decoder=DECODER)
    random = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_first_weights(model, [str(tmp_path / "out")], {"tokenizer": "any"})
    _assert_equal(model, expected)
    model.load_state_dict(random)
    load_parent(model, tmp_path / "out", stage=Stage(name="child", parents=["base"]), identity={})
    _assert_equal(model, expected)


def _assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_shards_stand_in_the_order_of_their_numbers_not_of_their_names(tmp_path: Path) -> None:
    files = [tmp_path / f"consolidated.{rank}-of-11.model.pth" for rank in range(11)]
    for file in files:
        file.touch()
    assert find_shards(tmp_path) == ("consolidated", files)


def test_a_delta_is_added_to_its_base_in_the_bases_dtype(tmp_path: Path) -> None:
    base = making.llama()
    name = "llma.layers.0.feed_forward.w1.weight"
    delta = {name: torch.full(base[name].shape, 0.25, dtype=torch.float16)}
    folders = [
        making.publish(tmp_path / "base", base, shards=2),
        making.publish(tmp_path / "delta", delta, shards=1, layout="delta"),
    ]
    import_weights(folders, tmp_path / "out", ASKED)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    summed = (base[name].float() + 0.25).bfloat16()
    assert torch.equal(tensors["decoder.model.layers.0.mlp.gate_proj.weight"], summed)
    untouched = tensors["decoder.model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(untouched, base["llma.layers.1.feed_forward.w1.weight"])
    with pytest.raises(ValueError, match="name the base's folder before it"):
        import_weights(folders[1:], tmp_path / "alone", ASKED)


def test_a_later_folder_overrides_an_earlier_one(tmp_path: Path) -> None:
    first, second = making.llama(), {name: tensor + 1 for name, tensor in making.llama().items()}
    folders = [making.publish(tmp_path / "1", first), making.publish(tmp_path / "2", second, shards=1)]
    import_weights(folders, tmp_path / "out", ASKED)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["decoder.lm_head.weight"], second["llma.output.weight"])


def test_shards_that_disagree_on_a_common_tensor_are_told_and_the_first_wins(tmp_path: Path) -> None:
    state = making.llama()
    folder = making.publish(tmp_path / "in", state)
    path = folder / "consolidated.01-of-02.model.pth"
    shard = torch.load(path, weights_only=True)
    shard["model"]["llma.norm.weight"] += 1
    torch.save(shard, path)
    assert import_weights([folder], tmp_path / "out", ASKED).unequal == ("llma.norm.weight",)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["decoder.model.norm.weight"], state["llma.norm.weight"])


def test_what_may_lack_is_declared_absent(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in making.sphinx().items() if "clip.visual.proj" not in name}
    folder = making.publish(tmp_path / "in", state)
    with pytest.raises(ValueError, match=r"1 missing, first llma\.clip\.visual\.proj"):
        import_weights([folder], tmp_path / "out", ASKED)
    import_weights([folder], tmp_path / "out", Asked(may_lack=("llma.clip.*",)))
    told = json.loads((tmp_path / "out" / "state.json").read_text())
    assert told["absent"] == ["vision.clip.unused.visual_proj"]
    with pytest.raises(ValueError, match="matches none of the 0 missing"):
        import_weights([making.publish(tmp_path / "all", making.llama())], tmp_path / "no", Asked(may_lack=("*",)))


Spoil = Callable[[Path], None]


def _edit(folder: Path, rank: int, change: Callable[[making.State], None]) -> None:
    path = folder / f"consolidated.{rank:02d}-of-02.model.pth"
    state = torch.load(path, weights_only=True)
    change(state["model"])
    torch.save(state, path)


def _rename_output(state: making.State) -> None:
    state["llma.outputs.weight"] = state.pop("llma.output.weight")


def _narrow(state: making.State) -> None:
    state["llma.output.weight"] = state["llma.output.weight"][:3].clone()


def _both(change: Callable[[making.State], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        _edit(folder, 0, change)
        _edit(folder, 1, change)

    return spoil


def _config(**changes: object) -> Spoil:
    return lambda folder: _rewrite(folder / "config.json", changes)


def _rewrite(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def _unsafe(folder: Path) -> None:
    torch.save({"model": {"a": Path("x")}}, folder / "consolidated.00-of-02.model.pth")


SPOILT: dict[str, tuple[Spoil, str]] = {
    "mixed formats": (lambda f: torch.save({}, f / "consolidated.00.pth"), "shards of mixed formats"),
    "delta beside": (lambda f: torch.save({}, f / "consolidated.00-of-01.model-diff.pth"), "mixed formats"),
    "two sets": (lambda f: torch.save({}, f / "consolidated.00-of-01.model.pth"), "shards of several sets"),
    "missing shard": (lambda f: (f / "consolidated.01-of-02.model.pth").unlink(), r"missing consolidated\.01-of-02"),
    "unknown layout": (lambda f: [p.unlink() for p in f.glob("*.pth")] and None, "unknown layout"),
    "unequal sizes": (lambda f: _edit(f, 1, _narrow), "sizes must be equal"),
    "names differ": (lambda f: _edit(f, 1, _rename_output), "differ in names"),
    "unexpected": (_both(_rename_output), r"1 missing, first llma\.output.*1 unexpected, first llma\.outputs"),
    "other shape": (_both(_narrow), r"1 of another shape, first llma\.output"),
    "other dtype": (
        lambda f: _edit(f, 1, lambda s: s.update({n: t.float() for n, t in s.items()})),
        "is torch.float32",
    ),
    "truncated": (lambda f: _truncate(f / "consolidated.01-of-02.model.pth"), "not a whole checkpoint"),
    "a pickle of code": (_unsafe, "not a whole"),
    "no tensors": (
        lambda f: torch.save({"model": {"a": 1}}, f / "consolidated.00-of-02.model.pth"),
        "holds no tensors",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "give --config FILE"),
    "heads do not divide": (_config(n_heads=3), "does not divide into 3 heads"),
    "another config": (_config(dim=99), "config says dim=99"),
    "odd config": (_config(multiple_of=0), "multiple_of=0, which is no size"),
    "half a head": (_config(n_heads=4.5), r"n_heads=4\.5, which is no size"),
    "broken config": (lambda f: (f / "config.json").write_text("{") and None, "is not JSON"),
    "unknown type": (lambda f: (f / "meta.json").write_text('{"llama_type": "gpt"}') and None, "llama_type 'gpt'"),
    "not a tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"x") and None, "not a sentencepiece model"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_folder_is_one_line_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    spoil, message = SPOILT[what]
    folder = making.publish(tmp_path / "in", making.llama())
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        import_weights([folder], tmp_path / "out", ASKED)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_unknown_tensors_are_kept_only_when_asked_and_alike_in_all_shards(tmp_path: Path) -> None:
    state = making.llama() | {"llma.adapter.gate": torch.ones(2)}
    folder = making.publish(tmp_path / "in", state)
    with pytest.raises(ValueError, match="1 unexpected"):
        import_weights([folder], tmp_path / "out", ASKED)
    assert import_weights([folder], tmp_path / "out", Asked(keep_unknown=True)).published.extra == ["llma.adapter.gate"]
    _edit(folder, 1, lambda shard: shard.update({"llma.adapter.gate": torch.zeros(2)}))
    with pytest.raises(ValueError, match="not the same in all shards"):
        import_weights([folder], tmp_path / "torn", Asked(keep_unknown=True))
    assert not (tmp_path / "torn").exists()


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    folder = making.publish(tmp_path / "in", making.llama())
    (tmp_path / "out").mkdir()
    import_weights([folder], tmp_path / "out", ASKED)
    before = (tmp_path / "out" / "MANIFEST.json").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        import_weights([folder], tmp_path / "out", ASKED)
    assert (tmp_path / "out" / "MANIFEST.json").read_bytes() == before


def test_a_tensor_file_is_what_safetensors_reads_whatever_the_order(tmp_path: Path) -> None:
    tensors = {
        "b": torch.tensor([True]),
        "f": torch.randn(3, 2),
        "s": torch.tensor(2.5, dtype=torch.bfloat16),
        "n": torch.zeros(0, 4),
        "i": torch.arange(5),
    }
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "x.safetensors", plan, metadata={"format": "pt"}) as file:
        for name in reversed(tensors):
            file.add(name, tensors[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
