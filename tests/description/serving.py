"""A small OpenAI-compatible server for tests: counts what it is asked, and misbehaves where it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def said(text: Any, reason: str = "stop") -> Answer:
    """A good answer."""
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": reason}]}).encode()


@dataclass
class Chat:
    """What the server does. answer: of a prompt and how often it was asked before. delay_s: before every answer."""

    answer: Callable[[str, int], Answer] = lambda prompt, times: said(f"caption {sha256(prompt.encode()).hexdigest()}")
    delay_s: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    """Prompts with a good answer."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextmanager
def serving(chat: Chat) -> Iterator[Chat]:
    """The chat at `chat.url`, which ends with /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            with chat.lock:
                times = chat.asked[prompt]
                chat.asked[prompt] += 1
                chat.bodies.append(body)
                chat.headers.append(dict(self.headers))
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
            time.sleep(chat.delay_s)
            status, headers, content = chat.answer(prompt, times)
            with chat.lock:
                chat.at_once -= 1
                chat.answered[prompt] += status == 200
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: pytest shows failures."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed, or had enough of a body."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
