"""`bestiary weights` from the command line: reports, one line an error, and how much memory an import takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bestiary.cli import main
from tests.weights import making


def test_import_reports_and_export_gives_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.publish(tmp_path / "in", making.llama(), llama_type="llama")
    assert main(["weights", "import", str(folder), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "17 matched, 4 converted, 0 missing, 0 unexpected" in told.out
    assert told.err == "warning: no tokenizer.model beside the weights, so a run cannot check that it has theirs\n"
    assert main(["weights", "export", str(tmp_path / "out"), str(tmp_path / "back"), "--shards", "2"]) == 0
    making.assert_same_folders(folder, tmp_path / "back")


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.publish(tmp_path / "in", making.llama())
    tokenizer = Path(__file__).parent / "goldens" / "sphinx" / "tiny_tokenizer.model"
    words = ["weights", "import", str(folder), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
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
