"""What a configuration may say of its sources, and the table of a mix."""

from __future__ import annotations

import contextlib
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_modules.lanes import Ref
from data_modules.packing import Budget, fill_row
from data_modules.planning import Foreseen, fuller_rows
from data_modules.rows import LaneReader, Plan
from data_modules.rules import Rules
from data_modules.shards import write_samples
from data_modules.sources import StreamError, missing_sources, parse_sources
from data_modules.stream import Stream
from data_modules.table import resolved_table
from tests.data_modules.making import LANES, CharProcessor, sample, stream


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
            ({"path": "x", "count": -1}, r"sources\.a\.count=-1; a number of samples is positive"),
            ({"path": "x", "repeat": float("nan")}, r"sources\.a\.repeat=nan"),
            ({"path": "x", "max_epochs": 0}, r"sources\.a\.max_epochs=0; .*null"),
            ({"path": "x", "loss_weight": None}, r"sources\.a\.loss_weight=None"),
            ({"path": "x", "chunk": 0}, r"sources\.a\.chunk=0; .*data\.chunk"),
            ({"path": "x", "format": "lava"}, r"sources\.a\.format='lava'; choose bestiary, caption, llava"),
            ({"path": "x", "weight": 1, "repeat": 2}, r"sources\.a has weight and repeat"),
            ({"path": "x", "count": 1, "schedule": [[0, 1]]}, r"sources\.a has count and schedule"),
            ({"path": "x", "schedule": [[5, 1], [5, 2]]}, r"sources\.a\.schedule=.* each larger"),
            ({"path": "x", "schedule": [[0.5, 1]]}, r"sources\.a\.schedule=.*whole numbers"),
            ({"path": "x", "schedule": [[0, -1]]}, r"sources\.a\.schedule=.*weights"),
            ({"path": "x", "schedule": [[0, 0]]}, r"sources\.a\.schedule=.*positive"),
            ({"path": "x", "schedule": [3]}, r"sources\.a\.schedule=.*list of \[step, weight\]"),
            ({"path": "pipe:cat /etc/passwd"}, r"sources\.a\.path: .*pipe"),
        ],
    )
    def test_a_wrong_entry_is_named(self, given: Any, message: str) -> None:
        with pytest.raises(StreamError, match=message):
            parse_sources({"a": given})

    def test_no_source_and_a_wrong_domain_are_refused(self, mix: Any) -> None:
        with pytest.raises(StreamError, match="empty"):
            parse_sources({})
        with pytest.raises(StreamError, match=r"holds domains \['natural'\], not 'web'; set .*\.big\.domain=natural$"):
            stream({"big": {**mix["big"], "domain": "web"}})

    def test_tars_of_others_ask_for_their_format(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
            for suffix in ("jpg", "txt"):
                tar.addfile(tarfile.TarInfo(f"a.{suffix}"))
        with pytest.raises(StreamError, match=r"no source\.json: unfinished, or tars of others \(then set"):
            stream({"pairs": {"path": tmp_path}})
        with pytest.raises(StreamError, match=r"none of its 1 samples can be read with format=bestiary; set .*format"):
            stream({"pairs": {"path": tmp_path / "part-{0..0}.tar"}})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_lanes", 0),
            ("max_tokens", 0),
            ("too_long", "cut"),
            ("bad_budget", 2.0),
            ("seed", -1),
            ("unit", "words"),
            ("temperature", 0.0),
        ],
    )
    def test_senseless_rules_are_refused(self, mix: Any, name: str, value: Any) -> None:
        with pytest.raises(StreamError, match=name):
            stream(mix, **{name: value})

    def test_the_table_shows_shares_sizes_repeats_and_fill(self, mix: Any, tmp_path: Path) -> None:
        made = stream(mix)
        table = resolved_table(made.specs, made.plan, num_lanes=LANES, max_steps=100)
        assert "60.00%" in table
        assert "expected fill" in table
        news, tiny = (next(line for line in table.splitlines() if line.startswith(name)) for name in ("! tiny", "tiny"))
        assert "5 samples are seen" in news
        assert float(tiny.partition(" !")[0].split()[-1]) > 20
        shares = [
            list(map(float, re.findall(r"([\d.]+)%", line)[:2])) for line in table.splitlines() if "weight" in line
        ]
        assert len(shares) == len(mix)
        assert all(of_samples == pytest.approx(share, abs=3) for share, of_samples in shares)
        specs = parse_sources({**mix, "gone": {"path": tmp_path / "gone"}})
        assert "(missing)" in resolved_table(specs, None, num_lanes=LANES)

    def test_the_table_names_a_row_that_samples_fill_better(self, tmp_path: Path) -> None:
        even = [sample("even", 3 * n + 2, answer="a" * (57 - len(f"what {3 * n + 2}?"))) for n in range(40)]
        write_samples(tmp_path / "even", even, source="even")  # 57 positions each
        sources = {"even": {"path": tmp_path / "even"}}
        made = stream(sources, max_tokens=76, max_views=0)
        last, hint = resolved_table(made.specs, made.plan, num_lanes=LANES).splitlines()[-2:]
        assert "expected fill 75.0% of 76;" in last
        assert hint == "rows of data.row_tokens=114 would be about 100.0% full"
        longer = stream(sources, max_tokens=76, max_views=0, row_tokens=114)
        last = resolved_table(longer.specs, longer.plan, num_lanes=LANES).splitlines()[-1]
        assert "about 2.00 samples a row, expected fill 100.0%" in last

    @pytest.mark.parametrize(
        ("lengths", "row", "told"),
        [
            ([129] * 96, 256, (258, 1.0)),
            ([200] * 96, 256, (400, 1.0)),
            ([57] * 24, 76, (114, 1.0)),  # one lane
            ([50] * 96, 100, None),
            ([60] * 3, 100, None),  # too few to tell
        ],
    )
    def test_a_row_is_proposed_where_it_helps(
        self, lengths: list[int], row: int, told: tuple[int, float] | None
    ) -> None:
        waiting, rest = [], iter(lengths)
        rows = []
        with contextlib.suppress(StopIteration):
            while True:
                refs = fill_row(waiting, lambda: Ref(0, 0, 0, next(rest), 0), Budget(row), 1)
                rows.append([ref.tokens for ref in refs])
        held = [tokens for one in rows for tokens in one]
        seen = Foreseen(max(1, len(rows)), (len(held),), (sum(held),), (0,), (0,), (0,), tuple(held or lengths))
        assert fuller_rows(seen, Rules(seed=0, num_lanes=1, max_tokens=row, look_ahead=1)) == told

    def test_a_mix_that_fills_no_row_well_is_told_the_best(self) -> None:
        lengths = [1282 + 20 + 7 * n % 61 for n in range(96)]  # one a row of 2048
        seen = Foreseen(96, (96,), (sum(lengths),), (0,), (0,), (0,), tuple(lengths))
        found = fuller_rows(seen, Rules(seed=0, num_lanes=4, max_tokens=2048))
        assert found is not None and found[0] <= 8192 and found[1] > 0.95

    def test_longer_rows_hold_more_of_the_samples_that_are_allowed(self, mix: Any) -> None:
        short, long = (stream(mix, max_tokens=40, **more) for more in ({}, {"row_tokens": 160}))
        rows = []
        for made in (short, long):
            reader = LaneReader(made.plan, made.plan.first_state(0))
            rows.append([[ref.tokens for ref in reader.plan_row()] for _ in range(6)])
        assert all(sum(row) <= 40 for row in rows[0])
        assert all(140 < sum(row) <= 160 and max(row) <= 40 for row in rows[1])
        with pytest.raises(StreamError, match="max_tokens=20"):
            LaneReader(planned(mix, 0, max_tokens=20, row_tokens=160), short.plan.first_state(0)).plan_row()
        assert "row_tokens" not in short.fingerprint()["rules"]  # runs older than the choice go on
        assert long.fingerprint()["rules"]["row_tokens"] == 160

    def test_a_row_that_cannot_matter_or_hold_a_sample_is_refused(self, mix: Any) -> None:
        with pytest.raises(StreamError, match=r"data\.row_tokens=50 is less than data\.max_tokens=60; leave it out"):
            stream(mix, max_tokens=60, row_tokens=50)
        with pytest.raises(StreamError, match=r"data\.row_tokens=80 has no effect unpacked"):
            stream(mix, max_tokens=60, row_tokens=80, packing=False)

    def test_the_table_shows_caps_schedules_and_both_kinds_of_shares(self, mix: Any, tmp_path: Path) -> None:
        write_samples(tmp_path / "long", [sample("long", n, answer="ab" * 30) for n in range(20)], source="long")
        changed = {
            "big": {**mix["big"], "weight": None, "schedule": [[0, 3.0], [9, 1.0]]},
            "long": {"path": tmp_path / "long", "loss_weight": 0.5},
        }
        made = stream(changed, packing=False, max_tokens=200)
        lines = resolved_table(made.specs, made.plan, num_lanes=LANES, max_steps=4).splitlines()
        big, long = (next(line for line in lines if line.startswith(name)) for name in ("big", "long"))
        assert "75.00% -> 50.00%" in big
        assert "weight 3 (step 0) -> 1 (step 9)" in big
        assert " 0.5 " in long
        of_samples, of_tokens = map(float, re.findall(r"([\d.]+)%", long)[-2:])
        assert of_tokens > 1.5 * of_samples

    def test_a_cap_is_kept_over_the_run(self, mix: Any) -> None:
        capped = {**mix, "tiny": {**mix["tiny"], "weight": 6.0, "max_epochs": 3}}
        with pytest.raises(StreamError, match=r"data\.sources\.tiny\.max_epochs needs .* stage\.max_steps"):
            stream(capped)
        for rules in ({"packing": False}, {"packing": True}, {"packing": True, "unit": "tokens"}):
            plan = planned(capped, 40, **rules)
            drawn = 0
            for lane in range(LANES):
                reader = LaneReader(plan, plan.first_state(lane))
                drawn += sum(ref.source == 2 for _ in range(40) for ref in reader.plan_row())
            assert 10 <= drawn <= 19
        table = resolved_table(plan.specs, plan, num_lanes=LANES, max_steps=40)
        assert "max_epochs 3, cut from 40.00%" in table

    def test_a_cap_that_is_not_reached_leaves_the_order_alone(self, mix: Any) -> None:
        loose = {**mix, "tiny": {**mix["tiny"], "max_epochs": 1e6}}
        assert planned(loose, 40).mixture.shares == stream(mix).plan.mixture.shares

    def test_too_little_data_for_all_caps_is_said_at_once(self, mix: Any) -> None:
        capped = {name: {**given, "max_epochs": 1} for name, given in mix.items()}
        with pytest.raises(StreamError, match="every source has max_epochs"):
            planned(capped, 1000, packing=False)


