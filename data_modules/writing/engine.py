"""The engine behind `bestiary shards write`: records in, a finished source out.

Batch k of `samples_per_shard` records becomes shard k, whichever process makes it; batches are committed in their
order. So the bytes depend on the annotations, the pictures and the plan alone: not on the number of processes, and not
on how often the writer was killed. A kill costs the batches under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from data_modules.adapters.protocol import Adapter, Record
from data_modules.index import SOURCE_FILE, SourceFacts, parse_facts
from data_modules.writer import finish_source, is_whole, prepare_folder
from data_modules.writing.batches import Made, ShardMaker
from data_modules.writing.journal import JOURNAL_FILE, REJECTED_FILE, Done, Journal
from data_modules.writing.keys import known_keys
from data_modules.writing.plan import Plan, Progress, Report, WritingError, differences, identity_of
from data_modules.writing.pool import Pool

ENOUGH = 1000
"""Records before the share of rejected ones can stop a run that is not at its end."""

Watch = Callable[[Progress], None]


def write_source(adapter: Adapter, plan: Plan, *, watch: Watch | None = None) -> Report:
    """Write the source, go on with an unfinished one, or find it finished; WritingError says what to do.

    watch: called after every batch.
    """
    identity = identity_of(adapter, plan)
    finished = None if plan.overwrite else _finished(plan.folder)
    if finished is not None:
        return _unchanged(plan, finished, identity)
    with Journal(plan.folder) as journal:
        if plan.overwrite or journal.identity is None:
            prepare_folder(plan.folder, overwrite=plan.overwrite)
            journal.begin(identity)
        elif journal.identity == identity:
            journal.resume()
            prepare_folder(plan.folder, keep=journal.shards)
        else:
            raise WritingError(
                f"{plan.folder} holds an unfinished source of another kind ({differences(identity, journal.identity)} "
                "differ); give --overwrite to replace it, or another --out"
            )
        run = _Run(adapter, plan, journal, watch or (lambda progress: None))
        try:
            run.all()
            run.finish(identity)
            journal.remove()
        except OSError as error:
            raise WritingError(
                f"{error.filename or plan.folder}: {error.strerror or error}; {len(journal.done)} finished batches are "
                "kept: put it right and run the same command again"
            ) from error
    return run.report()


class _Run:
    """One attempt at a source."""

    def __init__(self, adapter: Adapter, plan: Plan, journal: Journal, watch: Watch) -> None:
        self._adapter = adapter
        self._plan = plan
        self._journal = journal
        self._watch = watch
        self._resumed = len(journal.done)
        self._keys = known_keys(plan.folder, journal.shards)
        self._kinds: Counter[str] = Counter()
        self._records = self._samples = self._bytes = 0
        for done in journal.done:
            self._count(done)
        self._resumed_records = self._records

    def all(self) -> None:
        """Every batch that is not done."""
        self._watch(self._progress(None))
        maker = ShardMaker(self._adapter, self._plan.folder, self._plan.source)
        with Pool(maker, self._plan.workers) as pool:
            for number, records, made in pool.in_order(self._batches()):
                self._commit(pool, number, records, made)
        self._check_rejected(at_end=True)

    def report(self) -> Report:
        """What became of it."""
        return Report(
            folder=self._plan.folder,
            state="written",
            records=self._records,
            samples=self._samples,
            shards=len(self._journal.shards),
            bytes=self._bytes,
            kinds=dict(self._kinds),
            resumed=self._resumed_records,
        )

    def finish(self, identity: dict[str, str]) -> None:
        """Make the folder a source."""
        if not self._records:
            raise WritingError("the annotations hold no record; is it the right file?")
        if not self._samples:
            raise WritingError(
                f"not one of {self._records} records became a sample, first: {self._journal.first_rejected()}; read "
                f"{self._plan.folder / REJECTED_FILE}, put it right and give --overwrite"
            )
        made_by = {
            "format": self._adapter.name,
            "identity": identity,
            "records": self._records,
            "rejected": dict(sorted(self._kinds.items())),
        }
        finish_source(
            self._plan.folder,
            self._journal.shards,
            source=self._plan.source,
            licence=self._plan.licence,
            made_by=made_by,
            check_keys=False,  # every key went through self._keys
        )

    def _batches(self) -> Iterator[tuple[int, list[Record]]]:
        size = self._plan.samples_per_shard
        records = islice(self._adapter.records(), self._plan.limit)
        records = islice(records, self._resumed * size, None)
        number = self._resumed
        while batch := list(islice(records, size)):
            yield number, batch
            number += 1

    def _commit(self, pool: Pool, number: int, records: Sequence[Record], made: Made) -> None:
        known = self._keys.among(made.keys)
        if known:
            made = pool.again(number, records, known)
        self._keys.add(made.keys)
        self._count(self._journal.commit(len(records), made.shard, made.rejected))
        self._check_rejected(at_end=False)
        self._watch(self._progress(records[-1].share))

    def _progress(self, share: float | None) -> Progress:
        return Progress(self._records, self._samples, self._kinds.total(), self._bytes, share)

    def _count(self, done: Done) -> None:
        self._records += done.records
        self._kinds.update(done.kinds)
        if done.shard is not None:
            self._samples += done.shard.samples
            self._bytes += done.shard.bytes

    def _check_rejected(self, *, at_end: bool) -> None:
        rejected, allowed = self._kinds.total(), self._plan.max_rejected
        if rejected <= allowed * self._records or not (at_end or self._records >= ENOUGH):
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        raise WritingError(
            f"{rejected} of {self._records} records were rejected, {rejected / self._records:.1%} where {allowed:.1%} "
            f"are allowed ({kinds}; first: {self._journal.first_rejected()}); read "
            f"{self._plan.folder / REJECTED_FILE}, then put it right and give --overwrite, or raise --max-rejected to "
            "accept them"
        )


def _finished(folder: Path) -> SourceFacts | None:
    path = folder / SOURCE_FILE
    return parse_facts(path.read_bytes(), str(path)) if path.exists() else None


def _unchanged(plan: Plan, facts: SourceFacts, identity: dict[str, str]) -> Report:
    theirs = facts.made_by.get("identity")
    if theirs != identity:
        why = f"{differences(identity, theirs)} differ" if isinstance(theirs, dict) else "not written from annotations"
        raise WritingError(
            f"{plan.folder} holds a finished source of another kind ({why}); give --overwrite to replace it, or "
            "another --out"
        )
    if broken := [shard.file for shard in facts.shards if not is_whole(plan.folder, shard)]:
        raise WritingError(
            f"{plan.folder} is finished, but {broken[0]} or its index is missing or changed ({len(broken)} of "
            f"{len(facts.shards)} shards); give --overwrite to write the source again"
        )
    (plan.folder / JOURNAL_FILE).unlink(missing_ok=True)
    return Report(
        folder=plan.folder,
        state="unchanged",
        records=facts.made_by["records"],
        samples=facts.samples,
        shards=len(facts.shards),
        bytes=sum(shard.bytes for shard in facts.shards),
        kinds=facts.made_by["rejected"],
    )
