"""Writes the embedded data as shards: once a folder, equal bytes for equal arguments.

A source is written by one process from beginning to end, so the number of processes changes nothing. A finished folder
carries `embedded.json` with the fingerprint of all that shapes its bytes; anything else under its name is made again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from bestiary.schema import Sample
from data_modules.index import FORMAT, SOURCE_FILE
from data_modules.writer import ShardWriter, write_atomically

from .assets import FOLDER, Split
from .generate import DOMAINS, Domain, generate
from .scene import LOOK
from .tasks import KINDS

log = logging.getLogger(__name__)

MARKER = "embedded.json"
LICENCE = "CC-BY-4.0; the parts are listed in data_modules/embedded/assets/ATTRIBUTIONS.md"
SAMPLES_PER_SHARD = 1000
FEW = 400
"""Up to so many samples in all, starting processes costs more than it saves."""


COST_MS: Mapping[str, float] = {"natural": 3.0, "multi_panel": 2.0, "screenshot": 0.9, "document": 0.9}
"""Measured milliseconds to draw a picture of a domain."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the sets that every domain has.

    first_index: where the part's pictures begin in the endless row of its split, so that no two parts share one.
    one_mark: share of samples with a single mark. balanced: kinds and numbers of marks in turn instead of by chance.
    """

    split: Split
    size: int
    first_index: int
    tasks: Mapping[str, float] = field(default_factory=dict)
    one_mark: float = 0.0
    balanced: bool = False
    mixed: float = 0.05


LABELS = {"label": 1.0, "ocr": 1.0}

PARTS: Mapping[str, Part] = {
    "stage1": Part("train", 4000, 0, LABELS, one_mark=0.7, mixed=0.0),
    "stage2": Part("train", 4000, 10_000_000, {"label": 5, "ocr": 5, "caption": 1, "relation": 1, "qa": 2}),
    "heldout": Part("heldout", 168, 0, LABELS, balanced=True, mixed=0.0),
    "heldout_tasks": Part("heldout", 60, 10_000_000, {"caption": 1, "relation": 1, "qa": 2}),
}


def source_names() -> tuple[str, ...]:
    """Names of all sources: `<domain>_<part>`."""
    return tuple(f"{domain}_{part}" for part in PARTS for domain in DOMAINS)


def part_sample(domain: Domain, part_name: str, seed: int, number: int) -> Sample:
    """Sample `number` of a source: the row that `build` writes there."""
    part = PARTS[part_name]
    marks, kinds = (1, 4), KINDS
    if part.balanced:
        marks, kinds = (1 + number // len(KINDS) % 4,) * 2, (KINDS[number % len(KINDS)],)
    elif number % 100 < round(part.one_mark * 100):
        marks = (1, 1)
    return generate(
        domain,
        seed,
        part.first_index + number,
        part.split,
        num_marks=marks,
        kinds=kinds,
        tasks=part.tasks,
        mixed=part.mixed,
        source=f"{domain}_{part_name}",
    )


def build(
    root: Path,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    processes: int | None = None,
) -> dict[str, Path]:
    """Write every source into `root/<source>` unless it is there already; returns the folders by source.

    sizes: number of samples by part (`stage1`, for each domain) or by source (`natural_stage1`, wins); 0 leaves out.
    processes: None = one a core. Two builds into one root wait for each other.
    """
    counts = resolve_sizes(sizes or {})
    jobs = [
        Job(name, seed, count, _make, _cost_ms(name) * count, fingerprint(name, seed, count))
        for name, count in counts.items()
        if count
    ]
    return write_sources(Path(root), jobs, processes=processes)


@dataclass(frozen=True, slots=True)
class Job:
    """One source to write: samples 0 to `count`, each made alone by `make(source, seed, number)`.

    make: a function of a module, so that another process can import it. cost_ms: about how long all of it takes.
    wanted: the fingerprint that the finished folder carries.
    """

    source: str
    seed: int
    count: int
    make: Callable[[str, int, int], Sample]
    cost_ms: float
    wanted: str


def write_sources(root: Path, jobs: Sequence[Job], *, processes: int | None = None) -> dict[str, Path]:
    """Write every source into `root/<source>` unless it is there already; returns the folders by source.

    processes: None = one a core. Two writers into one root wait for each other.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        missing = [job for job in jobs if not is_complete(root / job.source, job.wanted)]
        missing.sort(key=lambda job: (-job.cost_ms, job.source))  # the longest first
        total = sum(job.count for job in missing)
        if missing:
            log.info("writing %d samples into %d sources under %s", total, len(missing), root)
        workers = min(len(missing), processes or os.cpu_count() or 1)
        if workers > 1 and total > FEW:
            # spawn: the caller may run threads already, and a forked child of threads can hang.
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_write_job, [str(root)] * len(missing), missing))
        else:
            for job in missing:
                _write_job(str(root), job)
    return {job.source: root / job.source for job in jobs}