class TestPlaces:
    """Folders, URLs and patterns."""

    def test_what_lies_behind_a_url_is_not_missing(self) -> None:
        (spec,) = parse_sources({"a": {"path": "https://host/set?X-Amz-Signature=abc", "split": "train"}})
        assert not spec.is_missing
        assert spec.location == "https://host/set/train?X-Amz-Signature=abc"
        assert "abc" not in spec.shown

    def test_a_pattern_names_its_first_absent_tar(self, tmp_path: Path) -> None:
        (tmp_path / "part-0.tar").write_bytes(b"")
        (line,) = missing_sources({"a": {"path": f"{tmp_path}/part-{{0..2}}.tar"}})
        assert "names part-1.tar, which does not exist" in line

    def test_a_folder_of_foreign_tars_is_not_missing(self, tmp_path: Path) -> None:
        (tmp_path / "part-0.tar").write_bytes(b"")
        assert not missing_sources({"a": {"path": tmp_path, "format": "llava"}})
        assert missing_sources({"a": {"path": tmp_path}})

    def test_a_source_may_have_a_chunk_of_its_own(self, mix: Any) -> None:
        made = stream({**mix, "big": {**mix["big"], "chunk": 5}})
        assert [deal.num_chunks for deal in made.plan.deals] == [8, 21, 5]


def planned(mix: Any, max_steps: int, **rules: Any) -> Plan:
    all_rules = Rules(**{"seed": 3, "num_lanes": LANES, "max_tokens": 96, "bad_budget": 0.5, **rules})
    return Stream(mix, CharProcessor(), all_rules, max_steps=max_steps).plan
