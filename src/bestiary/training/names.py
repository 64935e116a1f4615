"""Globs over parameter names, and the nearest names for what a glob or a file got wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def nearest(word: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` candidates that look most like `word`, best first."""
    return difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.4)


def matching(names: Sequence[str], globs: Sequence[str], *, rule: str) -> set[str]:
    """The names that any glob matches (`*` crosses dots); a glob that matches none is an error.

    rule: what the globs are for, used in the message (`stage.train`).
    """
    found: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatchcase(name, glob)}
        if not hits:
            raise ValueError(f"{rule}: glob {glob!r} matches no parameter name; nearest: {_suggest(glob, names)}")
        found |= hits
    return found


def any_match(name: str, globs: Iterable[str]) -> bool:
    """True if one of the globs matches the name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def _suggest(glob: str, names: Sequence[str]) -> str:
    """Names near the glob's literal text, or else the parts there are."""
    prefixes = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    close = nearest(glob.replace("*", "").strip("."), sorted(prefixes | set(names)))
    return ", ".join(close or sorted({name.split(".")[0] for name in names})[:8]) or "(the model has no parameters)"
