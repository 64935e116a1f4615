"""Hostile and broken records, through real shards and the real stream."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest

from bestiary.schema import SampleError, SampleTooLongError
from data_modules.sources import StreamError
from tests.data_modules.hostile import Canary, blames, encoded, epoch_of, pair, raw_source, record, tar_of

LONG = "word " * 1_000_000
REGION = {"kind": "box", "coords": [0.1, 0.1, 0.4, 0.4], "mark": 1}

WRONG: dict[str, bytes] = {
    "empty": b"",
    "cut": record()[:-20],
    "not-json": b"{'source': 'set'}",
    "array": b"[]",
    "number": b"7",
    "null": b"null",
    "two": record() + record(),
    "comment": b"// hello\n" + record(),
    "binary": bytes(range(256)),
    "pickle": b"\x80\x04\x95\x10\x00.",
    "nan": record(meta={"x": 1}).replace(b"1", b"NaN"),
    "infinity": record(meta={"x": 1}).replace(b"1", b"-Infinity"),
    "huge-float": record(regions=[{**REGION, "coords": [1, 2, 3, 4]}]).replace(b"[1, 2, 3, 4]", b"[1e999, 0, 0, 0]"),
    "huge-int": record(regions=[{**REGION, "mark": 7}]).replace(b'"mark": 7', b'"mark": ' + b"9" * 5000),
    "deep": record(meta={"x": 1}).replace(b'{"x": 1}', b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep-objects": record(meta={"x": 1}).replace(b'{"x": 1}', b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
    "latin-1": json.dumps({"text": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"),
    "latin-1-text": record(source="caf\u00e9").replace(b"\\u00e9", b"\xe9"),
    "utf-16": record().decode().encode("utf-16"),
    "utf-32": record().decode().encode("utf-32"),
    "bom": b"\xef\xbb\xbf" + record(),
    "overlong": record().replace(b"What?", b"What\xc0\xaf"),
    "surrogate-bytes": record().replace(b"What?", b"What\xed\xa0\x80"),
    "lone-surrogate": record().replace(b"What?", b"What\\ud800"),
    "control": record().replace(b"What?", b"What\x01\n"),
    "no-turns": record(turns=[]),
    "turns-null": record(turns=None),
    "turns-text": record(turns="What?"),
    "turn-number": record(turns=[{"role": "human", "text": 7}, {"role": "assistant", "text": "x"}]),
    "turn-list": record(turns=[{"role": "human", "text": ["a"]}]),
    "role": record(turns=[{"role": "system", "text": "a"}, {"role": "assistant", "text": "x"}]),
    "no-answer": record(turns=[{"role": "human", "text": "a"}]),
    "empty-answer": record(turns=[{"role": "human", "text": "a"}, {"role": "assistant", "text": " \n "}]),
    "missing-field": b'{"source": "set", "domain": "natural"}',
    "source-empty": record(source=""),
    "meta-list": record(meta=[]),
    "regions-object": record(regions={}),
    "region-without-picture": record(regions=[REGION]),
    "region-text": record(regions=[{**REGION, "coords": ["0.1", "0.2", "0.3", "0.4"]}]),
    "region-outside": record(regions=[{**REGION, "coords": [-5, 0, 2e9, 1]}]),
    "region-mark": record(regions=[{**REGION, "mark": True}]),
    "many-regions": record(regions=[{**REGION, "mark": mark + 1} for mark in range(10_000)]),
    "picture-not-there": record(images=["jpg"]),
    "picture-elsewhere": record(images=["../../../../etc/passwd"]),
    "picture-url": record(images=["http://127.0.0.1:1/x.jpg"]),
    "picture-pipe": record(images=["pipe:touch CANARY"]),
    "picture-number": record(images=[7]),
    "image-tag": record(turns=[{"role": "human", "text": "<image> a"}, {"role": "assistant", "text": "x"}]),
    "mark-of-nothing": record(turns=[{"role": "human", "text": "<Mark 3> a"}, {"role": "assistant", "text": "x"}]),
    "mark-overflow": record(
        turns=[{"role": "human", "text": f"<Mark {'9' * 5000}> a"}, {"role": "assistant", "text": "x"}]
    ),
}
FINE: dict[str, bytes] = {
    "plain": record(),
    "unknown-field": record(__class__="os.system", extra={"a": [1, 2]}),
    "nul": record().replace(b"What?", b"What\\u0000"),
    "bom-inside": record().replace(b"What?", b"\xef\xbb\xbfWhat?"),
    "pair-of-surrogates": record().replace(b"What?", b"What \\ud83d\\ude00"),
    "right-to-left": record().replace(b"What?", "What \u202e?".encode()),
    "spaces": b" \n" + record() + b"\n ",
    "braces": record().replace(b"What?", b"{0.__class__} %s ${oc.env:HOME} {{7*7}}"),
}
TOO_LONG: dict[str, bytes] = {
    "million-words": record(turns=[{"role": "human", "text": LONG}, {"role": "assistant", "text": "x"}]),
    "million-word-answer": record(turns=[{"role": "human", "text": "a"}, {"role": "assistant", "text": LONG}]),
    "many-turns": record(turns=[{"role": "human", "text": "a"}, {"role": "assistant", "text": "b"}] * 30_000),
    "many-empty-turns": record(turns=[{"role": "human", "text": ""}, {"role": "assistant", "text": "b"}] * 30_000),
    "one-word": record(turns=[{"role": "human", "text": "x" * 3_000_000}, {"role": "assistant", "text": "b"}]),
}


def _with_plain(records: dict[str, bytes]) -> dict[str, bytes]:
    return records | {f"sound-{number}": record() for number in range(len(records))}


def test_every_wrong_record_is_one_counted_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary = Canary(tmp_path / "canary")
    wrong = {name: text.replace(b"CANARY", str(canary.path).encode()) for name, text in WRONG.items()}
    started = time.process_time()
    seen = epoch_of(raw_source(tmp_path / "set", _with_plain(wrong)), caplog, bad_budget=1.0)
    assert time.process_time() - started < 20
    assert not seen.keys & WRONG.keys(), seen.keys & WRONG.keys()
    assert len(seen.keys) == len(WRONG) == seen.counted == len(seen.warned)
    assert {line.rsplit(" ", 1)[1] for line in seen.lines} == {"structure", "record", "processor"}
    for name in WRONG:
        assert blames(seen, "shard-00000.tar", f"sample {name}: "), name
    assert max(map(len, seen.warned)) < 2000, max(seen.warned, key=len)[:300]
    canary.assert_untouched()


def test_a_domain_that_the_source_does_not_name_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = _with_plain({"strange": record(domain="other")})
    seen = epoch_of(raw_source(tmp_path / "set", records), caplog)
    assert seen.keys == {"sound-0"} and seen.lines == ("set/shard-00000.tar: 1 record",)
    assert blames(seen, "sample strange: ", "domain 'other' is none that the source names")


def test_odd_but_sound_records_come_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = epoch_of(raw_source(tmp_path / "set", FINE), caplog)
    assert seen.keys == FINE.keys() and not seen.counted and not seen.warned


@pytest.mark.slow
def test_absurd_lengths_cost_milliseconds_and_are_counted_as_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = raw_source(tmp_path / "set", _with_plain(TOO_LONG))
    started = time.process_time()
    seen = epoch_of(folder, caplog, bad_budget=0.0)
    assert time.process_time() - started < 10
    assert len(seen.keys) == len(TOO_LONG) and seen.lines == (f"set/shard-00000.tar: {len(TOO_LONG)} too_long",)
    with pytest.raises(StreamError, match=r"source 'set': sample .* (too_long to skip|split it)") as info:
        epoch_of(folder, caplog, too_long="error")
    assert len(str(info.value)) < 500 and "\n" not in str(info.value)


@pytest.mark.slow
def test_a_record_of_many_megabytes_is_refused_unread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    huge = record(turns=[{"role": "human", "text": "x" * 20_000_000}, {"role": "assistant", "text": "b"}])
    seen = epoch_of(raw_source(tmp_path / "set", _with_plain({"huge": huge})), caplog)
    assert seen.lines == ("set/shard-00000.tar: 1 record",) and blames(seen, "sample huge", "more than")


def test_keys_and_domains_cannot_write_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "human\nERROR all is lost", "text": "a"}, {"role": "assistant", "text": "b"}]
    evil = {
        "a": b"{}\n",
        "b": record(domain="x\nERROR all is lost", turns=[]),
        "c\x1b[2J": b"{",
        "d\nERROR": b"{",
        "e": record(turns=turns),
        "f": record(images=["\x1b]0;mine\x07.jpg"]),
        "g": record(turns=[{"role": "human", "text": "<Mark 9\u2028> a"}, {"role": "assistant", "text": "\u2028"}]),
    }
    seen = epoch_of(raw_source(tmp_path / "set", _with_plain(evil)), caplog, bad_budget=1.0)
    assert seen.counted == len(evil)
    assert all(line.isprintable() for line in seen.warned), seen.warned


def test_a_line_about_a_huge_value_is_short_and_keeps_its_beginning_and_its_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stroke = {"kind": "stroke", "coords": [0.5] * 9_999 + [7.0], "mark": 1}
    evil = {"a": record(regions=[stroke]), "b": record(images=[f"{number}.jpg" for number in range(9_999)])}
    seen = epoch_of(raw_source(tmp_path / "set", _with_plain(evil)), caplog, bad_budget=1.0)
    assert seen.counted == 2 and all(len(line) < 1000 for line in seen.warned), [len(line) for line in seen.warned]
    assert blames(seen, "shard-00000.tar", "region of mark 1 (stroke (0.5, 0.5", "as fractions of the original image")
    error = SampleError("k" * 10_000, "w" * 10_000)
    again = pickle.loads(pickle.dumps(error))
    assert len(str(error)) < 1000 and str(again) == str(error) and again.problem == error.problem
    too_long = pickle.loads(pickle.dumps(SampleTooLongError("k", "w" * 10_000 + " remedy", 9, 8)))
    assert too_long.problem.endswith("remedy") and len(str(too_long)) < 500 and too_long.num_tokens == 9


WRONG_WORDS: dict[str, tuple[str, bytes, str]] = {
    "utf-16 caption": ("txt", "A caption.".encode("utf-16"), "UnicodeDecodeError"),
    "latin-1 caption": ("txt", b"Caf\xe9.", "UnicodeDecodeError"),
    "empty caption": ("txt", b"\n", "the caption is empty"),
    "caption number": ("json", b'{"caption": 7}', "caption"),
    "caption list": ("json", b'["caption"]', "object"),
    "no caption": ("json", b"{}", "caption"),
}


@pytest.mark.parametrize("what", WRONG_WORDS)
def test_wrong_words_of_foreign_samples_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    kind, data, told = WRONG_WORDS[what]
    (tmp_path / "set").mkdir()
    members = [*pair("a"), ("evil.jpg", encoded()), (f"evil.{kind}", data), *pair("b")]
    (tmp_path / "set" / "part.tar").write_bytes(tar_of(members))
    seen = epoch_of(tmp_path / "set", caplog, format="caption", domain="natural")
    assert seen.keys == {"part/a", "part/b"} and seen.counted == 1
    assert blames(seen, "part.tar", "part/evil", told), seen.warned


CONVERSATIONS = [
    b'{"conversations": []}',
    b'{"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    b'{"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "b"}]}',
    b'{"conversations": [{"from": "human", "value": 7}]}',
    b'{"conversations": [{"from": "human"}]}',
    b'{"conversations": "human: hello"}',
    b"{" * 5000,
    b'{"conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("text", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_wrong_conversations_of_foreign_samples_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    fine = b'{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}'
    (tmp_path / "set").mkdir()
    members = [("a.json", fine), ("evil.json", text), ("evil.jpg", encoded()), ("b.json", fine)]
    (tmp_path / "set" / "part.tar").write_bytes(tar_of(members))
    seen = epoch_of(tmp_path / "set", caplog, format="llava", domain="natural")
    assert seen.keys == {"part/a", "part/b"} and seen.counted == 1 and blames(seen, "part.tar", "part/evil")
