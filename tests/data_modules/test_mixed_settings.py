"""Everything at once: settings that have tests of their own hold together, through real loaders and workers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_modules.lanes import LaneState, lanes_of
from data_modules.rules import Rules
from data_modules.shares import ONE
from data_modules.storage import Storage
from data_modules.stream import Stream
from tests.data_modules.making import LANES, CharProcessor, WholeProcessor, source, stream
from tests.data_modules.servers import Deed, FileServer, every
from tests.data_modules.test_stream import Found, contents

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]
STEPS = 15
LAYOUTS = [(4, 3, 6), (5, 1, 2), (1, 4, 5), (3, 12, 1), (2, 5, 1)]
"""(steps, ranks, workers of each): six workers of four lanes are four processes, two of them with two threads."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources; pictures that do not decode in two of them, and a shard that is cut off."""
    root = tmp_path_factory.mktemp("all")
    source(root / "big", "big", 173, per_shard=17)
    source(root / "far", "far", 61, per_shard=9, bad=(5, 30))
    shards = source(root / "bad", "bad", 47, per_shard=10, bad=(3, 4, 11), domain="chart")
    tar = root / "bad" / shards.shards[1].file
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    source(root / "tiny", "tiny", 4, domain="text")
    return root


def opened(root: Path, far: str, storage: Storage | None, skip: Path, processor: Any, unit: str) -> Stream:
    """A schedule, chunks of three and of five, a unit, a temperature, a skip list, packing with text cut."""
    mix: dict[str, dict[str, Any]] = {
        "big": {"path": root / "big", "weight": 3.0},
        "far": {"path": far, "schedule": [[0, 0.0], [4, 1.0], [20, 6.0]], "chunk": 5},
        "bad": {"path": root / "bad", "weight": 1.5, "loss_weight": 0.5},
        "tiny": {"path": root / "tiny", "weight": 0.37},
    }
    rules = Rules(
        seed=11, num_lanes=LANES, max_tokens=80, max_views=6, look_ahead=7, chunk=3, too_long="truncate_text",
        bad_budget=0.9, unit=unit, temperature=1.7,
    )  # fmt: skip
    return Stream(mix, processor, rules, skip=skip, storage=storage)


def rows_of(made: Stream, steps: int, ranks: int, workers: int, states: Any) -> Found:
    found: Found = {}
    for rank in range(ranks):
        loader = made.loader(lanes_of(rank, ranks, range(LANES)), states=states, num_workers=workers)
        for batches in itertools.islice(loader, steps):
            for batch in batches:
                found.update(contents(batch))
    return found


@pytest.mark.parametrize(
    ("unit", "processor"), [("tokens", CharProcessor()), ("target_tokens", WholeProcessor())], ids=["ahead", "whole"]
)
def test_all_settings_together_resume_equal_on_other_layouts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, processor: Any
) -> None:
    """One source comes over a web that drops every third answer, through a cache too small for it, cold at resumes."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    skip = tmp_path / "skip.txt"
    skip.write_text('big\tbig-00003\nfar\tfar-00007\n{"source": "bad", "key": "bad-00001"}\n')
    local = opened(root, str(root / "far"), None, skip, processor, unit)
    whole = rows_of(local, STEPS, 1, 0, None)
    keys = {segment[0] for row in whole.values() for segment in row[7]}
    assert any(key.startswith("far") for key in keys) and not keys & {"big-00003", "far-00007", "bad-00001"}
    done = 0
    states: dict[int, bytes] | None = None
    with FileServer(root, every(3, Deed(drop_after=0.5))) as server:
        for steps, ranks, workers in LAYOUTS:
            cold = Storage(tmp_path / f"cache-{done}", cache_bytes=20_000, attempts=20, backoff_s=0.001)
            remote = opened(root, f"{server.url}/far", cold, skip, processor, unit)
            if states is not None:
                assert remote.check_states(states, local.fingerprint()) == done
            found = rows_of(remote, steps, ranks, workers, states)
            assert found == {spot: row for spot, row in whole.items() if done <= spot[0] < done + steps}
            done += steps
            states = {lane: whole[done - 1, lane][-1] for lane in range(LANES)}
    assert done == STEPS and states is not None
    lost = "\n".join(local.losses(states.values()))
    assert "skipped" in lost and "bad/" in lost and "far/" in lost


@pytest.mark.parametrize(("lanes", "workers", "chunk"), [(12, 2, 1), (13, 0, 3), (1, 0, 2)])
def test_shares_are_within_one_sample_at_every_step_of_a_real_stream(
    root: Path, lanes: int, workers: int, chunk: int
) -> None:
    """Odd weights, and damage of both kinds: what a batch holds is counted, not what planning says."""
    weights = {"big": 0.618034, "far": 0.2718281, "bad": 0.0999, "tiny": 0.0107}
    mix = {name: {"path": root / name, "weight": weight} for name, weight in weights.items()}
    made = stream(mix, processor=WholeProcessor(), num_lanes=lanes, packing=False, chunk=chunk, bad_budget=0.9)
    counts: Counter[str] = Counter()
    states: dict[int, bytes] = {}
    for step, (batch,) in enumerate(itertools.islice(made.loader(range(lanes), num_workers=workers), 960 // lanes), 1):
        counts.update(segment.source for segment in batch.segments)
        states = dict(zip(batch.lanes, batch.states, strict=True))
        for name, share in zip(made.plan.names, made.plan.mixture.shares, strict=True):
            assert abs(counts[name] * ONE - share * step * lanes) < ONE, (step, name)
    damage = sum(sum(LaneState.from_bytes(state).losses.values()) for state in states.values())
    assert counts.total() == 960 // lanes * lanes and damage >= 9
