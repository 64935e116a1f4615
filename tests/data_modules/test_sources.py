"""What a configuration may say of its sources, and the table of a mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_modules.sources import StreamError, missing_sources, parse_sources
from data_modules.table import resolved_table
from tests.data_modules.making import LANES, stream


class TestSources:
    """What a configuration may say."""

    def test_a_missing_folder_is_named_with_its_remedy(self, mix: Any, tmp_path: Path) -> None:
        (tmp_path / "half").mkdir()
        wanted = {**mix, "gone": {"path": tmp_path / "gone"}, "half": {"path": tmp_path / "half"}}
        lines = missing_sources(wanted)
        assert len(lines) == 2
        assert "source 'gone'" in lines[0]
        assert "does not exist" in lines[0]
        assert "unfinished" in lines[1]
        with pytest.raises(StreamError, match=r"source 'gone': .*/gone does not exist; .*data.sources.gone.path"):
            stream(wanted)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"path": "x", "wieght": 1}, r"sources\.a\.wieght is unknown; did you mean weight"),
            ({}, "path is not set"),
            ({"path": "x", "weight": 0}, "weight=0"),
            ({"path": "x", "weight": "much"}, "weight='much'"),
        ],
    )
    def test_a_wrong_entry_is_named(self, given: Any, message: str) -> None:
        with pytest.raises(StreamError, match=message):
            parse_sources({"a": given})

    def test_no_source_and_a_wrong_domain_are_refused(self, mix: Any) -> None:
        with pytest.raises(StreamError, match="empty"):
            parse_sources({})
        with pytest.raises(StreamError, match=r"holds domains \['natural'\], not 'web'"):
            stream({"big": {**mix["big"], "domain": "web"}})

    @pytest.mark.parametrize(
        ("name", "value"), [("num_lanes", 0), ("max_tokens", 0), ("too_long", "cut"), ("bad_budget", 2.0), ("seed", -1)]
    )
    def test_senseless_rules_are_refused(self, mix: Any, name: str, value: Any) -> None:
        with pytest.raises(StreamError, match=name):
            stream(mix, **{name: value})

    def test_the_table_shows_shares_sizes_repeats_and_fill(self, mix: Any, tmp_path: Path) -> None:
        made = stream(mix)
        table = resolved_table(made.specs, made.plan, num_lanes=LANES, max_steps=100)
        assert "60.00%" in table
        assert "expected fill" in table
        tiny = next(line for line in table.splitlines() if line.startswith("tiny"))
        assert float(tiny.split()[4]) > 20
        specs = parse_sources({**mix, "gone": {"path": tmp_path / "gone"}})
        assert "(missing)" in resolved_table(specs, None, num_lanes=LANES)
