"""Texts that were tokenised to measure a sample, kept until its example is made.

The stream measures a sample when it enters the look-ahead and makes it some rows later, from a record read anew: the
key is therefore what shapes the tokens, never an object's identity. An entry is used once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import numpy as np

MAX_TOKENS = 1 << 21
"""About 16 MB of ids and labels, and their texts: a look-ahead of 16 in each of 64 lanes of 2,000 tokens."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids and labels, int32 of equal length."""


class EncodedMemo:
    """A bounded memory of encoded texts, the oldest going first; threads may share it.

    Pickling and copying leave the texts out. Whoever finds it busy goes on without: a process forked at that moment
    would wait for ever.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._texts: OrderedDict[Hashable, Encoded] = OrderedDict()
        self._num_tokens = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def __reduce__(self) -> tuple[type[EncodedMemo], tuple[int]]:
        return EncodedMemo, (self.max_tokens,)

    def put(self, key: Hashable, encoded: Encoded) -> None:
        """Keep a text until it is taken; one that is larger than the whole memory is not kept."""
        if len(encoded[0]) > self.max_tokens or not self._lock.acquire(blocking=False):
            return
        try:
            old = self._texts.pop(key, None)
            self._num_tokens += len(encoded[0]) - (len(old[0]) if old else 0)
            self._texts[key] = encoded
            while self._num_tokens > self.max_tokens:
                _, gone = self._texts.popitem(last=False)
                self._num_tokens -= len(gone[0])
        finally:
            self._lock.release()

    def take(self, key: Hashable) -> Encoded | None:
        """The text under `key`, which is forgotten; None if it is not there."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            found = self._texts.pop(key, None)
            self._num_tokens -= len(found[0]) if found else 0
            return found
        finally:
            self._lock.release()