def resolve_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Samples of every source."""
    known = (*PARTS, *source_names())
    for name, size in sizes.items():
        if name not in known:
            raise ValueError(f"sizes has {name!r}; choose from {', '.join(known)}")
        if size < 0:
            raise ValueError(f"sizes[{name!r}] is {size}; give 0 (leave out) or more")
    counts = {}
    for name in source_names():
        part = split_name(name)[1]
        counts[name] = sizes.get(name, sizes.get(part, PARTS[part].size))
    return counts


def split_name(source: str) -> tuple[Domain, str]:
    """Domain and part of a source."""
    domain = next(domain for domain in DOMAINS if source.startswith(f"{domain}_"))
    return domain, source.removeprefix(f"{domain}_")


@lru_cache(maxsize=1)
def _code_and_assets() -> str:
    """Hash of the generators' code and of the assets: a change of either makes new pictures."""
    digest = sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *FOLDER.glob("*")]):
        shapes_pictures = path.suffix not in (".md", ".txt") and path.name not in ("make_assets.py", "__main__.py")
        if shapes_pictures and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(source: str, seed: int, count: int, **more: str) -> str:
    """Hash of everything that shapes the bytes of a source. more: what else does."""
    facts = {
        "source": source,
        "seed": seed,
        "count": count,
        "look": asdict(LOOK),
        "made_by": _code_and_assets(),
        "format": FORMAT,
        **more,
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_complete(folder: Path, wanted: str) -> bool:
    """Whether a folder holds a finished source with that fingerprint."""
    marker = folder / MARKER
    if not marker.is_file() or not (folder / SOURCE_FILE).is_file():
        return False
    try:
        found = json.loads(marker.read_text())
    except json.JSONDecodeError:
        return False
    shards = json.loads((folder / SOURCE_FILE).read_text())["shards"]
    whole = all((folder / s["file"]).is_file() and (folder / s["file"]).stat().st_size == s["bytes"] for s in shards)
    return whole and isinstance(found, dict) and found.get("fingerprint") == wanted


def _write_job(root: str, job: Job) -> None:
    """Write one source (the work of one process)."""
    folder = Path(root) / job.source
    (folder / MARKER).unlink(missing_ok=True)
    with ShardWriter(
        folder, source=job.source, samples_per_shard=SAMPLES_PER_SHARD, licence=LICENCE, overwrite=True
    ) as writer:
        for number in range(job.count):
            writer.write(job.make(job.source, job.seed, number))
    facts = {"fingerprint": job.wanted, "seed": job.seed, "samples": job.count}
    write_atomically(folder / MARKER, json.dumps(facts, indent=1).encode() + b"\n")


def _make(source: str, seed: int, number: int) -> Sample:
    return part_sample(*split_name(source), seed, number)


def _cost_ms(source: str) -> float:
    """Measured milliseconds a picture."""
    return COST_MS[split_name(source)[0]]


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Only one build at a time in a root; the lock falls with the process that holds it."""
    with (root / ".embedded.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
