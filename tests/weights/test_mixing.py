"""Mixed weights: a line between two models, whose ends are the models themselves, and a parent like them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from bestiary.config import Stage
from bestiary.training.checkpoints import TrainState, header, write
from bestiary.training.parents import load_parent
from bestiary.weights.mixing import mix
from bestiary.weights.ours import OurTensors

Tensors = dict[str, torch.Tensor]
IDENTITY = {"tokenizer": "abc"}


def _tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "decoder.0.weight": drawn(4, 3),
        "decoder.0.bias": drawn(4).bfloat16(),
        "vision.weight": torch.arange(6.0).reshape(2, 3) / 7,  # frozen: the same in both
        "vision.steps": torch.tensor([3]),
    }


def _file(path: Path, tensors: Tensors, *, stage: str = "s", identity: dict[str, str] | None = None) -> Path:
    says = header(TrainState(step=5, stage=stage, seed=0, identity=identity or IDENTITY))
    save_file(tensors, path, metadata=says)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return _file(tmp_path / "a.safetensors", _tensors(1)), _file(tmp_path / "b.safetensors", _tensors(2))


def _mixed(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def test_the_ends_of_the_line_are_the_models_bit_for_bit(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for beta, expected in ((1, _tensors(1)), (0, _tensors(2))):
        mix(*pair, tmp_path / str(beta), beta=beta)
        found = _mixed(tmp_path / str(beta))
        assert found.keys() == expected.keys()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("beta", [0.25, -0.5, 1.75])
def test_every_value_lies_where_the_formula_says(tmp_path: Path, pair: tuple[Path, Path], beta: float) -> None:
    a, b = _tensors(1), _tensors(2)
    done = mix(*pair, tmp_path / "out", beta=beta)
    assert (done.num_tensors, done.mixed, done.equal) == (4, 2, 2)
    found = _mixed(tmp_path / "out")
    for name in ("decoder.0.weight", "decoder.0.bias"):
        exact = beta * a[name].double() + (1 - beta) * b[name].double()
        torch.testing.assert_close(
            found[name], exact.to(a[name].dtype), rtol=1e-6 if "weight" in name else 1e-2, atol=1e-6
        )
    assert torch.equal(found["vision.weight"], a["vision.weight"])  # 0.25 x + 0.75 x rounds; equal tensors stay


def test_parts_have_their_own_share_and_the_last_glob_wins(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    mix(*pair, tmp_path / "out", beta=0.5, parts=[("decoder.*", 0.0), ("*.bias", 1.0)])
    found = _mixed(tmp_path / "out")
    assert torch.equal(found["decoder.0.weight"], _tensors(2)["decoder.0.weight"])
    assert torch.equal(found["decoder.0.bias"], _tensors(1)["decoder.0.bias"])
    with pytest.raises(ValueError, match=r"--part: glob 'decoder\.1\.\*' matches no .* nearest: decoder\.0"):
        mix(*pair, tmp_path / "no", beta=0.5, parts=[("decoder.1.*", 0.0)])
    assert not (tmp_path / "no").exists()


def test_a_mix_is_a_parent_that_says_where_it_came_from(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
        state = TrainState(step=3, stage="s", seed=0, identity=IDENTITY)
        write(tmp_path / name / "checkpoints", state, model=tensors, optimizer={}, rng={}, keep=0)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"model": {"build": {"heads": 2}}, "seed": seed}))
    out = tmp_path / "out"
    mix(tmp_path / "a", tmp_path / "b", out, beta=0.5)
    parent = load_parent(model, out, stage=Stage(name="next", parents=["s"]), identity=IDENTITY)
    assert parent.stage == "s" and yaml.safe_load((out / "config.yaml").read_text())["seed"] == 0
    one, other = OurTensors(tmp_path / "a"), OurTensors(tmp_path / "b")
    torch.testing.assert_close(model[0].weight.detach(), (one["0.weight"] + other["0.weight"]) / 2)
    told = json.loads((parent.path / "mixed.json").read_text())
    assert told == {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "beta": 0.5, "parts": []}
    with pytest.raises(ValueError, match="starts from other"):
        load_parent(model, out, stage=Stage(name="next", parents=["other"]), identity=IDENTITY)
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump({"model": {"build": {"heads": 4}}}))
    with pytest.raises(ValueError, match=r"model\.build\.heads=2 but .* 4; mix two runs of one model"):
        mix(tmp_path / "a", tmp_path / "b", tmp_path / "no", beta=0.5)


def _spoilt(what: str) -> dict[str, Any]:
    tensors = _tensors(2)
    if what == "shape":
        tensors["decoder.0.weight"] = torch.zeros(4, 5)
    if what == "name":
        tensors["decoder.1.weight"] = tensors.pop("decoder.0.weight")
    if what == "integer":
        tensors["vision.steps"] = torch.tensor([4])
    if what == "overflow":
        tensors["decoder.0.weight"] = torch.full((4, 3), 3e38)
    more: dict[str, Any] = {"stage": {"stage": "t"}, "tokenizer": {"identity": {"tokenizer": "other"}}}.get(what, {})
    return {"tensors": tensors, **more}


REFUSED = {
    "shape": r"decoder\.0\.weight is \(4, 3\) in .*a\.safetensors but \(4, 5\) in .*b\.safetensors",
    "name": r"lacks 1 of the tensors .* first decoder\.0\.weight \(nearest: decoder\.1\.weight",
    "integer": r"vision\.steps holds torch\.int64, which differ",
    "overflow": r"decoder\.0\.weight would not be finite",
    "stage": "is of stage s but .* of stage t",
    "tokenizer": "made with tokenizer=other",
    "base": "bestiary weights merge",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_mixed_is_one_line_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    a = _file(tmp_path / "a.safetensors", _tensors(1))
    b = _file(tmp_path / "b.safetensors", **_spoilt(what))
    if what == "base":
        b = _file(tmp_path / "b.safetensors", _tensors(2), identity=IDENTITY | {"base": "x"})
    with pytest.raises(ValueError, match=REFUSED[what]) as caught:
        mix(a, b, tmp_path / "out", beta=-3.0)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_share_that_is_no_number_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for beta, parts in ((float("nan"), []), (0.5, [("*", float("inf"))])):
        with pytest.raises(ValueError, match="which is no coefficient"):
            mix(*pair, tmp_path / "out", beta=beta, parts=parts)
