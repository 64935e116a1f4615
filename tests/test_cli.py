"""The console script: pixels to regions, one line for every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from bestiary.cli import main, regions_of
from bestiary.schema import Sample, Turn
from data_modules.shards import write_samples


def test_pixels_become_fractions_and_marks_are_numbered_points_first() -> None:
    point, box = regions_of(["10,20"], ["0,0,50,100"], width=100, height=200)
    assert (point.kind, point.coords, point.mark) == ("point", (0.1, 0.1), 1)
    assert (box.kind, box.coords, box.mark) == ("box", (0.0, 0.0, 0.5, 0.5), 2)


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", ""])
def test_a_malformed_point_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not 2 numbers"):
        regions_of([text], [], width=10, height=10)


def test_no_runs_is_one_line_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: no run below")


def test_check_names_the_damaged_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = (Turn("human", "a"), Turn("assistant", "b"))
    write_samples(tmp_path / "s", [Sample(f"k{i}", "s", "text", turns) for i in range(3)], source="s")
    assert main(["check", str(tmp_path / "s")]) == 0
    [shard] = (tmp_path / "s").glob("*.tar")
    damaged = bytearray(shard.read_bytes())
    damaged[600] ^= 1
    shard.write_bytes(bytes(damaged))
    assert main(["check", str(tmp_path / "s")]) == 1
    assert shard.name in capsys.readouterr().err
