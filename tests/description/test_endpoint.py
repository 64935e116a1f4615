"""A server may be slow, busy, wrong or hostile: every answer ends in a text, a retry or one line."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bestiary.description.endpoint import MAX_ANSWER_BYTES, Asking, Endpoint, EndpointError
from bestiary.description.words import SummaryError
from data_modules.storage.patience import Patience, retry_after_s
from tests.description.serving import Answer, Chat, said, serving

KEY = "sk-very-secret"
QUICK = Patience(attempts=3, timeout_s=5.0, backoff_s=0.001)


def endpoint(url: str, *, patience: Patience = QUICK, stop: threading.Event | None = None) -> Endpoint:
    return Endpoint(Asking(url, "small", KEY), patience=patience, retry_after_s=retry_after_s, stop=stop)


def outcome(answer: Callable[[str, int], Answer]) -> tuple[str | Exception, int]:
    """What asking gives, and how many requests it took."""
    with serving(Chat(answer)) as chat:
        asked = endpoint(chat.url)
        try:
            found: str | Exception = asked("describe")
        except Exception as error:
            found = error
        return found, chat.asked["describe"]


def test_a_request_names_model_and_prompt_and_brings_the_key_that_no_text_shows() -> None:
    with serving(Chat()) as chat:
        asked = endpoint(chat.url)
        assert asked("describe").startswith("caption ")
        assert chat.bodies[0]["model"] == "small" and chat.bodies[0]["messages"][0]["role"] == "user"
        assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in asked.fingerprint + repr(asked._asking) + str(vars(asked))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again_and_a_server_that_stays_busy_leaves_the_picture_pending(status: int) -> None:
    assert outcome(lambda prompt, times: said("yes") if times else (status, {}, b"busy")) == ("yes", 2)
    found, requests = outcome(lambda prompt, times: (status, {}, f"busy {KEY}".encode()))
    assert isinstance(found, SummaryError) and requests == 3 and KEY not in str(found)


def test_retry_after_is_honoured_and_a_stop_ends_the_wait() -> None:
    waits: list[float] = []

    class Watched(Patience):
        def wait_s(self, what: str, tried: int, asked_s: float = 0.0) -> float:
            waits.append(asked_s)
            return super().wait_s(what, tried, asked_s)

    stop = threading.Event()
    with serving(Chat(lambda prompt, times: (429, {"Retry-After": "7"}, b""))) as chat:
        asked = endpoint(chat.url, patience=Watched(3, 5.0, 0.001), stop=stop)
        threading.Timer(0.05, stop.set).start()
        with pytest.raises(SummaryError, match="429"):
            asked("describe")
        assert waits == [7.0] and chat.asked["describe"] == 1


def test_a_server_that_is_not_there_leaves_the_picture_pending() -> None:
    with serving(Chat()) as chat:
        pass
    with pytest.raises(SummaryError, match="chat/completions"):
        endpoint(chat.url)("describe")


def test_an_answer_that_drips_is_cut_off_in_time_and_leaves_the_picture_pending() -> None:
    whole = said("yes")[2]
    with dripping(whole) as (url, asked):
        drips = endpoint(url, patience=Patience(attempts=2, timeout_s=0.3, backoff_s=0.001))
        begin = time.monotonic()
        with pytest.raises(SummaryError, match=r"no whole answer in 0\.3 seconds"):
            drips("describe")
        assert len(asked) == 2 and time.monotonic() - begin < 5
        assert endpoint(url, patience=Patience(attempts=1, timeout_s=60.0))("describe") == "yes"


@contextmanager
def dripping(content: bytes, *, blanks: int = 20) -> Iterator[tuple[str, list[None]]]:
    """A server's address, and an entry a request: for a second a blank every 0.05 s, then the content."""
    asked: list[None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(None)
            self.send_response(200)
            self.send_header("Content-Length", str(blanks + len(content)))
            self.end_headers()
            with suppress(OSError):  # the client may have gone
                for _ in range(blanks):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: pytest shows failures."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


HOSTILE = {
    "no json": (200, {}, b"<html>hello</html>"),
    "nested": (200, {}, b"[" * 100_000),
    "other fields": (200, {}, b'{"choices": []}'),
    "a list": (200, {}, b"[1]"),
    "a number": said(7),
    "nothing": said("  "),
    "null": said(None),
    "cut off": said("half a", "length"),
    "huge": said("x" * (MAX_ANSWER_BYTES + 1)),
    "bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * (8 * MAX_ANSWER_BYTES))),
    "broken gzip": (200, {"Content-Encoding": "gzip"}, b"none"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_without_a_usable_text_is_one_line_after_some_attempts(name: str) -> None:
    status, headers, content = HOSTILE[name]
    length = {"Content-Length": str(len(content))}
    found, requests = outcome(lambda prompt, times: (status, {**headers, **length}, content))
    assert isinstance(found, ValueError | SummaryError) and requests == 3
    assert "\n" not in str(found) and len(str(found)) < 600


def test_a_refused_prompt_is_not_repeated_and_a_refused_key_ends_the_run_without_showing_it() -> None:
    for status in (400, 422):
        found, requests = outcome(lambda prompt, times, status=status: (status, {}, b"\x1b[31mbad\nprompt"))
        assert isinstance(found, ValueError) and requests == 1 and str(found).isprintable()
    for status in (401, 403, 404):
        found, requests = outcome(lambda prompt, times, status=status: (status, {}, f"bad key {KEY}".encode()))
        assert isinstance(found, EndpointError) and requests == 1 and KEY not in str(found)


def test_a_redirect_is_refused_and_the_key_goes_nowhere_else() -> None:
    with serving(Chat()) as other:
        to = f"{other.url}/chat/completions"
        found, requests = outcome(lambda prompt, times: (307, {"Location": to}, b""))
        assert isinstance(found, EndpointError) and to in str(found) and requests == 1
        assert not other.asked


def test_half_a_character_becomes_a_question_mark() -> None:
    content = b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}'
    assert outcome(lambda prompt, times: (200, {}, content)) == ("a ? b", 1)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://h/v1", "https://", "https://u:p@h/v1", "https://h/v1?key=x"]
)
def test_an_address_that_is_none_or_holds_a_secret_is_one_line(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint") as caught:
        Asking(url, "small")
    assert ":p@" not in str(caught.value) and "key=x" not in str(caught.value)


def test_a_key_with_a_line_end_is_refused_before_any_header_quotes_it() -> None:
    with pytest.raises(ValueError, match="blanks") as caught:
        Asking("https://h/v1", "small", f"{KEY}\nx")
    assert KEY not in str(caught.value)
