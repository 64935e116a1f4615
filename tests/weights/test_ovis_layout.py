"""Ovis' published folders: each name has its place, what goes in comes out, what does not fit is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bestiary.cli import main
from bestiary.inference import Session
from bestiary.saved_run import load_named
from bestiary.training.parents import load_first_weights
from bestiary.variants.hf_folder import Format
from bestiary.variants.ovis.config_json import HEAD, completed, vision_arguments
from bestiary.weights.exporting import export_weights
from bestiary.weights.importing import Asked, import_weights
from bestiary.weights.inspecting import inspect
from tests.parity.cases import ROOT, cases, read_bytes
from tests.parity.ovis_cases import Case
from tests.weights import ovis_making as making

LISTS = cases("ovis/manifests", Path.is_dir)
FIRST_FAST = [
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if number else [])
    for number, case in enumerate(making.CASES)
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of the first case."""
    return making.publish(tmp_path_factory.mktemp("ovis") / "in", making.CASES[0].values[0])


@pytest.mark.slow
@pytest.mark.parametrize("folder", LISTS)
def test_every_name_of_the_published_models_has_its_place(tmp_path: Path, folder: Path) -> None:
    names = {file.name.removesuffix(".xz") for file in folder.iterdir()}
    assert names
    for name in names:
        (tmp_path / name).write_bytes(read_bytes(folder / name))
        told = json.loads((tmp_path / name).read_text())
        lines = dict(inspect(tmp_path / name).lines)
        assert lines["variant"] == "ovis (model_type ovis)"
        assert lines["mapped"].startswith(f"100 % of {len(told['params']):,} names: {len(told['params']):,} matched")
        assert f"{told['_counts']['total']:,} parameters" in lines["size"]


@pytest.mark.parametrize(("times", "stride", "views"), [(1, 1, 1), (4, 2, 1), (2, 1, 5), (8, 2, 5)])
def test_stride_and_views_that_no_config_tells_are_read_off_the_head(times: int, stride: int, views: int) -> None:
    backbone = {"model_type": "siglip_vision_model", "hidden_size": 16}
    told = {"visual_tokenizer_config": {"vocab_size": 9, "backbone_config": backbone}}
    found = vision_arguments(completed(told, {HEAD: (9, 16 * times)}) | {"llm_config": {}})
    assert (found["stride"], found["num_views"]) == (stride, views)


def test_a_list_of_names_that_lacks_one_is_not_whole(tmp_path: Path) -> None:
    file = sorted((ROOT / "ovis/manifests").iterdir())[0]
    told = json.loads(read_bytes(file.with_name(file.name.removesuffix(".xz"))))
    del told["params"]["llm.model.norm.weight"]
    (tmp_path / "m.json").write_text(json.dumps(told))
    found = inspect(tmp_path / "m.json").fit
    assert found is not None and found.missing == ("llm.model.norm.weight",)


@pytest.mark.parametrize("folder", FIRST_FAST)
@pytest.mark.parametrize(("kind", "shard_bytes"), [("safetensors", 1 << 40), ("bin", 90_000)])
def test_a_folder_goes_in_and_comes_out_as_it_was(tmp_path: Path, folder: Path, kind: Format, shard_bytes: int) -> None:
    published = making.publish(tmp_path / "in", folder, kind=kind, shard_bytes=shard_bytes)
    done = import_weights([published], tmp_path / "ours", Asked())
    assert not done.fit.missing and not done.fit.unexpected and done.has_tokenizer
    for path in (published, tmp_path / "ours"):
        assert dict(inspect(path).lines)["mapped"].startswith("100 %")
    export_weights(tmp_path / "ours", tmp_path / "out")
    making.assert_same(published, tmp_path / "out")


@pytest.mark.parametrize("folder", FIRST_FAST)
def test_an_imported_folder_knows_its_model_and_answers_as_the_golden_does(tmp_path: Path, folder: Path) -> None:
    published, case = making.publish(tmp_path / "in", folder), Case(folder)
    import_weights([published], tmp_path / "ours", Asked())
    session = Session.from_weights(tmp_path / "ours")
    # No folder says how many tiles the golden's runs took of one picture.
    assert session.processor.version == case.version  # type: ignore[attr-defined]
    case.model.eval()
    for told in case.results["generation"][:1]:
        prompt, own = (p.prompt(case.question(told)) for p in (session.processor, case.processor()))
        assert (prompt.ids == own.ids).all() and (prompt.pixels == own.pixels).all()
        [ids] = session.model.generate([prompt], max_new_tokens=8)
        assert ids == case.model.generate([own], max_new_tokens=8)[0]


