"""Files on web servers: ranged GETs through the session of fsspec's HTTP file system.

fsspec's own reading of ranges accepts any status, any length and any redirect; here each answer is checked before its
bytes count. The body goes straight into the cache, so memory does not grow with the range.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from data_modules.storage.cache import Part
from data_modules.storage.errors import NotThereError, StorageError
from data_modules.storage.patience import HiccupError, Patience, retry_after_s
from data_modules.storage.store import SLOWEST_RATE, Facts, RangesIgnoredError, failures, file_system
from data_modules.storage.urls import MAX_REDIRECTS, check_redirect, printable, scrubbed

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_CHUNK = 1 << 20
_GAIN = 1 << 18
"""A try that broke after so many new bytes is not counted."""


class WebStore:
    """http and https. options: of fsspec's HTTP file system, such as client_kwargs or headers."""

    def __init__(self, patience: Patience, options: Mapping[str, Any]) -> None:
        self._patience = patience
        client = {"trust_env": True, **options.get("client_kwargs", {}), "auto_decompress": False}
        self._headers = dict(options.get("headers", {}))
        rest = {name: value for name, value in options.items() if name not in ("client_kwargs", "headers")}
        self._options = {**rest, "client_kwargs": client}

    def look(self, url: str, peek: int) -> tuple[Facts, bytes]:
        """Size and version by one GET of the first bytes; servers that sign URLs often refuse HEAD."""
        peek = max(1, peek)

        async def receive(response: Any) -> tuple[Facts, bytes]:
            if response.status == 416:
                return _facts_of_empty(response, url), b""
            facts, start = _facts_of(response, url)
            if not facts.has_ranges:
                return facts, b""
            if start != 0:
                raise HiccupError(f"the server sent bytes from {start} where 0 was asked for")
            wanted = min(peek, facts.size)
            head = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK):
                head += chunk
                if len(head) > wanted:
                    raise HiccupError(f"the server sent more than the {wanted} bytes asked for")
            if len(head) != wanted:
                raise HiccupError(f"the body ended after {len(head)} of {wanted} bytes")
            return facts, bytes(head)

        return self._get(url, f"bytes=0-{peek - 1}", peek, receive)

    def fetch(self, url: str, start: int, part: Part, facts: Facts) -> None:
        """One GET of what the part still lacks; RangesIgnoredError where the whole file would come instead."""
        if not facts.has_ranges:
            part.restart()
        first = start + part.written
        wanted = part.size - part.written

        async def receive(response: Any) -> None:
            now, sent_from = _facts_of(response, url)
            facts.check_same(now, url)
            if facts.has_ranges and not now.has_ranges:
                raise RangesIgnoredError
            if sent_from != first:
                raise HiccupError(f"the server sent bytes from {sent_from} where {first} was asked for")
            async for chunk in response.content.iter_chunked(_CHUNK):
                if part.written + len(chunk) > part.size:
                    raise HiccupError(f"the server sent more than the {wanted} bytes asked for")
                part.write(chunk)
            if part.written < part.size:
                raise HiccupError(f"the body ended {part.size - part.written} bytes before its end")

        byte_range = f"bytes={first}-{start + part.size - 1}" if facts.has_ranges else None
        try:
            self._get(url, byte_range, wanted, receive)
        except HiccupError as error:  # without ranges the next try begins anew: nothing is gained
            error.has_gained = facts.has_ranges and part.written - (first - start) >= _GAIN
            raise

    def list(self, url: str) -> list[str]:
        """Web servers have no common way to tell."""
        raise StorageError(
            f"{printable(url)}: a web server cannot list its files; name them: .../part-{{00000..00099}}.tar"
        )

    def _get(self, url: str, byte_range: str | None, num_bytes: int, receive: Callable[[Any], Awaitable[T]]) -> T:
        """One GET, redirects followed; every failure is a HiccupError or a StorageError."""
        _check_address(url)
        system = file_system("http", self._options)
        from fsspec.asyn import sync

        try:
            result: T = sync(system.loop, self._exchange, system, url, byte_range, num_bytes, receive)
        except failures() as error:
            raise HiccupError(scrubbed(f"{type(error).__name__} {error}").strip()) from error
        except StorageError:
            raise
        except ValueError as error:  # of the libraries below, on what a server says
            said = scrubbed(f"{type(error).__name__} {error}")
            raise StorageError(f"{printable(url)} cannot be read ({said}); check the address and its server") from error
        return result

    async def _exchange(
        self, system: Any, url: str, byte_range: str | None, num_bytes: int, receive: Callable[[Any], Awaitable[T]]
    ) -> T:
        import aiohttp
        from yarl import URL

        session = await system.set_session()
        silence_s = self._patience.timeout_s
        timeout = aiohttp.ClientTimeout(
            total=silence_s + num_bytes / SLOWEST_RATE, sock_connect=silence_s, sock_read=silence_s
        )
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if byte_range is not None:
            headers["Range"] = byte_range
        asked = url
        for _ in range(MAX_REDIRECTS + 1):
            request = session.get(URL(url, encoded=True), headers=headers, timeout=timeout, allow_redirects=False)
            async with request as response:
                if response.status not in _REDIRECTS:
                    _check_status(response, asked)
                    return await receive(response)
                url = _redirected(url, response.headers.get("Location", ""))
        raise StorageError(f"{printable(asked)} redirects more than {MAX_REDIRECTS} times; give the final address")


