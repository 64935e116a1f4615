"""The console script: marks as typed, one line for every error."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from bestiary import cli
from bestiary.cli import _parser, main
from bestiary.inference.pictures import box, point
from bestiary.schema import Sample, Turn
from data_modules.shards import write_samples


def test_marks_keep_the_order_they_were_typed_in() -> None:
    args = _parser().parse_args(["ask", "run", "a.png", "What?", "--box", "0,0,50,100", "--point", "10,20"])
    assert args.marks == [box(0, 0, 50, 100), point(10, 20)]


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", ""])
def test_a_malformed_point_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", "run", "a.png", "What?", f"--point={text}"])
    assert f"{text!r} is not 2 numbers" in capsys.readouterr().err


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


@pytest.mark.parametrize("words", [["ask", "run", "{}", "What?"], ["chat", "run", "--image", "{}"]])
def test_a_broken_picture_is_named_before_any_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 none")
    assert main([word.format(tmp_path / "broken.jpg") for word in words]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: picture {tmp_path / 'broken.jpg'}: the image is ") and said.count("\n") == 1


def test_the_module_runs_as_the_script_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bestiary", "runs", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(cli.__file__, run_name="__main__")
    assert end.value.code == 1 and capsys.readouterr().err.startswith("error: no run below")
