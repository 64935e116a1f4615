"""Who writes the summaries of `bestiary describe`: a server, a run of ours, or nobody; and the options of each."""

from __future__ import annotations

import argparse
import logging
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestiary.description.cache import Cache
    from bestiary.description.endpoint import Endpoint
    from bestiary.description.engine import Summaries
    from bestiary.description.session import SessionSummariser

DEFAULTS: Mapping[str, int | float] = {
    "requests": 8,
    "attempts": 6,
    "timeout": 120.0,
    "backoff": 1.0,
    "max_tokens": 512,
    "temperature": 0.0,
}
"""Not the parser's: what was given is to be told from what was not."""
_POSITIVE = ("requests", "attempts", "timeout", "max_tokens")
_OF_SERVERS = ("summary_model", "api_key_env", "attempts", "timeout", "backoff")


def add_summary(group: Any) -> None:
    """Adds the options."""
    group.add_argument(
        "--summary",
        default="none",
        metavar="WHO",
        help="address of an OpenAI-compatible server up to /v1, session:RUN for a run of ours, or none (no shards)",
    )
    group.add_argument("--summary-model", metavar="NAME", help="what the server calls the model")
    group.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the server's key")
    for name, kind, metavar, what in (
        ("requests", int, "N", "under way at a time"),
        ("attempts", int, "N", "of one request; waits grow in between"),
        ("timeout", float, "S", "seconds without an answer, or without its end"),
        ("backoff", float, "S", "first wait in seconds, then doubled"),
        ("max_tokens", int, "N", "of a summary"),
        ("temperature", float, "T", "0 takes the most probable token"),
    ):
        told = f"{what} (default: {DEFAULTS[name]})"
        group.add_argument(_option(name), type=kind, metavar=metavar, help=told)


def check_summary(args: argparse.Namespace) -> None:
    """Raise for options without effect and for values that are none; fill in the defaults of what is not given."""
    given = [name for name in ("summary_model", "api_key_env", *DEFAULTS) if getattr(args, name) is not None]
    if args.summary == "none" and given:
        raise ValueError(f"{_options(given)}: no effect without --summary WHO; give it, or leave this out")
    of_servers = [name for name in given if name in _OF_SERVERS]
    if args.summary.startswith("session:") and of_servers:
        raise ValueError(f"{_options(of_servers)}: of a server, not of session:RUN; leave this out")
    for name, default in DEFAULTS.items():
        value = getattr(args, name)
        value = default if value is None else value
        if not math.isfinite(value) or not (value > 0 if name in _POSITIVE else value >= 0):
            wanted = "above 0" if name in _POSITIVE else "from 0 on"
            raise ValueError(f"{_option(name)} {value}: give a number {wanted}")
        setattr(args, name, value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options(names: list[str]) -> str:
    return ", ".join(map(_option, names))


def make_summaries(args: argparse.Namespace, cache: Cache, stop: threading.Event) -> Summaries | None:
    """The summaries that checked options ask for. stop: ends waits for a server."""
    from bestiary.description.engine import Summaries

    if args.summary == "none":
        return None
    summariser: Endpoint | SessionSummariser
    if args.summary.startswith("session:"):
        from bestiary.description.session import SessionSummariser

        run = Path(args.summary.removeprefix("session:"))
        summariser = SessionSummariser(
            run, device=args.device, max_new_tokens=args.max_tokens, temperature=args.temperature
        )
    else:
        summariser = _endpoint(args, stop)
    return Summaries(summariser, cache)


def _endpoint(args: argparse.Namespace, stop: threading.Event) -> Endpoint:
    from bestiary.description.endpoint import Asking, Endpoint
    from data_modules.storage.patience import Patience, retry_after_s

    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"--api-key-env {args.api_key_env}: no such variable, or it is empty; export the key in it"
            )
    if not args.summary_model:
        raise ValueError(f"--summary {args.summary} needs --summary-model NAME, as the server calls it")
    asking = Asking(args.summary, args.summary_model, key, max_tokens=args.max_tokens, temperature=args.temperature)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    patience = Patience(attempts=args.attempts, timeout_s=args.timeout, backoff_s=args.backoff)
    return Endpoint(asking, patience=patience, retry_after_s=retry_after_s, stop=stop)
