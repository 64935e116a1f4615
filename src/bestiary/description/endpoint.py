"""Summaries by any server that speaks OpenAI's chat completions: /v1/chat/completions.

What a server answers is other people's text: its size is bounded, its form is checked, nothing of it is trusted. It may
hold us back (Retry-After), but never send us, and the key we show it, to another address.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

from bestiary.description.words import SummaryError

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 20
"""Of a whole response; a detailed caption has a thousandth of it."""
_PATIENT = (408, 409, 425, 429)
_ABOUT_THE_PROMPT = (400, 413, 422)
_TOLD = 200
"""Characters of a server's own words that are shown."""


class Patience(Protocol):
    """How often and how long to try again."""

    @property
    def attempts(self) -> int:
        """Tries of a request."""

    @property
    def timeout_s(self) -> float:
        """Of silence, in seconds."""

    def wait_s(self, what: str, tried: int, asked_s: float = 0.0) -> float:
        """Seconds before the next try: growing, spread by `what`, at least what the server asked for."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked of the server. url: with /v1, without /chat/completions. api_key: never shown or logged."""

    url: str
    model: str
    api_key: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"the summary endpoint on {parts.hostname}: leave user, password and ?query out; name the variable "
                "that holds the key"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the summary endpoint {self.url!r} is no address; write it as https://host/v1")
        if not all("!" <= character <= "~" for character in self.api_key or ""):
            # The HTTP client would quote it in its error about the header.
            raise ValueError("the key of the summary endpoint holds blanks or more than ASCII; set it again")
        if not self.model:
            raise ValueError(f"the summary endpoint {self.url} needs the name of a model")

    def __repr__(self) -> str:
        return f"Asking({self.url!r}, {self.model!r})"


class Endpoint:
    """A Summariser over HTTP; any number of threads may call it.

    retry_after_s: seconds that a Retry-After header asks for. stop: set by whoever wants waiting calls to end.
    """

    name = "endpoint"

    def __init__(
        self,
        asking: Asking,
        *,
        patience: Patience,
        retry_after_s: Callable[[str | None], float],
        stop: threading.Event | None = None,
    ) -> None:
        if find_spec("httpx") is None:
            raise ValueError("a summary endpoint needs the package httpx; pip install 'bestiary[describe]'")
        import httpx

        self._asking = asking
        self._patience = patience
        self._retry_after_s = retry_after_s
        self._stop = stop or threading.Event()
        self._errors: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
        headers = {"Accept-Encoding": "identity"}
        if asking.api_key:
            headers["Authorization"] = f"Bearer {asking.api_key}"
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(
            headers=headers,
            timeout=patience.timeout_s,
            follow_redirects=False,
            limits=limits,
            verify=not asking.url.startswith("http://"),  # reading certificates takes long, and none is shown there
        )
        self._url = f"{asking.url.rstrip('/')}/chat/completions"

    @property
    def fingerprint(self) -> str:
        """Model and settings; not the address, which changes while the model stays."""
        asked = self._asking
        return f"chat {asked.model} max_tokens={asked.max_tokens} temperature={asked.temperature}"

    def __call__(self, prompt: str) -> str:
        """The answer's text.

        SummaryError where the server is down or busy beyond our patience. ValueError where it refuses this prompt or
        keeps answering without a text. EndpointError where it would refuse any.
        """
        what = sha256(prompt.encode()).hexdigest()
        tried = 0
        while True:
            tried += 1
            found = self._attempt(prompt)
            if isinstance(found, str):
                return found
            if tried >= self._patience.attempts or self._stop.is_set():
                raise found.error
            wait_s = self._patience.wait_s(what, tried, found.wait_s)
            log.debug("%s; trying again in %.1f s (%d of %d)", found.error, wait_s, tried, self._patience.attempts)
            if self._stop.wait(wait_s):
                raise found.error

    def _attempt(self, prompt: str) -> str | _Again:
        asked = self._asking
        body = {
            "model": asked.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
        }
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                content, is_late = _bounded(response, time.monotonic() + self._patience.timeout_s)
                status, wait_s = response.status_code, self._retry_after_s(response.headers.get("retry-after"))
                moved = response.headers.get("location", "")
        except self._errors as error:
            return _Again(SummaryError(f"{self._url}: {_shown(str(error)) or type(error).__name__}"))
        if status == 200 and is_late:
            return _Again(SummaryError(f"{self._url}: no whole answer in {self._patience.timeout_s:g} seconds"))
        if status == 200:
            try:
                return _text_of(content)
            except ValueError as error:
                return _Again(ValueError(self._without_key(f"{self._url}: {error}")))
        told = self._without_key(f"{self._url}: status {status} {_shown_bytes(content)}")
        if status in _PATIENT or status >= 500:
            return _Again(SummaryError(told), wait_s)
        if status in _ABOUT_THE_PROMPT:
            raise ValueError(f"the prompt is refused: {told}")
        if 300 <= status < 400:
            raise EndpointError(
                f"{self._url} sends us on to {_shown(moved)!r}: give the final address, if you trust it"
            )
        raise EndpointError(f"{told}; check the address, the model {asked.model!r} and the key")

    def _without_key(self, text: str) -> str:
        """Servers quote what they refuse."""
        return text.replace(self._asking.api_key, "***") if self._asking.api_key else text


class EndpointError(Exception):
    """The endpoint would refuse any prompt: wrong address, model or key."""


@dataclass(frozen=True, slots=True)
class _Again:
    """An attempt that may go well later; error: what is raised when it never does."""

    error: Exception
    wait_s: float = 0.0


def _bounded(response: Any, deadline: float) -> tuple[bytes, bool]:
    """The body's first bytes, up to a chunk more than allowed, and whether the deadline (monotonic) cut them off."""
    content = bytearray()
    for chunk in response.iter_bytes():  # of any size: a given one is waited for, beyond the deadline
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            break
        if time.monotonic() > deadline:
            return bytes(content), True
    return bytes(content), False


def _text_of(content: bytes) -> str:
    if len(content) > MAX_ANSWER_BYTES:
        raise ValueError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"the answer is no JSON: {_shown_bytes(content)!r}") from None
    try:
        text = found["choices"][0]["message"]["content"]
        reason = found["choices"][0].get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"the answer has no choices[0].message.content: {_shown_bytes(content)!r}") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the answer's text is {_shown(str(text))!r}")
    if reason == "length":
        raise ValueError("the answer was cut off by max_tokens; allow more")
    return text.encode("utf-8", "replace").decode().strip()  # JSON can say half a character, UTF-8 cannot


def _shown_bytes(content: bytes) -> str:
    return _shown(content[: 4 * _TOLD].decode("utf-8", "replace"))


def _shown(text: str) -> str:
    """One short printable line of other people's words."""
    line = " ".join(text.split())[:_TOLD]
    return "".join(c if c.isprintable() else "?" for c in line)
