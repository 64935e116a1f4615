"""The generation benchmark at a tiny size: all ways give the same tokens, passes are those the algorithms need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.generation import __main__ as benchmark
from experiments.generation.contenders import (
    counted_passes,
    one_by_one,
    ours,
    random_prompts,
    shortest_first,
    text_model,
)


def test_the_three_ways_give_the_same_tokens_in_the_passes_they_need() -> None:
    model = text_model(dim=16, layers=1, vocab=40, positions=64)
    lengths, num_new = [9, 3, 20, 5], 6
    prompts = random_prompts(lengths, vocab=40)
    answers, passes = [], []
    for way in (ours, one_by_one, shortest_first):
        with counted_passes(model) as seen:
            answers.append(way(model, prompts, num_new))
        passes.append(len(seen))
    assert answers[0] == answers[1] == answers[2]
    assert [len(ids) for ids in answers[0]] == [num_new] * 4
    assert passes == [num_new, 4 * num_new, max(lengths) - min(lengths) + num_new]


def test_eight_ragged_prompts_take_a_third_of_the_passes_at_most() -> None:
    model = text_model(dim=16, layers=1, vocab=40, positions=512)
    prompts = random_prompts(range(20, 401, 54), vocab=40)
    with counted_passes(model) as seen:
        ours(model, prompts, 32)
    assert len(prompts) == 8
    assert 3 * len(seen) <= max(map(len, prompts)) - min(map(len, prompts)) + 32


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_its_table_between_the_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("a\n<!-- tables -->\nold\n<!-- end of tables -->\nb\n")
    sizes = ["--dim", "16", "--layers", "1", "--rounds", "1", "--prompts", "2", "--new-tokens", "2"]
    benchmark.main(["--out", str(tmp_path), *sizes])
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["cases"]) == set(benchmark.CASES)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert benchmark.table(found) in text and benchmark.table(found) in capsys.readouterr().out
