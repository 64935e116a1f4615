"""What a Monkey's run trained, apart from its base and on it again; a decoder's adapters taken in by plain weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.cli import main
from bestiary.inference import Session
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import load_saved_run
from bestiary.saved_weights import open_weights
from bestiary.training.parents import load_first_weights
from bestiary.weights.importing import Asked, import_weights
from bestiary.weights.merging import merge
from bestiary.weights.trained import export_trained
from tests.inference.test_monkey_session import PICTURE
from tests.weights import monkey_making as making

pytestmark = pytest.mark.slow
LORA = {"rank": 2}
TRAINED = ("vision.resampler.", "_lora.")


def base_of(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """An imported Qwen-VL."""
    model = making.model_of(making.build_node(adapters=False), seed=seed, spread=0.3)
    import_weights([making.publish_qwen_vl(folder / "hf", model, dtype=dtype)], folder / "ours", Asked())
    return folder / "ours"


def trained_on(base: Path, folder: Path, *, seed: int = 3) -> tuple[Path, MultimodalLM]:
    """A run of the variant for small GPUs: all that it trains is another than in its beginning."""
    node = making.build_node(decoder_lora=LORA)
    model = making.model_of(node)
    load_first_weights(model, [str(base)], {})
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in TRAINED):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return making.run_of(folder, node, model, [base], base / "qwen.tiktoken"), model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultimodalLM]:
    """A run on a Qwen-VL in bfloat16, and its model."""
    folder = tmp_path_factory.mktemp("adapters")
    return trained_on(base_of(folder, dtype=torch.bfloat16), folder / "run")


def test_what_trained_is_taken_out_and_is_the_run_again_on_its_base_bit_for_bit(
    tmp_path: Path, run: tuple[Path, MultimodalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = run
    assert main(["weights", "adapter", str(path), str(tmp_path / "own")]) == 0
    assert "tensors that trained" in capsys.readouterr().out
    own = open_weights(tmp_path / "own")
    expected = {name for name in model.state_dict() if any(part in name for part in TRAINED)}
    assert set(own.tensors) == expected and own.absent == model.state_dict().keys() - expected
    done = merge(tmp_path / "own", tmp_path / "whole")
    assert (done.num_tensors, done.trained) == (len(model.state_dict()), len(expected))
    whole = open_weights(tmp_path / "whole")
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert whole.identity == open_weights(path).identity
    state = load_saved_run(tmp_path / "own").model.state_dict()
    assert all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
        for name, tensor in model.state_dict().items()
    )


def test_what_trained_goes_on_its_own_base_alone_and_only_where_there_is_one(
    tmp_path: Path, run: tuple[Path, MultimodalLM]
) -> None:
    path, _ = run
    other = base_of(tmp_path / "other", seed=1)
    export_trained(path, tmp_path / "own")
    with pytest.raises(ValueError, match=r"holds only what it trained, on a base of sha256 \w+, but") as error:
        merge(tmp_path / "own", tmp_path / "whole", base=other)
    assert "\n" not in str(error.value) and not (tmp_path / "whole").exists()
    with pytest.raises(ValueError, match="name what it began from with --base"):
        export_trained(path, tmp_path / "none", base=path)
    with pytest.raises(ValueError, match="holds only what it trained already"):
        export_trained(tmp_path / "own", tmp_path / "again")
    assert merge(tmp_path / "own", tmp_path / "moved", base=path).num_tensors, "a Monkey is a base, too"


@torch.no_grad()
def test_plain_weights_take_in_the_decoders_adapters_and_no_others(
    tmp_path: Path, run: tuple[Path, MultimodalLM]
) -> None:
    path, model = run
    done = merge(path, tmp_path / "plain")
    assert done.adapted == 2 * 6, "q, k, v, o, up and gate of each block"
    node = OmegaConf.load(tmp_path / "plain" / "config.resolved.yaml").model
    assert node.build.decoder_lora is None and node.build.vision.adapters
    plain = load_saved_run(tmp_path / "plain").model
    assert not [name for name in plain.state_dict() if name.startswith("decoder.") and "_lora" in name]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in plain.state_dict().items() if n.startswith("vision."))
    embeds, positions = torch.randn(1, 9, 24), torch.arange(9)[None]
    expected = model.decoder(embeds, positions)
    assert (plain.decoder(embeds, positions) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="holds whole weights already"):
        merge(tmp_path / "plain", tmp_path / "again")
    with pytest.raises(ValueError, match=r"--base .* has no effect"):
        merge(path, tmp_path / "again", base=path)


def test_a_run_its_trained_part_and_its_merged_weights_answer_alike(
    tmp_path: Path, run: tuple[Path, MultimodalLM]
) -> None:
    path, _ = run
    export_trained(path, tmp_path / "own")
    merge(tmp_path / "own", tmp_path / "whole")
    folders = (path, tmp_path / "own", tmp_path / "whole")
    answers = {Session.from_run(one).respond(PICTURE, "what?", max_new_tokens=30) for one in folders}
    assert len(answers) == 1
