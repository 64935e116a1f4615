"""`bestiary weights` on goldens: published folders come back tensor by tensor, manifests map whole at full size."""

from __future__ import annotations

from pathlib import Path

import pytest

from bestiary.cli import main
from bestiary.variants.sphinx.consolidated import FILE_NAME
from tests.parity.cases import ROOT, cases
from tests.weights.making import assert_same_folders

MANIFESTS = sorted(path for path in ROOT.glob("sphinx*/**/*.json") if path.parent.name.startswith("manifest"))


def _is_case(folder: Path) -> bool:
    return any(FILE_NAME.fullmatch(path.name) for path in folder.glob("*.pth"))


@pytest.mark.parametrize("folder", cases("sphinx", _is_case))
def test_a_published_folder_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    shards = str(len(list(folder.glob("*.pth"))))
    assert main(["weights", "import", str(folder), str(tmp_path / "out")]) == 0
    back = ["weights", "export", str(tmp_path / "out"), str(tmp_path / "back")]
    assert main([*back, "--layout", "consolidated", "--shards", shards]) == 0
    assert_same_folders(folder, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=".".join(p.relative_to(ROOT).parts)) for p in MANIFESTS])
def test_a_manifest_maps_whole_at_full_size(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "inspect", str(path)]) == 0
    assert "mapped     100 % " in capsys.readouterr().out