def _check_address(url: str) -> None:
    """StorageError for an address that no server can have; it says little of it, for any part may be of a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError:
        host = b""
    if host:
        return
    shown, remedy = printable(url), "write it as https://host:port/folder"
    if "@" in url:
        plain, _, query = url.partition("?")
        shown = f"{plain.partition('//')[0]}//***@{'***' if '@' in query else plain.rpartition('@')[2]}"
        remedy += ", and / @ : ? # of a password as %2F %40 %3A %3F %23"
    raise StorageError(f"{shown} is no address of a web server; {remedy}")


def _redirected(before: str, location: str) -> str:
    """The address that a server names in its place."""
    try:
        after = urljoin(before, location)
    except ValueError as error:
        raise StorageError(
            f"{printable(before)} redirects to {printable(location)[:200]}, which is no address; give the address of "
            "the server that holds the files"
        ) from error
    return check_redirect(before, after)


def _check_status(response: Any, url: str) -> None:
    status = response.status
    said = f"{status} {scrubbed(response.reason or '')}".strip()
    if status in (200, 206, 416):
        return
    if status in (404, 410):
        raise NotThereError(f"{printable(url)} is not there ({said})")
    if status in _BUSY or status >= 500:
        raise HiccupError(f"the server answered {said}", retry_after_s(response.headers.get("Retry-After")))
    remedy = "; check the address and who may read it" if status in (401, 403) else ""
    raise StorageError(f"{printable(url)} cannot be read: the server answered {said}{remedy}")


def _facts_of(response: Any, url: str) -> tuple[Facts, int]:
    """What an answer with a body says of the file, and the first byte it sends."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise StorageError(f"{printable(url)}: the server compresses on the way; turn that off for shards")
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    if response.status == 200:
        length = headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise StorageError(f"{printable(url)}: the server does not tell the size of the file; use one that does")
        return Facts(int(length), version, has_ranges=False), 0
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", headers.get("Content-Range", "").strip())
    if response.status != 206 or found is None:
        raise HiccupError(f"the server answered {response.status} without a usable Content-Range")
    return Facts(int(found[2]), version), int(found[1])


def _facts_of_empty(response: Any, url: str) -> Facts:
    """An empty file has no first byte: servers answer 416 and tell the length."""
    if response.headers.get("Content-Range", "").strip() != "bytes */0":
        raise StorageError(f"{printable(url)}: the server refuses its first byte (416)")
    return Facts(0, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
