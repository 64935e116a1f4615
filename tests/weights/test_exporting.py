"""Exports give back what an import read, in any layout, and fill a trained run's own values in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.config import Stage
from bestiary.training.parents import export_weights as save_run
from bestiary.training.parents import load_parent
from bestiary.variants.sphinx.model import build_sphinx
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.weights import load_published
from bestiary.weights.exporting import export_weights
from bestiary.weights.importing import Asked, import_weights
from tests.variants.sphinx_tiny import DECODER
from tests.weights import making

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "shards"),
    [
        ("llama", 1),
        ("llama", 2),
        *(pytest.param(kind, n, marks=SLOW) for kind in ("sphinx", "sphinx_v") for n in (1, 2)),
    ],
)
def test_a_round_trip_gives_the_files_back(tmp_path: Path, kind: str, shards: int) -> None:
    state = making.llama() if kind == "llama" else making.sphinx(with_regions=kind == "sphinx_v")
    state = {name: state[name] for name in sorted(state, key=lambda name: name[::-1])}  # an order of no model
    state["llma.norm.weight"] = state["llma.norm.weight"].double()
    folder = making.publish(tmp_path / "in", state, shards=shards)
    import_weights([folder], tmp_path / "out", Asked())
    export_weights(tmp_path / "out", tmp_path / "back")
    making.assert_same_folders(folder, tmp_path / "back")


def test_sizes_in_the_other_layouts_file_go_back_in_it(tmp_path: Path) -> None:
    folder = making.publish(tmp_path / "in", making.llama())
    (folder / "config.json").rename(folder / "params.json")
    import_weights([folder], tmp_path / "out", Asked())
    export_weights(tmp_path / "out", tmp_path / "back")
    making.assert_same_folders(folder, tmp_path / "back")


@pytest.mark.parametrize(
    "table", ["rope.freqs", "layers.1.attention.inner_attention.rope.freqs", "layers.1.attention.rotary_emb.inv_freq"]
)
def test_metas_layout_keeps_its_names_and_its_table(tmp_path: Path, table: str) -> None:
    state = making.llama() | {f"llma.{table}": torch.rand(2)}
    folder = making.publish(tmp_path / "in", state, layout="meta")
    assert import_weights([folder], tmp_path / "out", Asked()).fit.unexpected == (f"llma.{table}",)
    export_weights(tmp_path / "out", tmp_path / "back")
    making.assert_same_folders(folder, tmp_path / "back")


def test_another_layout_and_number_of_shards_is_that_layouts_own_folder(tmp_path: Path) -> None:
    meta = making.publish(tmp_path / "meta", making.llama(), layout="meta")
    import_weights([meta], tmp_path / "out", Asked())
    export_weights(tmp_path / "out", tmp_path / "one", layout="consolidated", num_shards=1)
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    assert told["vocab_size"] == 50 and json.loads((tmp_path / "one" / "meta.json").read_text())
    expected = making.publish(tmp_path / "expected", making.llama(), shards=1)
    for folder in (expected, tmp_path / "one"):
        for path in folder.glob("*.json"):
            path.unlink()
    making.assert_same_folders(expected, tmp_path / "one")


def test_trained_weights_go_back_in_the_published_dtype_with_what_they_left_out(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in making.sphinx().items()}
    import_weights([making.publish(tmp_path / "in", state, llama_type="llama_ens")], tmp_path / "base", Asked())
    model = build_sphinx(vision=making.WITH_TEXT, decoder=DECODER)
    with torch.no_grad():
        model.decoder.lm_head.weight.fill_(0.5)
    save_run(model, tmp_path / "run.safetensors", stage="s", identity={}, leave_out=["vision.clip.*"])
    with pytest.raises(ValueError, match="--like"):
        export_weights(tmp_path / "run.safetensors", tmp_path / "back")
    done = export_weights(tmp_path / "run.safetensors", tmp_path / "back", like=tmp_path / "base", num_shards=1)
    assert done.filled and done.cast
    back = torch.load(tmp_path / "back" / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    assert list(back) == list(state) and {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert bool((back["llma.output.weight"] == 0.5).all())
    assert torch.equal(back["llma.clip.visual.conv1.weight"], state["llma.clip.visual.conv1.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_difference_are_the_trained_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in making.llama().items()}
    base = making.publish(tmp_path / "in", state)
    import_weights([base], tmp_path / "base", Asked())
    trained = {name: tensor.clone() for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(1)
    for name in ("decoder.lm_head.weight", "decoder.model.layers.0.self_attn.q_proj.weight"):
        trained[name] += (0.01 * torch.randn(trained[name].shape, generator=generator)).to(dtype)
    save_file(trained, tmp_path / "run.safetensors")
    counts = {}
    for delta_dtype in (torch.float32, torch.float16):
        out = tmp_path / str(delta_dtype)
        done = export_weights(tmp_path / "run.safetensors", out, delta_from=tmp_path / "base", delta_dtype=delta_dtype)
        assert done.files == ("consolidated.00-of-02.model-diff.pth", "consolidated.01-of-02.model-diff.pth")
        assert done.num_tensors == 2 and done.difference is not None
        import_weights([base, out], tmp_path / f"{out.name}.back", Asked())
        back = load_file(tmp_path / f"{out.name}.back" / "model.safetensors")
        off = sum(int((back[name] != tensor).sum()) for name, tensor in trained.items())
        worst = max(float((back[name].double() - tensor.double()).abs().max()) for name, tensor in trained.items())
        assert (off, worst) == (done.difference.num_inexact, pytest.approx(done.difference.largest))
        counts[delta_dtype] = off
    assert counts[torch.float32] <= 2  # of 1056 values
    assert counts[torch.float16] > 100 if dtype == torch.float32 else counts[torch.float16] < 100


def test_a_difference_is_refused_where_there_is_none(tmp_path: Path) -> None:
    import_weights([making.publish(tmp_path / "in", making.llama())], tmp_path / "base", Asked())
    with pytest.raises(ValueError, match="no tensor differs from the base"):
        export_weights(tmp_path / "base", tmp_path / "out", delta_from=tmp_path / "base")
    with pytest.raises(ValueError, match="--delta-from"):
        export_weights(tmp_path / "base", tmp_path / "out", layout="delta")
    with pytest.raises(ValueError, match="--layout meta has no files of differences"):
        export_weights(tmp_path / "base", tmp_path / "out", layout="meta", delta_from=tmp_path / "base")
    with pytest.raises(ValueError, match="--layout gguf is none of consolidated, delta, meta"):
        export_weights(tmp_path / "base", tmp_path / "out", layout="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


@SLOW
def test_sphinx_v_grows_from_a_sphinx_and_goes_back_with_its_prompt_parts(tmp_path: Path) -> None:
    folder = making.publish(tmp_path / "in", making.sphinx(), llama_type="llama_ens5")
    import_weights([folder], tmp_path / "base", Asked(may_lack=("regions.*",)))
    vision = {**making.WITH_TEXT, "views": ["whole", [0, 0], [0, 1], [1, 0], [1, 1]]}  # what llama_ens5 says
    model, grown = (build_sphinx_v(vision=vision, decoder=DECODER, prompt_dim=8) for _ in range(2))
    absent = load_parent(model, tmp_path / "base", stage=Stage(name="v", parents=["any"]), identity={}).absent
    assert absent == {name for name in model.state_dict() if name.startswith("regions.")}
    load_published(grown, folder, may_lack=["regions.*"])
    kept = [name for name in model.state_dict() if name not in absent]
    assert all(torch.equal(model.state_dict()[name], grown.state_dict()[name]) for name in kept)
    save_run(model, tmp_path / "run.safetensors", stage="v", identity={})
    export_weights(tmp_path / "run.safetensors", tmp_path / "back", like=tmp_path / "base")
    load_published(grown, tmp_path / "back")
    assert all(torch.equal(grown.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    import_weights([making.publish(tmp_path / "in", making.llama())], tmp_path / "llama", Asked())
    import_weights([making.publish(tmp_path / "in2", making.sphinx())], tmp_path / "sphinx", Asked())
    there = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot be cut into 7 equal shards along dimension"):
        export_weights(tmp_path / "llama", tmp_path / "back", num_shards=7)
    with pytest.raises(ValueError, match="--shards 0"):
        export_weights(tmp_path / "llama", tmp_path / "back", num_shards=0)
    with pytest.raises(ValueError, match="LLaMA alone"):
        export_weights(tmp_path / "sphinx", tmp_path / "back", layout="meta")
    with pytest.raises(ValueError, match="is it the import this model began as"):
        export_weights(tmp_path / "sphinx", tmp_path / "back", like=tmp_path / "llama")
    with pytest.raises(ValueError, match="does not exist"):
        export_weights(tmp_path / "none", tmp_path / "back", like=tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="bytes, the manifest says"):
        export_weights(tmp_path / "llama", tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == there


def test_what_a_tuned_run_trained_is_to_be_merged_first(tmp_path: Path) -> None:
    file = tmp_path / "trained.safetensors"
    save_file({"decoder.lm_head.weight": torch.zeros(2, 2)}, file, metadata={"identity": '{"base": "1"}'})
    with pytest.raises(ValueError, match="without its base; make it whole with `bestiary weights merge") as error:
        export_weights(file, tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()
