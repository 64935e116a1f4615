"""The LightningDataModule over the stream: the only file here that imports lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning

from bestiary.schema import Processor
from data_modules.lanes import lanes_of
from data_modules.rules import Rules
from data_modules.shares import ONE
from data_modules.sources import SourceSpec, StreamError, missing_sources, parse_sources
from data_modules.storage import Storage
from data_modules.stream import Stream, StreamLoader
from data_modules.surgery import ON_CHANGE
from data_modules.table import resolved_table

log = logging.getLogger(__name__)


class StreamDataModule(lightning.LightningDataModule):
    """One rank's micro-batches, step after step.

    Building it opens nothing; the shards are opened at the first use. Keyword arguments are those of the configuration
    (`data`, `stage.batch_size` = num_lanes, `stage.micro_batch`, `stream.on_change`). num_workers: processes; those
    beyond the lanes of a rank become threads, which call the processor at the same time. cache_root, cache_gb: where
    remote shards are kept, and how much of them. max_steps: for sources with `max_epochs`. rank, world_size: None asks
    the trainer, if there is one.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Mapping[str, Any] | SourceSpec],
        processor: Processor,
        seed: int,
        num_lanes: int,
        max_tokens: int,
        micro_batch: int = 0,
        max_views: int = 0,
        packing: bool = True,
        look_ahead: int = 16,
        chunk: int = 1,
        too_long: str = "error",
        num_workers: int = 0,
        bad_budget: float = 0.01,
        augment: bool = True,
        unit: str = "samples",
        temperature: float = 1.0,
        order: str = "stratified",
        row_tokens: int = 0,
        skip: str | Path | None = None,
        cache_root: str | Path | None = None,
        cache_gb: float = 20.0,
        on_change: str = "refuse",
        max_steps: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.sources = dict(sources)
        self.processor = processor
        self.rules = Rules(
            seed=seed,
            num_lanes=num_lanes,
            max_tokens=max_tokens,
            max_views=max_views,
            packing=packing,
            look_ahead=look_ahead,
            chunk=chunk,
            too_long=too_long,
            bad_budget=bad_budget,
            augment=augment,
            unit=unit,
            temperature=temperature,
            order=order,
            row_tokens=row_tokens,
        )
        if micro_batch < 0 or num_workers < 0 or not 0 <= cache_gb < float("inf"):
            raise StreamError(f"{micro_batch=}, {num_workers=} and {cache_gb=} must not be negative or infinite")
        if on_change not in ON_CHANGE:
            raise StreamError(f"stream.on_change={on_change!r}; choose {', '.join(ON_CHANGE)}")
        self.micro_batch = micro_batch
        self.num_workers = num_workers
        self.skip = skip
        self.storage = Storage(cache_root=Path(cache_root) if cache_root else None, cache_bytes=int(cache_gb * 2**30))
        self.on_change = on_change
        self.max_steps = max_steps
        self._rank, self._world_size = rank, world_size
        self._stream: Stream | None = None
        self._loader: StreamLoader | None = None
        self._states: dict[int, bytes] | None = None
        self._told: tuple[str, ...] = ()

    @property
    def stream(self) -> Stream:
        """The stream, its shards open; StreamError names a source that is missing."""
        if self._stream is None:
            self._stream = Stream(
                self.sources,
                self.processor,
                self.rules,
                skip=self.skip,
                storage=self.storage,
                max_steps=self.max_steps,
            )
        return self._stream

    @property
    def lanes(self) -> range:
        """This rank's block of lanes."""
        trainer = self.trainer
        rank = self._rank if self._rank is not None else trainer.global_rank if trainer else 0
        world_size = self._world_size if self._world_size is not None else trainer.world_size if trainer else 1
        lanes = lanes_of(rank, world_size, range(self.rules.num_lanes))
        if not lanes:
            raise StreamError(
                f"{self.rules.num_lanes} rows a step leave rank {rank} of {world_size} without any; "
                "raise stage.batch_size or use fewer devices"
            )
        return lanes

    def train_dataloader(self) -> StreamLoader:
        """Endless `list[Batch]`: this rank's micro-batches of one optimiser step, from the loaded states on."""
        self._loader = self.stream.loader(
            self.lanes, states=self._states, micro_batch=self.micro_batch, num_workers=self.num_workers
        )
        return self._loader

    def fetched(self) -> dict[str, int]:
        """What reading remote shards has cost this rank so far; {} where all are local."""
        return self._loader.fetched() if self._loader is not None else {}

    def load_states(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> int:
        """Go on after `states` (lane -> bytes, of every lane), saved with `fingerprint`; returns the next step.

        A stream that differs in anything that shapes the sequence is refused, naming the differences, unless
        `on_change` says what to do; then what changes is logged here, before a loader starts.
        """
        resumed = self.stream.resume(states, fingerprint, self.on_change)
        if resumed.lines != self._told:
            self._told = resumed.lines
            for line in resumed.lines:
                log.warning("%s", line)
        self._states = resumed.states
        return resumed.step

    def explain_change(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> list[str]:
        """What `load_states` would change, line by line, without doing it; nothing where the stream is the same."""
        return list(self.stream.resume(states, fingerprint, self.on_change).lines)

    @property
    def domains(self) -> list[str]:
        """All domains of the sources, in one order on every rank."""
        return sorted({domain for source in self.stream.plan.sources for domain in source.domains})

    def fingerprint(self) -> dict[str, Any]:
        """Everything the sequence depends on, as plain JSON: saved beside the states."""
        return self.stream.fingerprint()

    def shares(self, step: int) -> dict[str, float]:
        """The resolved share of every source at a step, from 0, in the unit of the mix."""
        plan = self.stream.plan
        return {name: share / ONE for name, share in zip(plan.names, plan.mixture.resolved.at(step), strict=True)}

    def losses(self, states: Iterable[bytes]) -> list[str]:
        """What was left out up to these states: one line for each shard and reason."""
        return self.stream.losses(states)

    def check_damage(self, states: Iterable[bytes]) -> None:
        """StreamError where all lanes together have left out more than the budget of damage allows."""
        self.stream.check_damage(states)

    def missing_sources(self) -> list[str]:
        """One line for every source that is not on disk."""
        return missing_sources(self.sources)

    def resolved_table(self, max_steps: int | None = None) -> str:
        """The mix in plain text: shares, sizes, expected repeats over `max_steps`, expected fill."""
        plan = None if self.missing_sources() else self.stream.plan
        return resolved_table(parse_sources(self.sources), plan, num_lanes=self.rules.num_lanes, max_steps=max_steps)
