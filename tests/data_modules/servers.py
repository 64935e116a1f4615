"""A web server on loopback that serves files with ranges, and misbehaves where a test asks for it."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request: its number from 0 (over all connections), its path, its Range header, all its headers."""

    number: int
    path: str
    range: str | None
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Deed:
    """What to do instead of answering well. Fields combine where that makes sense."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: float | None = None
    """Close the connection after this share of the body."""
    ignore_range: bool = False
    without_length: bool = False
    etag: str | None = None
    delay_s: float = 0.0
    extra: bytes = b""
    """Sent after the body, and announced."""
    drip_s: float = 0.0
    """Wait so long before every byte."""
    page: bytes | None = None
    """Sent whole in place of the file, with status 200."""
    shift: int = 0
    """The range that comes begins so many bytes late."""


Misbehave = Callable[[Ask], Deed | None]


class FileServer:
    """Serves files from memory or from a folder; a context manager. `asks` records every request."""

    def __init__(self, files: Mapping[str, bytes] | Path, misbehave: Misbehave | None = None) -> None:
        self.files = files
        self.misbehave = misbehave
        self.asks: list[Ask] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def contents(self, path: str) -> bytes | None:
        name = path.partition("?")[0].lstrip("/")
        if isinstance(self.files, Path):
            file = self.files / name
            return file.read_bytes() if file.is_file() else None
        return self.files.get(name)

    def note(self, path: str, headers: Mapping[str, str]) -> Ask:
        with self._lock:
            ask = Ask(len(self.asks), path, headers.get("Range"), headers)
            self.asks.append(ask)
        return ask


def every(number: int, deed: Deed) -> Misbehave:
    """Misbehave at every so-many-th request."""
    return lambda ask: deed if ask.number % number == number - 1 else None


def first(count: int, deed: Deed) -> Misbehave:
    """Misbehave at the first so many requests."""
    return lambda ask: deed if ask.number < count else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or had enough is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(owner: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            ask = owner.note(self.path, dict(self.headers))
            deed = (owner.misbehave(ask) if owner.misbehave else None) or Deed()
            time.sleep(deed.delay_s)
            data = owner.contents(self.path)
            if data is None or (deed.status and deed.status not in (200, 206)):
                self._send(deed.status or 404, b"", deed, {})
                return
            if deed.page is not None:
                self._send(200, deed.page, deed, {})
                return
            etag = deed.etag if deed.etag is not None else f'"{zlib.crc32(data):08x}"'
            headers = {"ETag": etag} if etag else {}
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", ask.range or "")
            if found is None or deed.ignore_range:
                self._send(200, data, deed, headers)
                return
            start, stop = int(found[1]) + deed.shift, min(int(found[2]) + 1, len(data))
            if start >= len(data):
                self._send(416, b"", deed, {**headers, "Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._send(206, data[start:stop], deed, headers)

        do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

        def _send(self, status: int, body: bytes, deed: Deed, headers: Mapping[str, str]) -> None:
            body += deed.extra
            self.send_response(status)
            for name, value in {**headers, **deed.headers}.items():
                self.send_header(name, value)
            if deed.without_length:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for place in range(len(body) if deed.drip_s else 0):
                time.sleep(deed.drip_s)
                self.wfile.write(body[place : place + 1])
            if deed.drip_s:
                return
            if deed.drop_after is None:
                self.wfile.write(body)
                self.close_connection = self.close_connection or deed.without_length
                return
            self.wfile.write(body[: int(len(body) * deed.drop_after)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler
