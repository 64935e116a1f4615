"""`bestiary shards`: written, checked, counted, looked at and indexed from the command line; one line an error."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bestiary.cli import main
from bestiary.cli_shards import TextLengths
from bestiary.schema import SampleError
from data_modules.adapters import FORMATS
from data_modules.shards import read_source
from tests.data_modules import making
from tests.data_modules.servers import FileServer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    turns = [{"role": "human", "text": "What is <Mark 1>?"}, {"role": "assistant", "text": "a toy"}]
    region = {"kind": "point", "coords": [0.5, 0.5], "mark": 1}
    lines = [{"images": [f"{n}.png"], "turns": turns, "regions": [region]} for n in range(9)]
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(making.picture(number))
    path = tmp_path / "toys.jsonl"
    path.write_text("".join(json.dumps(found) + "\n" for found in lines))
    return path


@pytest.fixture
def write(annotated: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str) -> int:
        words = [
            "shards",
            "write",
            "plain",
            str(annotated),
            "--images",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
        return main([*words, "--source", "toys", "--domain", "natural", "--workers", "1", *more])

    return run


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_a_source_is_written_once_and_its_rejections_are_summed_up(
    write: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write() == 1
    error = last_error(capsys)
    assert (
        "1 of 9 records were rejected, 11.1% where 1.0% are allowed (1 missing-image; first: toys.jsonl line 9 "
        in error
    )
    assert "rejected.jsonl" in error and "--max-rejected" in error
    assert write("--max-rejected", "0.2", "--licence", "CC0") == 1
    assert "(licence differ); give --overwrite" in last_error(capsys)
    assert write("--max-rejected", "0.2") == 0
    out = capsys.readouterr().out
    assert "8 samples in 1 shard," in out and "9 of 9 records were done" in out and "1  missing-image" in out
    assert write("--max-rejected", "0.2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert read_source(tmp_path / "out")[3].regions[0].coords == (0.5, 0.5)


def test_what_cannot_be_written_is_one_line_with_the_remedy(
    write: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (
        (["llvaa", "x.json", "--out", "o", "--source", "s"], "did you mean 'llava'?"),
        (["plain", "x.json", "--out", "o", "--source", "s"], "x.json: No such file or directory"),
        (["plain", "x.json", "--source", "s"], "--out is missing"),
        (["plain", "--out", "o", "--source", "s"], "ANNOTATIONS is missing"),
        (["plain", "x.json", "--out", "o", "--source", "s", "--option", "id_key"], "write it as name=value"),
        (["plain", "x.json", "--out", "o", "--source", "s", "--option", "a=b"], "--option a is unknown"),
    ):
        assert main(["shards", "write", *words]) == 1
        assert expected in last_error(capsys)
    assert write("--workers", "0") == 1 and "at least 1" in last_error(capsys)
    assert main(["shards", "write", "list"]) == 0 and "plain" in capsys.readouterr().out.split()
    assert not (tmp_path / "out/source.json").exists() and not Path("o").exists()


@pytest.mark.parametrize("command", [["shards", "check"], ["check"]])
def test_check_prints_one_line_a_problem_and_fails(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = making.source(tmp_path / "good", "good", 7).folder
    bad = making.source(tmp_path / "bad", "bad", 7, bad=[3]).folder
    assert main([*command, str(good), str(bad)]) == 0
    assert "2 sources are whole, 14 samples" in capsys.readouterr().out
    assert main([*command, str(good), str(bad), "--decode"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "sample bad-00003: image 0 cannot be decoded" in lines[0]
    assert main([*command, str(tmp_path / "none"), str(good)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "does not exist" in lines[0] and "error: 1 problem in 2 sources" in lines[1]


def test_stats_print_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.source(tmp_path / "toys", "toys", 7, domain="natural [x]").folder
    assert main(["shards", "stats", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "toys" in out and "natural [x] 7" in out


@pytest.mark.slow
def test_stats_write_numbers_and_plots_and_count_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.source(tmp_path / "toys", "toys", 7).folder
    model = ROOT / "src/bestiary/variants/sphinx_v/assets/tokenizer.model"
    assert main(["shards", "stats", str(folder), "--out", str(tmp_path / "s"), "--processor", str(model)]) == 0
    facts = json.loads((tmp_path / "s/stats.json").read_text())["toys"]
    assert facts["samples"] == 7 and facts["tokens"]["sum"] > facts["targets"]["sum"] > 7
    assert (tmp_path / "s/stats.png").stat().st_size > 10_000
    assert main(["shards", "stats", str(folder), "--processor", str(tmp_path / "none")]) == 1
    assert "run directory or a tokenizer file" in last_error(capsys)


class NoPictures(TextLengths):
    """A measure that refuses pictures."""

    def __call__(self, sample: Any) -> Any:
        if sample.images:
            raise SampleError(sample.key, "has a picture")
        return super().__call__(sample)


def test_stats_say_what_the_processor_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bestiary.cli_shards._measure", lambda path: NoPictures(str.split))
    folder = making.source(tmp_path / "toys", "toys", 9).folder
    assert main(["shards", "stats", str(folder), "--processor", str(tmp_path)]) == 0
    assert "toys: 6 of 9 refused by the processor, first toys-00000: has a picture\n" in capsys.readouterr().out


def test_wrong_numbers_and_places_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["check", "none", "--workers", "-3"], "--workers -3; it must be at least 1"),
        (["stats", "none", "--workers", "0"], "--workers 0; it must be at least 1"),
        (["stats", "none", "--out", str(tmp_path / "file")], "file is a file; name the folder"),
        (["stats", "none", "--out", str(tmp_path / "file/x")], "file is a file, no folder"),
        (["write", "plain", "x", "--source", "s", "--out", str(tmp_path / "file")], "file is a file; name the folder"),
        (["preview", "none", "--out", str(tmp_path / "file/x/y.html")], "file is a file, no folder"),
        (["preview", "none", "--out", str(tmp_path)], f"--out {tmp_path} is a folder; name the page itself"),
    ):
        assert main(["shards", *words]) == 1
        assert expected in last_error(capsys)


def test_annotations_in_a_pipe_are_refused_without_opening_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "x.jsonl")  # nobody writes to it: opening would wait for ever
    for kind in FORMATS:
        words = [kind, str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out"), "--source", "s"]
        assert main(["shards", "write", *words]) == 1
        assert "x.jsonl is no regular file but a pipe" in (error := last_error(capsys)) and "save them" in error


def test_text_lengths_count_turns_and_answers() -> None:
    assert TextLengths(lambda text: list(map(len, text.split())))(making.sample("s", 3, answer="a b")) == (2 + 2, 1, 2)


def test_a_preview_is_one_file_of_the_samples_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = making.source(tmp_path / "toys", "toys", 9).folder, tmp_path / "deep/page.html"
    assert main(["shards", "preview", str(folder), "--out", str(out), "--num", "4", "--seed", "1"]) == 0
    first = out.read_text()
    assert first.count("<article") == 4 and [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert main(["shards", "preview", str(folder), "--out", str(out), "--num", "4", "--seed", "1"]) == 0
    assert out.read_text() == first
    assert main(["shards", "preview", str(folder), "--out", str(out), "--keys", "toys-00005"]) == 0
    assert out.read_text().count("<article") == 1 and "toys-00005" in out.read_text()
    assert main(["shards", "preview", str(folder), "--out", str(out), "--keys", "toys-5"]) == 1
    assert "has the key 'toys-5'" in last_error(capsys)


def test_sources_on_a_web_server_are_checked_counted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = making.source(tmp_path / "toys", "toys", 9).folder
    with FileServer(folder) as server:
        url = server.url
        assert main(["shards", "check", url, "--decode"]) == 0
        assert main(["shards", "stats", url]) == 0
        assert main(["shards", "preview", url, "--out", str(tmp_path / "page.html")]) == 0
        assert main(["shards", "check", f"{url}/none"]) == 1
    assert "9 samples" in capsys.readouterr().out


def test_no_command_prints_the_password_of_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    making.source(tmp_path / "toys", "toys", 9)
    with FileServer(tmp_path) as server:
        url = f"{server.url.replace('//', '//u:SECRET@')}/toys"
        tar = f"{url}/shard-{{00000..00000}}.tar?sig=SECRET"
        assert main(["shards", "index", tar]) == 0
        assert main(["shards", "check", url, tar, f"{url}/none"]) == 1
        assert main(["shards", "stats", url, f"{url}?sig=SECRET", f"{url}?sig=SECRET2"]) == 0
        assert main(["shards", "preview", f"{url}?sig=SECRET", "--out", str(tmp_path / "page.html")]) == 0
        assert main(["check", url, "--domain", "natural"]) == 1
    out, err = capsys.readouterr()
    told = out + err + (tmp_path / "page.html").read_text()
    assert "SECRET" not in told and "//***@127.0.0.1" in out and "//***@127.0.0.1" in err
    assert sum(line.count("natural 9") for line in out.splitlines()) == 3, "three sources, each under a name of its own"


def test_tars_of_others_are_indexed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path = tmp_path / "pairs"
    tmp_path.mkdir()
    with tarfile.open(tmp_path / "part-00000.tar", "w") as tar:
        for number in range(3):
            for suffix, data in (("png", making.picture(number)), ("txt", f"caption {number}".encode())):
                (tmp_path / "member").write_bytes(data)
                tar.add(tmp_path / "member", f"{number:04d}.{suffix}")
    more = ["--format", "caption", "--domain", "natural"]
    assert main(["shards", "index", str(tmp_path), *more]) == 0
    assert "3 samples in 1 shard," in capsys.readouterr().out
    assert main(["shards", "check", str(tmp_path), "--decode", *more]) == 0
    assert main(["shards", "stats", str(tmp_path), *more]) == 0
    assert "natural 3" in capsys.readouterr().out
    assert main(["check", str(tmp_path)]) == 1
    assert "can be read with --format bestiary (bestiary, caption, llava)" in last_error(capsys)


def test_an_unfinished_source_is_refused_by_every_reader(
    write: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write() == 1
    for command in (["check"], ["shards", "stats"], ["shards", "preview", "--out", str(tmp_path / "p.html")]):
        assert main([*command, str(tmp_path / "out")]) == 1
        assert "not finished" in capsys.readouterr().err
