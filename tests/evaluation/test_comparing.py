from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bestiary.cli import main
from bestiary.evaluation.comparing import compare


def put(run: Path, lines: list[dict[str, Any]], benchmark: str = "answers") -> Path:
    path = run / "eval" / benchmark / "predictions.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def lines(right: int, num: int = 60, **more: Any) -> list[dict[str, Any]]:
    return [
        {"source": "s", "key": f"k{i}", "picture": i // 2, "question": "?", "gold": "x", "score": float(i < right)}
        | more
        for i in range(num)
    ]


def test_a_difference_has_an_interval_over_pictures(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a", lines(20)), put(tmp_path / "b", lines(40))
    [found] = compare(first, second)
    assert (found.benchmark, found.num, found.num_apart) == ("answers", 60, 0)
    assert found.first == pytest.approx(1 / 3) and found.second == pytest.approx(2 / 3)
    assert found.gain is not None and 0 < found.gain.low < 1 / 3 < found.gain.high
    [same] = compare(first, first)
    assert same.gain is not None and same.gain.low == same.gain.high == 0


def test_questions_of_one_run_alone_are_counted_and_texts_weigh_their_tokens(tmp_path: Path) -> None:
    [found] = compare(put(tmp_path / "a", lines(20)), put(tmp_path / "b", lines(20, 50)))
    assert (found.num, found.num_apart) == (50, 10)
    texts = [
        {"source": source, "key": "a", "nll": nll, "num_tokens": num}
        for source, nll, num in (("s", 2.0, 1), ("t", 3.0, 9))
    ]
    [found] = compare(put(tmp_path / "c", texts, "texts"), put(tmp_path / "d", texts, "texts"))
    assert found.first == found.second == 0.5 and found.gain is None


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = put(tmp_path / "a", lines(20))
    with pytest.raises(ValueError, match="another one in"):
        compare(first, put(tmp_path / "b", lines(20, gold="y")))
    with pytest.raises(ValueError, match="share no question"):
        compare(first, put(tmp_path / "c", lines(20, key="other")))
    with pytest.raises(ValueError, match=r"has answers and .* has boxes"):
        compare(first, put(tmp_path / "d", lines(20), "boxes"))
    with pytest.raises(ValueError, match="damaged"):
        compare(first, put(tmp_path / "e", [{"score": 1}]))


def test_the_command_prints_one_line_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = put(tmp_path / "a", lines(20)), put(tmp_path / "b", lines(40))
    assert not main(["runs", "compare", str(first), str(second)])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "benchmark"
    assert line.split()[:3] == ["answers", "0.333", "0.667"] and line.split()[-1] == "60"
