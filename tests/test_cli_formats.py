"""`bestiary shards write` of every published format, on the published examples and real files, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bestiary.cli import main
from bestiary.schema import Sample
from data_modules.adapters import FORMATS
from data_modules.shards import read_source
from tests.data_modules.adapters.making import SHARED, picture, put_json
from tests.parity.cases import ROOT, cases, has, read_json

Made = tuple[list[str], int, int]
"""Words of the command line, samples that must come out, records that are broken on purpose."""


def example(system: str, *files: str) -> Path:
    """The folder of a published example; skips where there is none."""
    found = cases(system, has(*files))
    if not found:
        pytest.skip(f"no example of {system} below {ROOT}; set BESTIARY_GOLDENS to the folder that holds {system}/")
    return Path(found[0].values[0])


def real(name: str) -> Path:
    """Real data; skips where it is not."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} not in {SHARED}; set BESTIARY_SHARED to the folder that holds data/")
    return SHARED / name


def sphinx(here: Path) -> Made:
    golden = read_json(example("sphinx", "tokens.json") / "tokens.json")
    talks, singles = golden["items"], golden["alpaca_items"]
    put_json(here / "dialogs.json", talks)
    (here / "singles.jsonl").write_text("".join(json.dumps(item) + "\n" for item in singles))
    (here / "list.yaml").write_text(
        "META:\n - path: dialogs.json\n   type: text\n - path: singles.jsonl\n   type: text\n"
    )
    (here / "x.png").write_bytes(picture())
    return ["sphinx", str(here / "list.yaml"), "--option", "keep_empty=True"], len(talks) + len(singles), 0


def mdvp(_: Path) -> Made:
    case = example("sphinxv", "annotations.json", "dataset_items.safetensors")
    count = len(read_json(case / "annotations.json"))
    return ["mdvp", str(case / "annotations.json"), "--images", str(case / "images")], count, 0


def mdvp_bench(_: Path) -> Made:
    folder = real("mdvp_bench")
    return (
        ["mdvp_bench", str(folder), "--option", "widen=True"],
        sum(_length(path) for path in folder.rglob("*.json")),
        0,
    )


def ovis(here: Path) -> Made:
    case = example("ovis", "captions.parquet", "conversations.json", "meta.json")
    facts = {"image_dir": str(case / "images")}
    listed = {
        "captions": {**facts, "meta_file": str(case / "captions.parquet"), "data_format": "caption"},
        "talks": {**facts, "meta_file": str(case / "conversations.json"), "data_format": "conversation"},
    }
    golden = len(read_json(case / "meta.json")["captions"]), _length(case / "conversations.json")
    words = ["ovis", str(put_json(here / "dataset_info.json", listed)), "--option", "keep_empty=True"]
    return words, sum(golden) - 3, 3  # one picture is broken, and one is missing twice


def qwen_vl(here: Path) -> Made:
    golden = read_json(example("monkey", "tokens.json") / "tokens.json")["train"]
    for name in ("data/coco/000000001.jpg", "data/textvqa/a b.png", "x.jpg"):
        file = here / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    records = [{"id": number, "conversations": item["conversations"]} for number, item in enumerate(golden)]
    path = put_json(here / "train.json", records)
    return ["qwen_vl", str(path), "--images", str(here / "root")], len(records), 0


def llava(here: Path) -> Made:
    talks = read_json(example("ovis", "conversations.json") / "conversations.json")
    images = example("ovis", "conversations.json") / "images"
    whole = [talk for talk in talks if len(talk.get("image", ())) == 1 and "missing.png" not in talk["image"]]
    words = ["llava", str(put_json(here / "llava.json", whole)), "--images", str(images), "--option", "system=meta"]
    return words, len(whole), 0


def benchmark(_: Path) -> Made:
    folder = real("eval_annotations")
    count = sum(_length(path) for path in folder.glob("*.json") if path.name != "annotation_config.json")
    return ["benchmark", str(folder), "--option", "without_images=True", "--option", "keep_empty=True"], count, 0


def _length(path: Path) -> int:
    return len(read_json(path))


MAKERS: dict[str, Callable[[Path], Made]] = {
    maker.__name__: maker for maker in (sphinx, mdvp, mdvp_bench, ovis, qwen_vl, llava, benchmark)
}

OWN_DOMAINS = ("mdvp_bench", "benchmark")
"""Formats that say themselves what kind of picture each is."""


def test_every_format_but_our_own_is_tried() -> None:
    assert MAKERS.keys() | {"plain"} == FORMATS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_a_published_format_is_written_checked_and_written_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, samples, rejected = MAKERS[name](tmp_path)
    out = tmp_path / "out"
    rest = ["--out", str(out), "--source", name, "--workers", "1", "--max-rejected", "0.5"]
    rest += ["--domain", "natural"] if name not in OWN_DOMAINS else []
    assert main(["shards", "write", *words, *rest]) == 0
    told = out / "rejected.jsonl"
    assert (len(told.read_text().splitlines()) if told.exists() else 0) == rejected
    found: list[Sample] = list(read_source(out))
    assert len(found) == samples > 0
    assert len({sample.key for sample in found}) == samples
    assert main(["shards", "check", str(out), "--decode"]) == 0
    capsys.readouterr()
    assert main(["shards", "write", *words, *rest]) == 0
    assert "nothing to do" in capsys.readouterr().out
