"""Monkey's and Qwen-VL's published folders: every name has its place, all come out again, other grids are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.cli import main
from bestiary.config import Stage
from bestiary.inference import Session
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import load_named
from bestiary.training.parents import load_first_weights, load_parent
from bestiary.variants.hf_folder import Format
from bestiary.variants.monkey import config_json
from bestiary.variants.monkey.weights import ADAPTER_GLOB, check_config, manifest
from bestiary.weights.exporting import export_weights
from bestiary.weights.importing import Asked, import_weights
from bestiary.weights.inspecting import inspect
from tests.inference.test_monkey_session import PICTURE
from tests.parity.cases import cases, has, read_bytes
from tests.weights import monkey_making as making
from tests.weights.ovis_making import assert_same

LISTS = ("full_manifest.json", "full_manifest_llm_lora_extra.json")
WIDE = (16, 24)


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    """Four windows, nothing zero."""
    return making.model_of(making.build_node(), spread=0.3)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, model: MultimodalLM) -> Path:
    """That model's folder in one file."""
    return making.publish(tmp_path_factory.mktemp("monkey") / "in", model)


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory: pytest.TempPathFactory, model: MultimodalLM) -> Path:
    """The Qwen-VL it could have begun as, imported."""
    folder = tmp_path_factory.mktemp("qwen")
    import_weights([making.publish_qwen_vl(folder / "in", model)], folder / "ours", Asked())
    return folder / "ours"


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("folder", cases("monkey", has(*LISTS)))
def test_every_name_of_the_published_lists_has_its_place(tmp_path: Path, folder: Path, name: str) -> None:
    (tmp_path / name).write_bytes(read_bytes(folder / name))
    told = json.loads((tmp_path / name).read_text())
    found = inspect(tmp_path / name)
    assert dict(found.lines)["mapped"].startswith(f"100 % of {len(told):,} names: ")
    lost = sorted(told)[len(told) // 2]
    (tmp_path / "less.json").write_text(json.dumps({name: shape for name, shape in told.items() if name != lost}))
    less = inspect(tmp_path / "less.json").fit
    assert less is not None and less.missing == (lost,)


@pytest.mark.parametrize(
    ("kind", "shard_bytes"),
    [("bin", 20_000), pytest.param("safetensors", 20_000, marks=pytest.mark.slow)],
)
def test_a_folder_goes_in_and_comes_out_as_it_was(
    tmp_path: Path, model: MultimodalLM, kind: Format, shard_bytes: int
) -> None:
    folder = making.publish(tmp_path / "in", model, kind=kind, shard_bytes=shard_bytes)
    assert len(list(folder.glob(f"*-of-*{'.bin' if kind == 'bin' else '.safetensors'}"))) > 3
    done = import_weights([folder], tmp_path / "ours", Asked())
    assert not done.fit.missing and not done.fit.unexpected and done.has_tokenizer
    for path in (folder, tmp_path / "ours"):
        assert dict(inspect(path).lines)["mapped"].startswith("100 %")
    export_weights(tmp_path / "ours", tmp_path / "out")
    assert_same(folder, tmp_path / "out")


@pytest.mark.slow
def test_an_imported_folder_knows_its_model_and_reads_as_the_published_one(
    tmp_path: Path, model: MultimodalLM, published: Path
) -> None:
    import_weights([published], tmp_path / "ours", Asked())
    node = tmp_path / "ours" / "model.yaml"
    for pieces in (load_named(tmp_path / "ours"), load_named(published, model=node)):
        state = pieces.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert pieces.identity["windows"] == "2 x 2" and pieces.model.layout == model.layout
        assert Path(pieces.processor.tokenizer.path).name == "qwen.tiktoken"


@pytest.mark.slow
@pytest.mark.parametrize(("image_px", "layout"), [((16, 16), "monkey-bin"), (WIDE, "monkey-safetensors")])
def test_a_run_exports_imports_and_exports_bit_for_bit(tmp_path: Path, layout: str, image_px: tuple[int, int]) -> None:
    node = making.build_node(image_px, decoder_lora={"rank": 2}, seq_length=32, dynamic_ntk=False)
    model = making.model_of(node, spread=0.3)
    run = making.run_of(tmp_path / "run", node, model, [], making.vocabulary(tmp_path / "words"))
    export_weights(run, tmp_path / "hf", layout=layout, num_shards=3)
    done = import_weights([tmp_path / "hf"], tmp_path / "ours", Asked())
    assert not done.fit.missing and not done.fit.unexpected and done.published.num_shards == 3
    state = load_named(tmp_path / "ours").model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    export_weights(tmp_path / "ours", tmp_path / "back")
    assert_same(tmp_path / "hf", tmp_path / "back")
    sessions = [Session.from_run(run), Session.from_weights(tmp_path / "ours")]
    answers = [session.respond(PICTURE, "what?", max_new_tokens=40) for session in sessions]
    assert answers[0] == answers[1]


CHANGED: dict[str, Any] = {
    "num_attention_heads": 1,
    "kv_channels": 3,
    "rotary_emb_base": 5,
    "layer_norm_epsilon": 0.5,
    "seq_length": 9,
    "use_logn_attn": False,
    "visual.heads": 1,
    "visual.mlp_ratio": 2,
    "visual.image_size": [24, 16],
}


@pytest.mark.parametrize("word", CHANGED)
def test_a_config_of_another_model_is_told_although_no_shape_shows_it(
    tmp_path: Path, model: MultimodalLM, published: Path, word: str
) -> None:
    config = json.loads((published / "config.json").read_text())
    (config["visual"] if "." in word else config)[word.rpartition(".")[2]] = CHANGED[word]
    config |= {} if word in ("num_attention_heads", "kv_channels") else {"kv_channels": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says ") as error:
        check_config(model, tmp_path)
    assert "\n" not in str(error.value)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": None}, "num_attention_heads None, which is no whole number"),
    "another number of windows": ({"visual.lora_repeat_num": 6}, "lora_repeat_num 6 but 16 x 16 px have 2 x 2"),
    "a picture that windows do not cover": ({"visual.image_size": 20}, "do not divide a picture of 20 x 20"),
    "another size": ({"visual.width": 8}, "of another shape"),
    "biases": ({"no_bias": False}, "no_bias False"),
    "a size of nothing": ({"visual.patch_size": 0}, "visual.patch_size 0, which is no whole number of 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(tmp_path: Path, published: Path, kind: str) -> None:
    words, pattern = BAD[kind]
    folder = shutil.copytree(published, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    for word, value in words.items():
        (config["visual"] if "." in word else config)[word.rpartition(".")[2]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=pattern) as error:
        import_weights([folder], tmp_path / "out", Asked())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


WRONG: list[tuple[str, Any]] = [
    *((f"visual.{word}", 0) for word in ("patch_size", "heads", "width", "layers", "window", "n_queries")),
    *((word, 0) for word in ("num_attention_heads", "kv_channels", "layer_norm_epsilon", "max_position_embeddings")),
    *((word, None) for word in ("seq_length", "rotary_emb_base", "max_position_embeddings", "use_dynamic_ntk")),
    *(("seq_length", value) for value in ("2048", 2048.0, True, 1)),
    *(("visual.mlp_ratio", value) for value in (float("nan"), float("inf"), 10**400, "4", -1)),
    *(("visual.image_size", value) for value in (130, None, [16, "x"], [16, 16, 16])),
    *((word, "false") for word in ("use_dynamic_ntk", "use_logn_attn")),
    ("layer_norm_epsilon", "x"),
    ("visual.lora_repeat_num", -1),
    ("visual.heads", 3),
    ("visual.patch_size", 3),
    ("visual.n_queries", 5),
    ("num_attention_heads", 5),
    ("num_hidden_layers", 10**9),
    ("vocab_size", 10**18),
    ("visual", [1]),
]


@pytest.mark.parametrize(("word", "value"), WRONG)
def test_a_value_that_is_none_is_one_line_that_names_it(model: MultimodalLM, word: str, value: Any) -> None:
    config = config_json.config_of(model, image_start_id=7)
    config_json.completed(config, manifest(model))
    (config["visual"] if "." in word else config)[word.rpartition(".")[2]] = value
    with pytest.raises(ValueError, match=rf"^config\.json says {word} .*fetch it again$") as error:
        config_json.completed(config, manifest(model))
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_a_qwen_vl_of_a_view_that_patches_do_not_divide_names_config_json(tmp_path: Path, model: MultimodalLM) -> None:
    folder = making.publish_qwen_vl(tmp_path / "in", model)
    config = json.loads((folder / "config.json").read_text())
    config["visual"]["image_size"] = 130
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says visual.patch_size 4, but its visual.image_size 130 is"):
        inspect(folder)


def test_an_index_that_names_files_outside_the_folder_is_refused(tmp_path: Path, model: MultimodalLM) -> None:
    folder = making.publish(tmp_path / "in", model, shard_bytes=60_000)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    name = next(iter(told["weight_map"]))
    shutil.copyfile(folder / told["weight_map"][name], tmp_path / "stolen.safetensors")
    for outside in ("../stolen.safetensors", str(tmp_path / "stolen.safetensors")):
        index.write_text(json.dumps(told | {"weight_map": told["weight_map"] | {name: outside}}))
        with pytest.raises(ValueError, match="is no safetensors file of this folder"):
            import_weights([folder], tmp_path / "out", Asked())


# Qwen-VL, and weights of another grid

STAGE = Stage(name="monkey_finetune", parents=["monkey_finetune"], parent_may_lack=[ADAPTER_GLOB])


@pytest.mark.slow
def test_a_qwen_vl_is_the_beginning_of_a_monkey_and_says_so(
    tmp_path: Path, model: MultimodalLM, qwen_vl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = making.publish_qwen_vl(tmp_path / "in", model)
    assert main(["weights", "import", str(published), str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    assert "qwen_vl, " in told and "0 missing" in told
    assert "the beginning of a Monkey of any grid of windows, whose adapters are not in it and start as no-ops" in told
    export_weights(tmp_path / "ours", tmp_path / "out")
    assert_same(published, tmp_path / "out")
    lines = dict(inspect(qwen_vl).lines)
    assert lines["mapped"].startswith("100 %") and lines["adapters"] == "no window"
    assert not (qwen_vl / "model.yaml").exists()
    import_weights([making.publish(tmp_path / "monkey", model)], tmp_path / "whole", Asked())
    for path in (published, qwen_vl):
        with pytest.raises(ValueError, match=r"lacks \d+ of the model's tensors .*_lora"):
            load_named(path, model=tmp_path / "whole" / "model.yaml")


@pytest.mark.parametrize("image_px", [(16, 16), pytest.param(WIDE, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_monkey_of_any_grid_begins_as_the_qwen_vl_with_adapters_that_do_nothing(
    model: MultimodalLM, qwen_vl: Path, image_px: tuple[int, int]
) -> None:
    for load in (
        lambda made: load_first_weights(made, [str(qwen_vl)], made.identity),
        lambda made: load_parent(made, qwen_vl, stage=STAGE, identity=made.identity),
    ):
        made = making.model_of(making.build_node(image_px), seed=5)
        bare = making.model_of(making.build_node(image_px, adapters=False))
        load(made)
        own = made.state_dict()
        assert all(torch.equal(own[n], t) for n, t in model.state_dict().items() if "_lora." not in n)
        assert not any(t.any() for n, t in own.items() if n.endswith("lora_b.weight"))
        bare.load_state_dict({n: t for n, t in own.items() if "_lora." not in n})
        assert made.vision is not None and bare.vision is not None
        pixels = torch.randint(0, 256, (1, 3, *image_px), dtype=torch.uint8)
        assert torch.equal(made.vision(pixels), bare.vision(pixels))


@pytest.mark.slow
def test_adapters_for_another_grid_are_refused_with_what_to_do_and_can_be_left_out(
    tmp_path: Path, model: MultimodalLM, published: Path
) -> None:
    import_weights([published], tmp_path / "ours", Asked())
    six = making.model_of(making.build_node(WIDE), seed=5)
    before = {name: tensor.clone() for name, tensor in six.state_dict().items()}
    for load in (
        lambda path: load_first_weights(six, [str(path)], six.identity),
        lambda path: load_parent(six, path, stage=STAGE, identity=six.identity),
    ):
        with pytest.raises(ValueError, match=r"windows=2 x 2, this run has windows=2 x 3; .* --leave-out") as error:
            load(tmp_path / "ours")
        assert "\n" not in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in six.state_dict().items())
    words = ["weights", "import", str(published), str(tmp_path / "base"), "--leave-out", "*visual*_lora*"]
    assert main(words) == 0
    load_parent(six, tmp_path / "base", stage=STAGE, identity=six.identity)
    own = six.state_dict()
    assert all(torch.equal(own[n], before[n] if "_lora." in n else model.state_dict()[n]) for n in own)
    with pytest.raises(ValueError, match="--leave-out: glob 'x' matches no"):
        import_weights([published], tmp_path / "none", Asked(leave_out=("x",)))
