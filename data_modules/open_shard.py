"""One open shard of a source: its index mapped, its tar mapped (local) or fetched in lots (remote)."""

from __future__ import annotations

import resource

from data_modules.index import BLOCK, RECORD, Keys, Records, Shard
from data_modules.storage import Folder, NotThereError

LOT_BYTES = 1 << 22
"""A remote shard is read in stretches of so many bytes, or in lots of consecutive samples if their number is given."""

_KEPT_LOTS = 2
_MOST_OPEN = 2048
_MOST_REMOTE = 512


class OpenShard:
    """The maps of one shard.

    number, first: its place in the source and that of its first sample. lot: consecutive samples that are fetched
    together from a remote store, 0 = stretches of LOT_BYTES. ValueError where files are missing or do not fit together.
    """

    def __init__(
        self, folder: Folder, index_folder: Folder, shard: Shard, *, number: int, first: int, lot: int
    ) -> None:
        self.number = number
        self.first = first
        self._folder, self._index_folder, self._shard = folder, index_folder, shard
        self._stem = shard.file.removesuffix(".tar")
        try:
            index = index_folder.read(f"{self._stem}.idx")
            self.data: memoryview | None = folder.map(shard.file) if folder.is_local else None
        except NotThereError as error:
            raise ValueError(f"{error}, but the source names it; write or copy the source again") from error
        if index_folder is folder:
            folder.expect(shard.file, shard.bytes)
        where = f"{index_folder.location.rstrip('/')}/{self._stem}.idx"
        self.records = Records(index, shard, where, is_foreign=index_folder is not folder)
        self._lot = lot
        self._lots: dict[tuple[int, int], memoryview] = {}
        self._keys: Keys | None = None

    @property
    def keys(self) -> Keys:
        """Names and hashes; mapped when first asked for."""
        if self._keys is None:
            name = f"{self._stem}.keys"
            where = f"{self._index_folder.location.rstrip('/')}/{name}"
            self._keys = Keys(self._index_folder.read(name), self._shard.samples, where)
        return self._keys

    def slice(self, local: int) -> memoryview:
        """The bytes of one sample, headers and padding included; fewer where the tar ends before."""
        if self.data is None:
            return self.fetch(local)
        place = self.records.place(local)
        return self.data[place.offset : place.offset + place.size]

    def fetch(self, local: int) -> memoryview:
        """The same from a remote store: what lies around the sample comes with it, and is kept for its neighbours."""
        offset, size = RECORD.unpack_from(self.records.data, local * RECORD.size)[:2]
        if self._lot:
            start, stop = self._bounds(local // self._lot, local)
            return self._kept(start, stop)[offset - start : offset - start + size]
        pieces = []
        for number in range(offset // LOT_BYTES, (offset + max(size, 1) - 1) // LOT_BYTES + 1):
            start = number * LOT_BYTES
            window = self._kept(start, start + LOT_BYTES)
            pieces.append(window[max(offset - start, 0) : max(offset + size - start, 0)])
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _kept(self, start: int, stop: int) -> memoryview:
        found = self._lots.get((start, stop))
        if found is None:
            found = self._lots[start, stop] = self._folder.span(self._shard.file, start, stop)
            for oldest in list(self._lots)[:-_KEPT_LOTS]:
                self._lots.pop(oldest, None)  # another thread may have been faster
        return found

    def _bounds(self, lot: int, local: int) -> tuple[int, int]:
        """First and last byte of a lot; of the sample alone where the index of the others is damaged."""
        first, last = lot * self._lot, min((lot + 1) * self._lot, self._shard.samples) - 1
        if not all(self.records.check(block) for block in range(first // BLOCK, last // BLOCK + 1)):
            first = last = local
        begin, end = self.records.place(first), self.records.place(last)
        return begin.offset, end.offset + end.size


def open_limit(is_local: bool) -> int:
    """How many shards of one source may stay open. What a remote one has fetched holds up to four descriptors."""
    if is_local:
        return _MOST_OPEN  # the kernel allows a process some 65,000 maps
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_REMOTE if soft == resource.RLIM_INFINITY else max(16, min(_MOST_REMOTE, soft // 16))
