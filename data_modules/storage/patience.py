"""Trying again: how often, and how long to wait. No random generator is touched; the jitter is a hash."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import TypeVar

from data_modules.storage.errors import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_WAIT_S = 60.0
"""Also the most that a server's Retry-After is honoured."""


class HiccupError(Exception):
    """Something that may pass: a timeout, a lost connection, a busy server.

    wait_s: what the server asks for. has_gained: the try brought a part that the next one need not bring again.
    """

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s
        self.has_gained = False


@dataclass(frozen=True, slots=True)
class Patience:
    """attempts: tries of a request before the run stops. timeout_s: of silence. backoff_s: first wait, then doubled."""

    attempts: int = 5
    timeout_s: float = 30.0
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise StorageError(f"{self}: at least one attempt, a positive timeout, a wait that is not negative")

    def wait_s(self, what: str, tried: int, asked_s: float = 0.0) -> float:
        """Seconds before the next try: half of it fixed, half spread by a hash, so that workers do not come at once."""
        digest = sha256(f"{what} {tried}".encode()).digest()
        spread = int.from_bytes(digest[:4], "little") / 2**32
        own = self.backoff_s * 2.0 ** (tried - 1) * (0.5 + 0.5 * spread)
        return min(max(own, asked_s), LONGEST_WAIT_S)

    def persist(self, what: str, attempt: Callable[[], T], on_retry: Callable[[], None]) -> T:
        """The result of the first attempt that succeeds; StorageError naming `what` after the last.

        Attempts that gained something are not counted: what there is to gain has an end.
        """
        tried = 0
        while True:
            try:
                return attempt()
            except HiccupError as error:
                tried += not error.has_gained
                if tried >= self.attempts:
                    raise StorageError(
                        f"{what}: {error}; tried {tried} times, so the store is out of reach; resume when it is back"
                    ) from None
                wait_s = self.wait_s(what, max(tried, 1), error.wait_s)
                told = "going on behind what came" if error.has_gained else f"{tried} of {self.attempts}"
                log.warning("%s: %s; trying again in %.1f s (%s)", what, error, wait_s, told)
            on_retry()
            time.sleep(wait_s)


def retry_after_s(header: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number or a date); 0 without or with a senseless one."""
    if not header:
        return 0.0
    if header.strip().isdecimal():
        return float(header.strip()[:9])
    try:
        until = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
