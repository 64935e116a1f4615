"""Many pictures at once: experts in some threads, summaries in others, a bounded number under way.

Everything that took time is in the cache the moment it is known, so a run may end in any way and be started again.
Experts release the interpreter while they compute; more processes are more parts of the same pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from bestiary.description.cache import Cache
from bestiary.description.filters import Overlap
from bestiary.description.levels import Describer, UnreadableError
from bestiary.description.merging import Levels
from bestiary.description.prompts import summary_prompt
from bestiary.description.tags import unusable_tag
from bestiary.description.tally import Tally
from bestiary.description.words import ExpertError, Summariser, SummaryError

AHEAD = 2
"""Pictures under way for every thread."""
PROMPTS_AHEAD = 64
"""Prompts waiting for every summary under way: experts go on while the endpoint is slow."""
FAILURES_IN_A_ROW = 8
"""Pictures without a summary after which no more are asked for in this run: the endpoint is down."""


class Picture(Protocol):
    """One picture of many."""

    @property
    def key(self) -> str:
        """Of the sample it becomes; unique."""

    @property
    def name(self) -> str:
        """For people: one printable line."""

    def read(self) -> bytes:
        """The encoded picture; ValueError or OSError of one line where there is none."""


@dataclass(frozen=True, slots=True)
class Description:
    """A picture's levels after the filters, and its summary: None where nothing was said or none was asked for."""

    levels: Levels
    summary: str | None