def test_the_published_folder_itself_is_read_with_its_model_named(tmp_path: Path, first: Path) -> None:
    import_weights([first], tmp_path / "ours", Asked())
    node = tmp_path / "ours" / "model.yaml"
    ours, theirs = load_named(tmp_path / "ours"), load_named(first, model=node)
    states = [pieces.model.state_dict() for pieces in (ours, theirs)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert ours.identity == theirs.identity
    with pytest.raises(ValueError, match=r"no model\.yaml"):
        load_named(first)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("llm_config__num_attention_heads", 1),
        ("llm_config__rope_theta", 5.0),
        ("visual_tokenizer_config__backbone_config__num_attention_heads", 1),
        ("visual_tokenizer_config__backbone_config__hidden_act", "relu"),
        ("visual_tokenizer_config__tokenize_function", "st_argmax"),
    ],
)
def test_a_config_of_another_model_is_told_although_no_shape_shows_it(
    tmp_path: Path, first: Path, word: str, value: object
) -> None:
    import_weights([first], tmp_path / "ours", Asked())
    node = tmp_path / "model.yaml"
    shutil.copyfile(tmp_path / "ours" / "model.yaml", node)
    other = shutil.copytree(first, tmp_path / "other")
    making.changed(other, **{word: value})
    with pytest.raises(ValueError, match=rf"config\.json says .*={value}"):
        load_named(other, model=node)


def test_training_takes_an_imported_folder_as_its_first_weights(tmp_path: Path, first: Path) -> None:
    import_weights([first], tmp_path / "ours", Asked())
    case = Case(making.CASES[0].values[0])
    expected = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    for parameter in case.model.parameters():
        parameter.data.zero_()
    load_first_weights(case.model, [str(tmp_path / "ours")], {})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in case.model.state_dict().items())


@pytest.mark.slow
def test_another_format_or_number_of_files_holds_the_same_tensors(tmp_path: Path, first: Path) -> None:
    import_weights([first], tmp_path / "ours", Asked())
    words = [
        "weights",
        "export",
        str(tmp_path / "ours"),
        str(tmp_path / "bin"),
        "--layout",
        "ovis-bin",
        "--shards",
        "3",
    ]
    assert main(words) == 0
    assert len(list((tmp_path / "bin").glob("pytorch_model-*.bin"))) == 3
    import_weights([tmp_path / "bin"], tmp_path / "again", Asked())
    export_weights(tmp_path / "again", tmp_path / "back", layout="ovis-safetensors")
    one, other = (inspect(path) for path in (first, tmp_path / "back"))
    assert dict(one.lines)["size"] == dict(other.lines)["size"]
    states = [load_named(tmp_path / name).model.state_dict() for name in ("ours", "again")]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


BAD = {
    "a decoder of another family": ({"llm_config__model_type": "gpt2"}, "gpt2.*qwen2, llama, gemma2"),
    "eyes of Ovis 2": ({"visual_tokenizer_config__model_type": "aimv2_visual_tokenizer"}, "aimv2.*siglip"),
    "a table of another vocabulary": ({"visual_tokenizer_config__vocab_size": 7}, r"7 visual words .* vte\.weight has"),
    "a decoder of another size": ({"llm_config__intermediate_size": 8}, "of another shape"),
    "turns of a format unknown": ({"conversation_formatter_class": "Phi3Formatter"}, "Phi3Formatter.*Llama3Conv"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(tmp_path: Path, first: Path, kind: str) -> None:
    words, pattern = BAD[kind]
    folder = shutil.copytree(first, tmp_path / "in")
    making.changed(folder, **words)
    with pytest.raises(ValueError, match=pattern) as error:
        import_weights([folder], tmp_path / "out", Asked())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["llm_config", "visual_tokenizer_config.backbone_config"])
def test_a_config_that_leaves_out_the_heads_is_refused_for_no_shape_shows_them(
    tmp_path: Path, first: Path, part: str
) -> None:
    folder = shutil.copytree(first, tmp_path / "in")
    told = target = json.loads((folder / "config.json").read_text())
    for word in part.split("."):
        target = target[word]
    del target["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"does not say {part}\.num_attention_heads"):
        import_weights([folder], tmp_path / "out", Asked())
    assert not (tmp_path / "out").exists()
