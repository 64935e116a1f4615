"""A trained Ovis that never was an import is published as one, from its run's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from bestiary.cli import main
from bestiary.config import Data, Model, Run, Source, Stage
from bestiary.inference import Session
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import load_named
from bestiary.training.checkpoints import TrainState, write
from bestiary.variants.ovis import config_json
from bestiary.weights.exporting import export_weights, first_export
from bestiary.weights.importing import Asked, import_weights
from tests.variants.test_ovis import TOKENIZER, picture, processor, tiny

BUILD = {"_target_": "bestiary.variants.ovis.model.build_ovis"}
SIZES = {"image_px": 20, "patch_px": 5, "width": 16, "layers": 3, "heads": 2, "mlp_dim": 24}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"backbone": {"kind": "clip", **SIZES}, "num_marks": 2, "keep_class": True},
    "1.5": {"backbone": {"kind": "siglip", **SIZES}, "num_marks": 2, "num_views": 5, "stride": 2},
    "1.6": {"backbone": {"kind": "siglip", **SIZES}, "num_marks": 5, "stride": 2},
}
DECODER = {
    "family": "qwen2", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 340, "max_position_embeddings": 512, "rope_theta": 5e5,
}  # fmt: skip


def run_of(folder: Path, version: str, *, tied: bool = False, **vision: Any) -> MultimodalLM:
    """A run directory as training leaves it; its model."""
    words = {**VERSIONS[version], "vocab_size": 40, **vision}
    decoder = DECODER | ({"tie_word_embeddings": True} if tied else {})
    model = tiny(version, **words)
    if tied:
        from bestiary.variants.ovis.model import build_ovis

        model = build_ovis(vision=words, decoder=decoder)
    made_by = {"_target_": "bestiary.variants.ovis.processor.OvisProcessor", "version": version, "chat_format": "qwen"}
    made_by |= {"tokenizer": str(TOKENIZER)} | ({"adaptive": True} if version == "1.5" else {})
    node = {"name": "ovis", "build": {**BUILD, "vision": words, "decoder": decoder}, "processor": made_by}
    node["module"] = {"_target_": "bestiary.variants.ovis.module.OvisModule"}
    data = Data(root="none", max_tokens=300, sources={"a": Source(path="a", weight=1.0)})
    config = OmegaConf.structured(Run(data=data, stage=Stage(name="ovis_s3", max_steps=1, batch_size=1)))
    config.stage.optimizer.lr = 0.1
    config.model = Model(**node)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.resolved.yaml")
    digest = processor(model, version).tokenizer.sha256
    state = TrainState(step=3, stage="ovis_s3", seed=0, identity={"tokenizer": digest})
    write(folder / "checkpoints", state, model=model.state_dict(), optimizer={}, rng={}, keep=0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("version", "tied"), [("1.0", False), ("1.5", True), ("1.6", False)])
def test_a_run_exports_imports_and_exports_bit_for_bit(tmp_path: Path, version: str, tied: bool) -> None:
    model = run_of(tmp_path / "run", version, tied=tied)
    export_weights(tmp_path / "run", tmp_path / "hf", num_shards=2)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) == 2
    done = import_weights([tmp_path / "hf"], tmp_path / "ours", Asked())
    assert not done.fit.missing and not done.fit.unexpected and done.has_tokenizer
    again = load_named(tmp_path / "ours").model
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    export_weights(tmp_path / "ours", tmp_path / "back")
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    sessions = [Session.from_run(tmp_path / "run"), Session.from_weights(tmp_path / "ours")]
    answers = [session.respond(picture(55, 41), "What?", max_new_tokens=6) for session in sessions]
    assert answers[0] == answers[1]
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert told["conversation_formatter_class"] == "QwenConversationFormatter"
    assert told["llm_config"]["rope_theta"] == DECODER["rope_theta"]
    assert (tied and "llm.lm_head.weight" not in done.published.tensors) or not tied


@pytest.mark.slow
def test_a_trained_run_takes_the_files_of_the_import_it_began_as(tmp_path: Path) -> None:
    run_of(tmp_path / "first", "1.0")
    export_weights(tmp_path / "first", tmp_path / "hf")
    import_weights([tmp_path / "hf"], tmp_path / "ours", Asked())
    model = run_of(tmp_path / "run", "1.0")
    assert (
        main(["weights", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--like", str(tmp_path / "ours")]) == 0
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["vte.weight"], model.state_dict()["vision.table.weight"])
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def told_of(folder: Path) -> dict[str, Any]:
    """config.json as an export writes it, its layout asked alone."""
    made = first_export(folder, step=3)
    assert made is not None
    told: dict[str, Any] = json.loads(made[1].texts["config.json"])
    return told


def test_an_export_tells_the_temperature_of_the_last_step_and_the_version_of_a_clip(tmp_path: Path) -> None:
    run_of(tmp_path / "gumbel", "1.0", tokenize="gumbel_argmax")
    run = OmegaConf.load(tmp_path / "gumbel" / "config.resolved.yaml")
    run.stage.max_steps, run.model.module.max_tau = 4, 9.0
    OmegaConf.save(run, tmp_path / "gumbel" / "config.resolved.yaml")
    told = told_of(tmp_path / "gumbel")
    assert told["visual_tokenizer_config"]["tau"] == pytest.approx(9 - (9 - 0.05) * 2 / 4)
    assert (config_json.version_of(told), config_json.VERSION in told) == ("1.0", False)
    run.model.processor.version = "1.5"
    OmegaConf.save(run, tmp_path / "gumbel" / "config.resolved.yaml")
    assert config_json.version_of(told_of(tmp_path / "gumbel")) == "1.5"
    with pytest.raises(ValueError, match=r"version='1\.7' of Ovis is unknown"):
        config_json.version_of(told | {config_json.VERSION: "1.7"})


def test_a_baseline_without_visual_words_has_no_published_layout(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "1.0", connector="linear")
    with pytest.raises(ValueError, match="connector=linear has no published layout"):
        export_weights(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