class Summaries:
    """A summariser and what it has answered. One thread asks whether a summary is there; several may make them."""

    def __init__(self, summariser: Summariser, cache: Cache) -> None:
        self._summariser = summariser
        self._cache = cache

    def get(self, digest: str, prompt: str) -> str | None:
        """The cached summary, if a sample may hold it."""
        found: str | None = self._cache.get("summaries", *self._key(digest, prompt))
        return None if found is None or unusable_tag(found) else found

    def make(self, digest: str, prompt: str) -> str:
        """Ask, and keep the answer; errors as Summariser's, and ValueError for an answer that no sample may hold."""
        summary = self._summariser(prompt)
        if tag := unusable_tag(summary):
            raise ValueError(
                f"the summary holds {tag}, which is a picture's or part of a broken name or place: {summary!r:.100}"
            )
        self._cache.put("summaries", summary, *self._key(digest, prompt))
        return summary

    def _key(self, digest: str, prompt: str) -> tuple[str, str, str]:
        return digest, self._summariser.fingerprint, sha256(prompt.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the experts made of a picture."""

    picture: Picture
    digest: str
    prompt: str | None
    is_cached: bool


@dataclass(frozen=True, slots=True)
class _Refused:
    picture: Picture
    reason: str
    problem: str


@dataclass
class Engine:
    """Describes pictures.

    make: a describer for one thread. summaries: None asks for none. overlap: of the filter of equal captions.
    workers: threads of experts. requests: summaries asked for at a time. stop: set when the run ends early.
    """

    make: Callable[[], Describer]
    summaries: Summaries | None
    tally: Tally
    overlap: Overlap = "exact"
    workers: int = 1
    requests: int = 8
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.workers < 1 or self.requests < 1:
            raise ValueError(f"{self.workers} workers and {self.requests} requests at a time; both must be at least 1")
        self._idle: SimpleQueue[Describer] = SimpleQueue()
        self._idle.put(self.make())  # at once: weights that are not there are known before any picture is opened
        self._under_way: dict[Future[_Seen | _Refused], None] = {}
        self._asked: dict[Future[str], list[_Seen]] = {}
        self._failures_in_a_row = 0

    def run(self, pictures: Iterable[Picture], watch: Callable[[Tally], None] = lambda tally: None) -> None:
        """All pictures, counted in the tally; watch: called after some of them."""
        waiting = iter(pictures)
        seeing = ThreadPoolExecutor(self.workers, thread_name_prefix="experts")
        asking = ThreadPoolExecutor(self.requests, thread_name_prefix="summaries")
        try:
            while self._fill(waiting, seeing):
                everything: list[Future[Any]] = [*self._under_way, *self._asked]
                for future in wait(everything, return_when=FIRST_COMPLETED).done:
                    if future in self._asked:
                        self._settle(future)
                    else:
                        self._take(future, asking)
                watch(self.tally)
        finally:
            self.stop.set()
            for pool in (seeing, asking):
                pool.shutdown(wait=True, cancel_futures=True)

    def results(self, pictures: Iterable[Picture]) -> Iterator[tuple[Picture, bytes, Description]]:
        """(picture, its bytes, what is known of it) of those that `run` described, in the order given."""
        describer = self._describer()
        for picture in pictures:
            try:
                data = picture.read()
                levels = describer.describe(data)[0].kept(overlap=self.overlap)
            except ExpertError:
                raise
            except (ValueError, OSError):
                continue  # `run` has counted it
            if levels.is_empty:
                yield picture, data, Description(levels, None)
                continue
            summary = None
            if self.summaries is not None:
                summary = self.summaries.get(sha256(data).hexdigest(), summary_prompt(levels))
                if summary is None:
                    continue  # pending or refused, and counted
            yield picture, data, Description(levels, summary)

    def _fill(self, waiting: Iterator[Picture], seeing: ThreadPoolExecutor) -> bool:
        """Begin with more pictures where there is room; whether anything is under way."""
        room = AHEAD * self.workers - len(self._under_way)
        if len(self._asked) >= PROMPTS_AHEAD * self.requests:
            room = 0
        for picture in islice(waiting, max(0, room)):
            self._under_way[seeing.submit(self._see, picture)] = None
        return bool(self._under_way or self._asked)

    def _see(self, picture: Picture) -> _Seen | _Refused:
        try:
            data = picture.read()
        except (ValueError, OSError) as error:
            return _Refused(picture, "unreadable", str(error))
        describer = self._describer()
        try:
            levels, num_made = describer.describe(data)
        except UnreadableError as error:
            return _Refused(picture, "unreadable", str(error))
        except ExpertError:
            raise
        except ValueError as error:
            return _Refused(picture, "refused by an expert", str(error))
        finally:
            self._idle.put(describer)
        kept = levels.kept(overlap=self.overlap)
        prompt = None if kept.is_empty else summary_prompt(kept)
        return _Seen(picture, sha256(data).hexdigest(), prompt, is_cached=num_made == 0)

    def _describer(self) -> Describer:
        try:
            return self._idle.get_nowait()
        except Empty:
            return self.make()

    def _take(self, future: Future[_Seen | _Refused], asking: ThreadPoolExecutor) -> None:
        """What the experts are done with goes to the tally or to the summariser."""
        del self._under_way[future]
        seen = future.result()
        if isinstance(seen, _Refused):
            self.tally.refuse(seen.picture.name, seen.reason, seen.problem)
        elif seen.prompt is None:
            self.tally.silent += 1
            self.tally.note(seen.picture.key, seen.digest, "")
        elif self.summaries is None:
            self.tally.describe(seen.picture.key, seen.digest, seen.prompt, is_cached=seen.is_cached)
        elif (summary := self.summaries.get(seen.digest, seen.prompt)) is not None:
            self.tally.describe(seen.picture.key, seen.digest, summary, is_cached=seen.is_cached)
        else:
            self._ask(seen, seen.prompt, asking)

    def _ask(self, seen: _Seen, prompt: str, asking: ThreadPoolExecutor) -> None:
        assert self.summaries is not None, "the caller looked"
        for others in self._asked.values():  # the same picture under another name
            if (others[0].digest, others[0].prompt) == (seen.digest, prompt):
                others.append(seen)
                return
        self._asked[asking.submit(self._summary, self.summaries, seen.digest, prompt)] = [seen]

    def _summary(self, summaries: Summaries, digest: str, prompt: str) -> str:
        """In a thread of its own, perhaps long after it was asked for."""
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            raise SummaryError("not asked for, too many failed in a row")
        return summaries.make(digest, prompt)

    def _settle(self, future: Future[str]) -> None:
        """A summary is there, or is not."""
        asked = self._asked.pop(future)
        try:
            summary = future.result()
        except SummaryError as error:
            self._failures_in_a_row += 1
            for seen in asked:
                self.tally.postpone(seen.picture.name, str(error))
            return
        except ValueError as error:
            for seen in asked:
                self.tally.refuse(seen.picture.name, "refused by the summariser", str(error))
            return
        self._failures_in_a_row = 0
        for number, seen in enumerate(asked):
            self.tally.describe(seen.picture.key, seen.digest, summary, is_cached=number > 0)
