"""Visual words: what the picture and the metrics say of them is what the model computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bestiary.cli import main
from bestiary.config import Cluster
from bestiary.schema import Example, Sample, Turn
from bestiary.training.fit import fit
from bestiary.training.resuming import open_run
from bestiary.training.run_dir import RunDir
from bestiary.variants.ovis.module import OvisModule
from bestiary.variants.ovis.processor import OvisProcessor
from bestiary.variants.ovis.usage import WordUsage
from bestiary.variants.ovis.visual_tokenizer import OvisVision
from bestiary.variants.ovis.words import lines, look, nearest_tokens
from bestiary.variants.ovis.words_picture import draw
from bestiary.weights.importing import Asked, import_weights
from data_modules.collate import collate_rows
from tests.training.tiny import DOMAINS, SOURCES, TinyData, tiny_stage
from tests.variants.test_ovis import TALL, WIDE, picture, processor, sample, tiny
from tests.weights import ovis_making as making


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """One rank."""
    return tensor


@pytest.mark.parametrize("version", ["1.0", "1.5", "1.6"])
def test_words_entropies_and_near_texts_are_the_models_own(version: str) -> None:
    model = tiny(version).eval()
    made_by = processor(model, version)
    assert isinstance(model.vision, OvisVision)
    found = look(model, made_by, WIDE, top=4)
    pixels = torch.from_numpy(made_by.prompt(Sample("k", "", "", (Turn("human", "<image>"),), (WIDE,))).pixels)
    assert len(found.canvases) == len(pixels)
    with torch.no_grad():
        probabilities = model.vision.probabilities(model.vision.features(pixels))
    for canvas, expected in zip(found.canvases, probabilities, strict=True):
        shares, words = expected.sort(descending=True)
        assert (canvas.words == words[:, :4].numpy()).all()
        np.testing.assert_allclose(canvas.shares, shares[:, :4].numpy(), rtol=1e-5)
        entropy = -(expected.double() * expected.double().log()).sum(-1)
        np.testing.assert_allclose(canvas.entropy, entropy.numpy(), rtol=1e-6)
        assert sum(n for _, n, _ in canvas.frequent()) == canvas.side**2 == len(words)
    text = model.decoder.model.get_input_embeddings().weight[: made_by.tokenizer.vocab_size]
    for word, near in found.nearest.items():
        cosines = torch.nn.functional.cosine_similarity(model.vision.table.weight[word][None], text)
        assert [c for _, c in near] == pytest.approx(cosines.topk(3).values.tolist(), abs=1e-5)


def test_the_nearest_tokens_do_not_depend_on_how_many_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, texts = torch.randn(3, 5), torch.randn(50, 5)
    ids, cosines = nearest_tokens(rows, texts, 4)
    monkeypatch.setattr("bestiary.variants.ovis.words.CHUNK", 21)
    again, same = nearest_tokens(rows, texts, 4)
    assert torch.equal(ids, again)
    torch.testing.assert_close(cosines, same)


@pytest.mark.parametrize(("side", "patch"), [(20, 5), pytest.param(64, 4, marks=pytest.mark.slow)])
def test_the_picture_has_a_panel_for_each_view_of_small_and_large_grids(side: int, patch: int) -> None:
    backbone = {
        "kind": "clip",
        "image_px": side,
        "patch_px": patch,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_dim": 16,
    }
    model = tiny("1.0", backbone=backbone).eval()
    found = look(model, processor(model, "1.0"), TALL)
    drawn = draw(found)
    [canvas] = found.canvases
    assert drawn.width >= 3 * 480 * 0.95 and drawn.height > 480
    heat = np.asarray(drawn)[30:, 2 * drawn.width // 3 + 20 :]
    assert len(np.unique(heat.reshape(-1, 3), axis=0)) > 5, "entropies differ, and so do their colours"
    assert lines(found)[0].startswith(f"canvas 1: {canvas.side} x {canvas.side} patches")


@pytest.mark.slow
def test_the_command_writes_the_picture_and_says_what_it_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_weights([making.publish(tmp_path / "in", making.CASES[0].values[0])], tmp_path / "ours", Asked())
    (tmp_path / "a.png").write_bytes(WIDE)
    words = ["ovis", "words", str(tmp_path / "ours"), str(tmp_path / "a.png"), "--out"]
    assert main([*words, str(tmp_path / "new" / "w.png"), "--top", "2"]) == 0
    told = capsys.readouterr().out
    assert "mean entropy" in told and "near" in told and told.endswith("w.png\n")
    assert Image.open(tmp_path / "new" / "w.png").width > 1000
    for wrong, said in ((["x.odd"], "name a .png"), ([str(tmp_path / "w.png"), "--top", "0"], "top=0: give 1 to")):
        assert main([*words, *wrong]) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert said in error[-1]


def test_a_model_without_visual_words_is_one_line() -> None:
    model = tiny("1.0", connector="mlp")
    with pytest.raises(ValueError, match="no visual words"):
        look(model, processor(model, "1.0"), WIDE)


@pytest.mark.parametrize("tokenize", ["softmax", "st_argmax", "gumbel_argmax"])
def test_usage_counts_what_training_chooses_without_changing_it(tokenize: str) -> None:
    model = tiny("1.0", tokenize=tokenize).train()
    vision = model.vision
    assert isinstance(vision, OvisVision)
    batch = collate_rows(
        [[processor(model, "1.0")(sample("<image>", WIDE))], [processor(model, "1.0")(sample("<image>", TALL))]]
    )
    torch.manual_seed(1)
    plain = model(batch).values
    vision.usage = WordUsage()
    vision.usage.begin(is_full=True)
    torch.manual_seed(1)
    counted = model(batch).values
    counted.sum().backward()
    assert torch.equal(plain, counted)
    with torch.no_grad():
        expected = vision.probabilities(vision.features(batch.pixels)).flatten(0, 1).double()
    told = vision.usage.numbers(expected.shape[1], expected.device, summed)
    assert told["words/used"] == pytest.approx(len(expected.argmax(-1).unique()) / expected.shape[1])
    mean = expected.mean(0)
    assert told["words/perplexity"] == pytest.approx(math.exp(-float((mean * mean.log()).sum())), rel=1e-5)
    assert told["words/entropy"] == pytest.approx(-float((expected * expected.log()).sum(-1).mean()), rel=1e-5)
    model.eval()(collate_rows([[processor(model, "1.0")(sample("<image>", TALL))]]))
    assert vision.usage.numbers(expected.shape[1], expected.device, summed) == told, "evaluation does not count"


def test_used_words_add_up_over_steps_and_the_rest_is_of_the_last_one() -> None:
    usage = WordUsage()
    one_hot = torch.eye(4)
    for step, word in enumerate((0, 0, 3)):
        usage.begin(is_full=step == 2)
        usage.add(one_hot[word : word + 1])
    told = usage.numbers(4, torch.device("cpu"), summed)
    assert told == {"words/used": 0.5, "words/perplexity": 1.0, "words/entropy": 0.0}
    usage.begin(is_full=True)
    assert usage.numbers(4, torch.device("cpu"), summed) == {}


def test_a_resumed_module_knows_the_words_that_were_used_before() -> None:
    stage = tiny_stage(freeze=[])
    before, after = (OvisModule(tiny("1.0"), replace(stage)) for _ in range(2))
    assert before.rank_state() == {}
    usage = before.vision.usage
    assert usage is not None
    usage.add(torch.eye(38)[[3, 7]])
    after.set_rank_state(before.rank_state())
    assert torch.equal(after.rank_state()["words_used"], before.rank_state()["words_used"])
    assert after.vision.usage is not None and after.vision.usage.used is not None
    assert after.vision.usage.used.nonzero()[:, 0].tolist() == [3, 7]


class _Pictures(TinyData):
    """The same few pictures in turn; breaks at one step."""

    def __init__(self, made_by: OvisProcessor, breaks_at: int) -> None:
        super().__init__(lanes=2, micro=1)
        self.breaks_at = breaks_at
        images = [picture(55, 18, seed=n) for n in range(4)]
        self.made = [
            replace(made_by(sample("<image>", image)), source=SOURCES[0], domain=DOMAINS[0]) for image in images
        ]

    def row(self, lane: int, step: int) -> list[Example]:
        """One example."""
        if step == self.breaks_at:
            raise OSError("the disk is gone")
        return [self.made[(2 * step + lane) % len(self.made)]]


def trained(
    path: Path, *, resume: bool = False, breaks_at: int = -1, tokenize: str = "softmax"
) -> tuple[OvisModule, list[dict[str, Any]]]:
    """A run of five steps, and its metrics without their times."""
    model = tiny("1.0", tokenize=tokenize)
    stage = tiny_stage(freeze=[], max_steps=5, batch_size=2, checkpoint_every=1, log_every=2)
    run, checkpoint = open_run(path, resume=resume, stage=stage.name, config="a: 1\n", resolved="a: 1\n")
    module = OvisModule(model, stage, seed=3, sources=SOURCES, domains=DOMAINS)
    data = _Pictures(processor(model, "1.0"), breaks_at)
    fit(module, data, run=run, cluster=Cluster(threads=1), checkpoint=checkpoint)
    kept = ("step", "loss", "measured")
    return module, [{k: line[k] for k in kept if k in line} for line in RunDir(path).metrics.read()]


@pytest.mark.slow
def test_gumbel_words_are_trained_at_the_temperature_of_their_step(tmp_path: Path) -> None:
    module, _ = trained(tmp_path / "run", tokenize="gumbel_argmax")
    assert module.vision.tau == pytest.approx(5.0 - (5.0 - 0.05) * 4 / 5), "that of the last of five steps"


@pytest.mark.slow
def test_usage_is_measured_where_metrics_are_logged_and_goes_on_exactly_after_a_resume(tmp_path: Path) -> None:
    whole, expected = trained(tmp_path / "whole")
    assert [sorted(line.get("measured", {})) for line in expected] == [
        [], ["words/entropy", "words/perplexity", "words/used"]] * 2 + [[]]  # fmt: skip
    shares = [line["measured"]["words/used"] for line in expected if "measured" in line]
    assert 0 < shares[0] <= shares[1] <= 1
    with pytest.raises(OSError, match="disk is gone"):
        trained(tmp_path / "cut", breaks_at=3)
    again, lines_after = trained(tmp_path / "cut", resume=True)
    assert lines_after == expected
    assert torch.equal(again.rank_state()["words_used"], whole.rank_state()["words_used"])
