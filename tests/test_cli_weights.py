"""`bestiary weights` from the command line: reports, one line an error, and how much memory an import takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from bestiary.cli import main
from tests.weights import making

TOKENIZER = Path(__file__).parent / "goldens" / "sphinx" / "tiny_tokenizer.model"


def test_import_reports_and_export_gives_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.publish(tmp_path / "in", making.llama(), llama_type="llama")
    assert main(["weights", "import", str(folder), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "17 matched, 4 converted, 0 missing, 0 unexpected" in told.out
    assert told.err == "warning: no tokenizer beside the weights, so a run cannot check that it has theirs\n"
    assert main(["weights", "export", str(tmp_path / "out"), str(tmp_path / "back"), "--shards", "2"]) == 0
    making.assert_same_folders(folder, tmp_path / "back")


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.publish(tmp_path / "in", making.llama())
    words = ["weights", "import", str(folder), str(tmp_path / "out"), "--tokenizer", str(TOKENIZER)]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert "has 512 pieces but the embedding 50 rows" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
from pathlib import Path
from bestiary.weights.importing import Asked, import_weights

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

source, small, out = map(Path, sys.argv[1:])
import_weights([small], out / "small", Asked())
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
import_weights([source], out / "large", Asked())
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_an_import_needs_less_than_1_3_times_the_largest_file(tmp_path: Path) -> None:
    large = making.llama(dim=1024, layers=7, vocab=8000, heads=16, kv_heads=16, hidden=2816)
    folder = making.publish(tmp_path / "large", large, shards=2)
    small = making.publish(tmp_path / "small", making.llama())
    files = [path.stat().st_size for path in folder.glob("*.pth")]
    assert sum(files) > 190e6
    words = [sys.executable, "-c", PEAK, str(folder), str(small), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * max(files), f"{int(done.stdout) / max(files):.2f} times the largest file"


def test_a_part_is_imported_and_told_with_what_the_model_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(
        hidden_size=16, vocab_size=50, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    capsys.readouterr()
    assert main(["weights", "inspect", str(folder)]) == 0
    assert "LLaMA, for decoder" in capsys.readouterr().out
    assert main(["weights", "import", str(folder), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "LLaMA for decoder, " in told and "12 matched, 0 converted, 0 missing, 0 unexpected" in told
    assert "of sizes model.build.decoder.n_heads=4" in told and "model.build.decoder.norm_eps=1e-06" in told
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert main(["weights", "import", str(folder), str(folder), str(tmp_path / "two")]) == 1
    assert "import parts one by one" in capsys.readouterr().err
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    assert main(["weights", "import", str(folder), str(tmp_path / "no")]) == 1
    told = capsys.readouterr().err
    assert "has 512 pieces but the embedding 50 rows" in told and told.count("\n") == 1
    assert main(["weights", "import", str(tmp_path / "none"), str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_runs_are_mixed_and_differences_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate("ab"):
        state = {key: tensor + number for key, tensor in making.llama().items()}
        main(["weights", "import", str(making.publish(tmp_path / f"in_{name}", state)), str(tmp_path / name)])
    capsys.readouterr()
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert main(["weights", "mix", a, b, "--beta", "0.5", "--part", "decoder.lm_head.*=1", out]) == 0
    assert capsys.readouterr().out == f"{out}: stage unknown, 21 tensors, 21 mixed, 0 equal in both\n"
    words = ["weights", "export", out, str(tmp_path / "delta"), "--layout", "consolidated", "--delta-from", a]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "20 tensors in 2 shards" in told and "base + difference is not bit-equal in 0 of" in told
    words = ["weights", "import", str(tmp_path / "in_a"), str(tmp_path / "delta"), str(tmp_path / "back")]
    assert main(words) == 0
    mixed, back = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "back"))
    assert all(torch.equal(back[name], tensor) for name, tensor in mixed.items())
    with pytest.raises(SystemExit):
        main(["weights", "mix", a, b, "--beta", "0.5", "--part", "decoder", str(tmp_path / "no")])
    assert "is no GLOB=BETA" in capsys.readouterr().err
    assert main(["weights", "mix", a, b, "--beta", "0.5", out]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
