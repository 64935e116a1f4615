"""`bestiary describe`: which pictures, under which keys, what is written; and the whole, killed in the middle."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bestiary.cli import main as bestiary
from bestiary.cli_describe_output import Output, sample_to_show, write_all
from bestiary.cli_describe_pictures import FilePicture, Part, Pictures, open_pictures, part_of
from bestiary.description.engine import Description
from bestiary.description.merging import Levels
from bestiary.description.session import SessionSummariser
from bestiary.description.words import Described
from bestiary.schema import Sample, Turn
from data_modules.inspection.preview import Shown, page
from data_modules.shards import read_source, write_samples
from tests.data_modules.adapters.making import SHARED, needs
from tests.data_modules.test_preview import HOSTILE, browser  # noqa: F401
from tests.description import tiny_models
from tests.description.making import png
from tests.description.serving import Answer, Chat, said, serving

ROOT = Path(__file__).parents[1]
ODD = (
    "a b.png",
    "wide/ä😀.png",
    "line\nend.png",
    "'quoted\" <b>.PNG",
    "-dash.png",
    "wide/same.png",
    "same.png",
    "%s{x}.png",
)


def folder_of(path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(100 + number))
    return path


WHOLE = Part()


def listed(source: Path, part: Part = WHOLE) -> list[Any]:
    return list(open_pictures(str(source), part, format="bestiary"))


def test_odd_names_are_read_have_keys_of_their_own_and_are_told_in_one_line(tmp_path: Path) -> None:
    found = listed(folder_of(tmp_path, *ODD, os.fsdecode(b"latin\xe9.png")))
    assert len(found) == len({one.key for one in found}) == len(ODD) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_=+,@-]*", one.key) and len(one.key) <= 80 for one in found)
    assert all(one.name.isprintable() and one.read().startswith(b"\x89PNG") for one in found)
    assert len({one.name for one in found}) == len(found)


def test_links_out_of_the_folder_are_refused_and_folders_behind_links_are_not_walked(tmp_path: Path) -> None:
    inside, outside = folder_of(tmp_path / "in", "a.png"), folder_of(tmp_path / "out", "secret.png")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "alias.png").symlink_to("a.png")
    (inside / "more").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "pipe.png").symlink_to("/dev/zero")
    (inside / "notes.txt").write_text("no picture")
    pictures = open_pictures(str(inside), WHOLE, format="bestiary")
    found = {one.name: one for one in pictures}
    assert sorted(found) == ["a.png", "alias.png", "link.png", "pipe.png"]
    for name in ("link.png", "pipe.png"):
        with pytest.raises(ValueError, match=f"{name}: is a link out of"):
            found[name].read()
    assert found["alias.png"].read() == found["a.png"].read()
    assert pictures.passed_over == {"links to folders": 2, "files of other kinds": 1}


def test_parts_share_all_pictures_whatever_else_lies_there(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{number}.png" for number in range(40)))
    parts = [{one.name for one in listed(tmp_path, Part(number, 3))} for number in range(3)]
    assert all(parts) and sum(map(len, parts)) == len(set().union(*parts)) == 40
    folder_of(tmp_path, "new.png")
    assert all(part <= {one.name for one in listed(tmp_path, Part(n, 3))} for n, part in enumerate(parts))
    assert len({Part(number, 3).folder for number in range(3)}) == 3
    for text in ("3/3", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(ValueError, match="--part"):
            part_of(text)


def test_pictures_of_shards_keep_their_keys_and_parts_take_whole_shards(tmp_path: Path) -> None:
    turns = (Turn("human", "q"), Turn("assistant", "a"))
    samples = [Sample(f"s{n}", "old", "natural", turns, (png(n),) * (n % 3)) for n in range(9)]
    shards = write_samples(tmp_path / "old", samples, source="old", samples_per_shard=2)
    every = [one.key for one in listed(tmp_path / "old")]
    assert every == ["s1", "s2@0", "s2@1", "s4", "s5@0", "s5@1", "s7", "s8@0", "s8@1"]
    parts = [Pictures(shards, Part(number, 2)) for number in range(2)]
    assert sorted(one.key for part in parts for one in part) == sorted(every)
    assert [part.total for part in parts] == [5, 4]


def described(folder: Path, *names: str, summary: str | None = "A summary.") -> list[Any]:
    folder_of(folder, *names)
    box = Described("a <b>box</b>", (0.25, 0.1, 0.75, 0.6), 0.9)
    text = Described("STOP", (-0.01, 0.0, 0.5, 1.004), 0.987)
    levels = Levels("whole", (box,), (), (text,))
    return [(one, one.read(), Description(levels, summary)) for one in listed(folder)]


def test_descriptions_become_shards_json_and_a_page_and_stay_while_nothing_changes(tmp_path: Path) -> None:
    results = described(tmp_path / "in", "a/1.png", "b/1.png", "c.png")
    silent = (FilePicture(tmp_path / "in", "c.png"), png(102), Description(Levels(), None))
    output = Output(tmp_path / "out", samples_per_shard=1, published=True, num_shown=2)
    output.folder.mkdir()
    written = write_all(output, iter([*results[:2], silent]), identity="1", facts={"pictures": 3})
    assert written[:2] == [output.shards / "source.json", output.dataset] and all(path.exists() for path in written)
    assert output.dataset.read_text() == f'path: "{output.shards}"\ndomain: "natural"\n'
    samples = list(read_source(output.shards))
    assert len(samples) == 2 and samples[0].images == (results[0][1],)
    assert [turn.text for turn in samples[0].turns] == [" Generate the detailed caption in English: ", "A summary."]
    assert samples[0].meta["levels"]["texts"] == [{"caption": "STOP", "box": [-0.01, 0.0, 0.5, 1.004], "score": 0.987}]
    entries = json.loads((output.folder / "ann_all.json").read_text())
    assert [entry["img_id"] for entry in entries] == ["a/1.png", "b/1.png", "c.png"]
    assert entries[0]["grit"] == "a <b>box</b>: [0.25, 0.1, 0.75, 0.6]; "
    assert len(json.loads((output.folder / "detailed_caption.json").read_text())) == 2
    html = output.page.read_text()
    assert html.count('data-key="') == 2 and "&lt;b&gt;box" in html and "<b>box" not in html
    assert write_all(output, iter([]), identity="1", facts={}) == []
    changed = dataclasses.replace(output, num_shown=0)
    assert write_all(changed, iter(results), identity="2", facts={}) and len(read_source(output.shards)) == 3


def test_a_rerun_leaves_nothing_stale_and_removes_nothing_of_others(tmp_path: Path) -> None:
    results = described(tmp_path / "in", "a.png", "b.png")
    first = Output(tmp_path / "out", published=True)
    first.folder.mkdir()
    write_all(first, iter(results), identity="1", facts={})
    mine = [tmp_path / "mine.yaml", first.folder / "mine.json", first.folder / "conf/dataset/mine.yaml"]
    for path in mine:
        path.write_text("mine")
    report = json.loads((first.folder / "report.json").read_bytes())
    report["written"] += ["../mine.yaml", str(mine[0]), "mine.json", "conf/dataset/../../../mine.yaml", "shards", 7]
    (first.folder / "report.json").write_text(json.dumps(report))
    write_all(dataclasses.replace(first, source="other", published=False, num_shown=0), results, identity="1", facts={})
    assert all(path.read_text() == "mine" for path in mine)
    here = {path.relative_to(first.folder).as_posix() for path in first.folder.rglob("*") if path.is_file()}
    here = {name for name in here if not name.startswith("shards/")}
    assert here == {"report.json", "mine.json", "conf/dataset/mine.yaml", "conf/dataset/other.yaml"}
    assert len(read_source(first.shards)) == 2


def test_shards_of_others_are_not_replaced(tmp_path: Path) -> None:
    turns = (Turn("human", "q"), Turn("assistant", "a"))
    write_samples(tmp_path / "out/shards", [Sample("k", "mine", "natural", turns)], source="mine")
    with pytest.raises(ValueError, match="did not write"):
        write_all(Output(tmp_path / "out"), described(tmp_path / "in", "a.png"), identity="1", facts={})
    assert read_source(tmp_path / "out/shards").name == "mine"


ASKED = ("--summary", "http://h/v1", "--summary-model", "m")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--summary", "http://h/v1"], "needs --summary-model"),
        (["--summary-model", "m"], "no effect without --summary"),
        (["--summary", "http://h/v1", "--summary-model", "m", "--api-key-env", "NO_SUCH"], "NO_SUCH: no such variable"),
        (["--part", "2/2"], "--part"),
        (["--experts", "ocr,captoins"], "did you mean 'captions'"),
        (["--experts", "segments"], "needs --captioner FOLDER"),
        (["--bad-budget", "1.5"], "--bad-budget 1.5"),
        (["--bad-budget", "nan"], "--bad-budget nan"),
        (["--page", "-1"], "-1 shown"),
        (["--limit", "0"], "--limit 0"),
        (["--source", " "], "the source is empty"),
        (["--source", "../../../evil"], "the source '../../../evil' names a file"),
        (["--source", "a b/c"], "the source 'a b/c' names a file"),
        (["--source", "a\n"], "names a file"),
        (["--question", "What <img> is?"], "holds <img>"),
        (["--question", "<image> what <image>"], "holds <image>"),
        (["--question", "Where is <ref>it?"], "holds <ref>"),
        ([*ASKED, "--temperature", "nan"], "--temperature nan"),
        ([*ASKED, "--temperature", "-1"], "--temperature -1.0"),
        ([*ASKED, "--max-tokens", "0"], "--max-tokens 0"),
        ([*ASKED, "--requests", "0"], "--requests 0"),
        ([*ASKED, "--timeout", "0"], "--timeout 0.0"),
        ([*ASKED, "--timeout", "inf"], "--timeout inf"),
        (["--max-tokens", "5", "--requests", "2"], "--requests, --max-tokens: no effect without --summary"),
        (["--summary", "session:x", "--timeout", "3"], "--timeout: of a server"),
        (["--published-overlap"], "--published-overlap has no effect without segments"),
    ],
)
def test_an_option_that_is_wrong_is_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = folder_of(tmp_path / "in", "a.png")
    assert bestiary(["describe", str(pictures), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert "--source" not in options or not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, file = folder_of(tmp_path / "in", "a.png"), tmp_path / "file"
    file.write_text("mine")
    for out in ([file], [file / "deeper"], [tmp_path / "out", "--cache", file]):
        assert bestiary(["describe", str(pictures), *map(str, out)]) == 1
        assert f"{file} is a file where describe needs a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_folder_without_pictures_or_a_second_run_in_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    command = ["describe", str(tmp_path / "in"), str(tmp_path / "out")]
    assert bestiary(command) == 1 and "holds no JPEG" in capsys.readouterr().err
    folder_of(tmp_path / "in", "a.png")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/describe.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bestiary(command) == 1 and "another describe is at work" in capsys.readouterr().err


@pytest.mark.slow
@needs("mdvp_bench")
def test_a_killed_run_goes_on_without_asking_twice_and_its_shards_train(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for folder, number in (("ocr_spotting_QA", 5), ("ocr_spotting_detailed_caption", 2)):
        for path in sorted((SHARED / "mdvp_bench" / folder / "images").iterdir())[:number]:
            (pictures / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, pictures / folder)
    (pictures / "cut.jpg").write_bytes(path.read_bytes()[:1000])
    out, summaries = tmp_path / "out", tmp_path / "out/cache/summaries"
    with serving(Chat(unsteady, delay_s=0.05)) as chat:
        options = ["--summary", chat.url, "--summary-model", "small", "--backoff", "0.01", "--requests", "2"]
        command = [Path(sys.executable).parent / "bestiary", "describe", pictures, out, *options, "--workers", "1"]
        environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        first = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 120
        while len(list(summaries.glob("*/*.json"))) < 2 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = cached(out)
        finished = {json.loads(path.read_bytes())["answer"] for path in summaries.glob("*/*.json")}
        answered = chat.answered.copy()
        assert 2 <= len(finished) < 7 and not (out / "shards").exists()

        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert again.returncode == 0, again.stderr
        assert before.items() <= cached(out).items(), "an answer that was there has been made again"
        for prompt, times in chat.answered.items():
            if answer_to(prompt) in finished:
                assert times == answered[prompt] == 1, "a finished summary was asked for again"
        texts = list((out / "cache/texts").glob("*/*.json"))
        assert len(texts) == 7 and sum(chat.answered.values()) <= len(chat.answered) + 2
        assert (
            re.search(r"refused: unreadable +1 *\n", again.stdout) and "cut.jpg" in (out / "refused.jsonl").read_text()
        )

    samples = list(read_source(out / "shards"))
    assert {sample.turns[1].text for sample in samples} == set(map(answer_to, chat.answered))
    train = [
        *("train.py", "--config-dir", out / "conf", "experiment=ovis_s1", "+dataset@data.sources.described=described"),
        *("~data.sources.ovis_caption", f"cluster.data_root={tmp_path}/data", f"run_dir={tmp_path}/run", "logger=csv"),
        *("++data.prepare.sizes={ovis_caption: 4}", "stage.max_steps=2", "stage.batch_size=2"),
        "stage.eval_at_start=false",
        *(f"suite.{name}.max_samples=2" for name in ("answers", "captions", "descriptions")),
    ]
    done = subprocess.run(
        [sys.executable, *train], cwd=ROOT, env={**os.environ, "WANDB_MODE": "offline"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2

    ours = SessionSummariser(tmp_path / "run", max_new_tokens=8)
    assert ours("Describe a dog.") == ours("Describe a dog.") != ""
    with pytest.raises(ValueError, match="does not fit"):
        ours(max(chat.answered, key=len))
    moved = shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert SessionSummariser(moved, max_new_tokens=8).fingerprint == ours.fingerprint
    assert SessionSummariser(moved, max_new_tokens=9).fingerprint != ours.fingerprint


def answer_to(prompt: str) -> str:
    return f"caption {hash_of(prompt)}"


def hash_of(prompt: str) -> str:
    return sha256(prompt.encode()).hexdigest()


def unsteady(prompt: str, times: int) -> Answer:
    """Busy for some, broken for others, then an answer."""
    kind = int(hash_of(prompt)[0], 16) % 3
    if times == 0 and kind:
        return (429, {"Retry-After": "0"}, b"busy") if kind == 1 else (500, {}, b"<b>broken</b>")
    return said(answer_to(prompt))


def cached(out: Path) -> dict[str, tuple[int, int]]:
    """Every kept answer with the place and time of its file."""
    files = [path for path in (out / "cache").rglob("*.json")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_hostile_captions_and_names_do_nothing_on_the_page_and_boxes_are_where_they_belong(
    browser: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    shown = []
    for number, text in enumerate(HOSTILE):
        places = (Described(text, (0.25, 0.1, 0.75, 0.6), 0.9), Described("b", (0.0, 0.5, 0.5, 1.0), 0.8))
        picture = FilePicture(tmp_path, f"{number} {text}".replace("/", "|").replace("\0", "") + ".png")
        found = Description(Levels(text, places[:1], places[1:], ()), text)
        shown.append(Shown(sample_to_show(picture, png(100, (240, 160)), found), "somewhere"))
    path = tmp_path / "page.html"
    path.write_text(page(shown, title="descriptions"), encoding="utf-8")
    for view in opened(browser, path):
        assert view.title() == "descriptions" and view.evaluate("document.scripts.length") == 0
        assert [url for url in view.seen if not url.startswith("data:")] == [path.as_uri()]
        assert view.locator(".card:visible").count() == len(HOSTILE)
        first = view.locator(".card").first
        frame, box = first.locator("img").bounding_box(), first.locator("g.box rect.over").first.bounding_box()
        assert abs(box["x"] + box["width"] / 2 - (frame["x"] + 0.5 * frame["width"])) < 2
        assert abs(box["y"] + box["height"] / 2 - (frame["y"] + 0.35 * frame["height"])) < 2
        assert first.locator("g text").all_text_contents() == ["1", "2"]
        turns = first.locator(".turn p").all_text_contents()
        assert turns[1].startswith("regions:") and HOSTILE[0] in turns[1] and turns[-1] == HOSTILE[0]


def opened(browser: Any, path: Path) -> Iterator[Any]:  # noqa: F811
    """The page with every request and dialog recorded on it."""
    view = browser.new_page(viewport={"width": 1400, "height": 1000})
    view.seen = []
    view.on("request", lambda request: view.seen.append(request.url))
    view.on("dialog", lambda dialog: view.seen.append(dialog.message))
    view.goto(path.as_uri())
    view.wait_for_load_state("networkidle")
    yield view
    view.close()


@pytest.mark.slow
def test_every_expert_speaks_through_the_command_and_broken_weights_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner, matcher = tiny_models.blip2(tmp_path / "blip2"), tiny_models.blip2(tmp_path / "itm", is_matcher=True)
    regions, masks = tiny_models.florence(tmp_path / "florence"), tiny_models.sam(tmp_path / "sam")
    folder_of(tmp_path / "in", "a.png")
    folders = ["--captioner", captioner, "--matcher", matcher, "--regions", regions, "--masks", masks]
    command = ["describe", tmp_path / "in", tmp_path / "out", "--experts", "captions,regions,segments", *folders]
    assert bestiary([str(word) for word in command]) == 0, capsys.readouterr().err
    steps = {path.name for path in (tmp_path / "out/cache").iterdir()}
    assert {"captions", "regions", "segments"} <= steps
    for weights in captioner.glob("*.safetensors"):
        weights.write_bytes(b"broken")
    capsys.readouterr()
    assert bestiary([str(word) for word in command]) == 1
    error = capsys.readouterr().err
    assert "cannot be opened" in error and error.strip().splitlines()[-1].startswith("error: ")
