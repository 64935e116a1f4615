"""A contender's process: opens its data, then answers `check` and `round` on standard input, pinned to one core.

Runs under either interpreter, so it imports nothing but the standard library and the contender's module.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import resource
import sys
import time
from typing import Any


def main() -> None:
    """Read a specification from the command line, then commands from standard input, until it ends."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not answer for us
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    module = importlib.import_module(f"experiments.throughput.{spec['module']}")
    contender = module.open_contender(spec["task"], spec["folder"], **spec["options"])
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        _tell(answers, _check(contender) if asked["command"] == "check" else _round(contender, asked["passes"]))


def _check(contender: Any) -> dict[str, Any]:
    total, count = 0, 0
    for item in contender():
        total ^= int.from_bytes(_digest(item), "little")
        count += 1
    return {"samples": count, "digest": f"{total:032x}"}


def _digest(item: Any) -> bytes:
    """Of (key, record, image) everything; of a prepared picture only its key: values are compared in the tests."""
    found = hashlib.blake2b(item[0].encode(), digest_size=16)
    if len(item) == 3:
        facts = item[1] if isinstance(item[1], dict) else _facts(item[1])
        found.update(json.dumps(facts, sort_keys=True).encode())
        found.update(item[2])
    return found.digest()


def _facts(sample: Any) -> dict[str, Any]:
    """The record a Sample was made from; its pictures' extensions are not part of it."""
    turns = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
    given = {"source": sample.source, "domain": sample.domain, "meta": sample.meta}
    return {**given, "turns": turns, "regions": list(sample.regions), "images": ["jpg"]}


def _round(contender: Any, passes: int) -> dict[str, Any]:
    gc.collect()
    count, size = 0, 0
    cpu, wall = _cpu(), time.perf_counter()
    for _ in range(passes):
        for item in contender():
            count += 1
            size += len(item[-1])
    return {"cpu_s": _cpu() - cpu, "wall_s": time.perf_counter() - wall, "samples": count, "size": size}


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _tell(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
