"""Addresses: which may be opened, how they are joined, printed and expanded. Pure functions, nothing is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from data_modules.storage.errors import StorageError

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "memory")
"""What may be read over a network (`memory`, fsspec's store inside the process, is for tests)."""

MAX_NAMES = 100_000
"""A brace pattern may name so many files."""

MAX_REDIRECTS = 5
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_SAFE_IN_URL = "%/:=&?~#+!$,;'@()*[]{}"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SIGNATURES = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|.*token.*|.*secret.*"
    r"|.*password.*|.*api_?key.*|sig|se|sp|sv|st|sr|spr|skoid|sktid|skt|ske|sks|skv|sip|ss|srt",
    re.IGNORECASE,
)
"""Query parameters that say who asks (AWS, Google and Azure signatures, tokens), not what is asked for."""


def scheme_of(location: str) -> str | None:
    """The scheme of a URL in small letters, None for a local path; StorageError for one that may not be opened."""
    found = _SCHEME.match(location)
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in (*REMOTE_SCHEMES, "file") or not location[found.end() :].startswith("//"):
        allowed = ", ".join(f"{name}://" for name in (*REMOTE_SCHEMES, "file"))
        raise StorageError(
            f"{printable(location)}: {scheme}: is not an address that is opened; allowed are {allowed} and local paths "
            "(write ./ before a path with a colon)"
        )
    if "::" in re.sub(r"//([^/@]*@)?\[[0-9A-Fa-f:.]*\]", "//", location, count=1):  # an IPv6 host may have them
        raise StorageError(f"{printable(location)}: chained addresses (::) are not opened; give the plain one")
    return scheme


def is_remote(location: str) -> bool:
    """Whether this is read over a network; StorageError for an address that may not be opened."""
    return scheme_of(location) not in (None, "file")


def local_path(location: str) -> Path:
    """The path of a local location, a `file://` URL included."""
    if scheme_of(location) is None:
        return Path(location)
    parts = urlsplit(location)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise StorageError(f"{printable(location)}: a file URL names this machine only: file:///path")
    return Path(unquote(parts.path))


def checked_name(name: str) -> str:
    """A file name relative to its folder; StorageError for one that is absolute or could leave the folder."""
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in name or not name.isprintable():
        raise StorageError(f"{name!r} is not a name inside a folder; it must be relative, without . and ..")
    return name


def joined(folder: str, name: str) -> str:
    """The URL of a file of a remote folder; the folder's query (a signature that covers it) stays."""
    checked_name(name)
    scheme = folder.partition(":")[0].lower()
    if scheme not in _DEFAULT_PORTS:
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(quote(folder, safe=_SAFE_IN_URL))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def printable(url: str) -> str:
    """A URL without what could be a secret: user, password and the values of its query."""
    shown = re.sub(r"//[^/?#]*@", "//***@", url.partition("?")[0], count=1)
    return "".join(c if c.isprintable() else "?" for c in shown) + ("?***" if "?" in url else "")


def scrubbed(text: str) -> str:
    """A library's message on one line, the secrets of any URL in it blotted out."""
    text = re.sub(r"//[^/\s@]*@", "//***@", " ".join(text.split()))
    return re.sub(r"\?[^\s'\")]+", "?***", text)[:300]


def identity(url: str) -> str:
    """What a URL asks for, without who asks: equal for two signed URLs of one file. It names cached files."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        return url
    kept = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNATURES.fullmatch(k)]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(kept), fragment=""))


def check_redirect(before: str, after: str) -> str:
    """The target of a redirect, if it is on the same server (http may become https); else StorageError.

    User and password stay with it.
    """
    try:
        old, new = urlsplit(before), urlsplit(after)
        old_port, new_port = (parts.port or _DEFAULT_PORTS.get(parts.scheme) for parts in (old, new))
    except ValueError as error:  # a port or an IPv6 host that is none
        raise StorageError(f"{printable(before)} redirects to {printable(after)}, which is no address") from error
    is_upgrade = (old.scheme, new.scheme) == ("http", "https") and (old_port, new_port) == (80, 443)
    is_same = (old.scheme, old_port) == (new.scheme, new_port)
    if old.hostname != new.hostname or not (is_same or is_upgrade):
        raise StorageError(
            f"{printable(before)} redirects to another server, {printable(after)}; redirects are followed only on the "
            "same host, so give the address of the server that holds the files"
        )
    user, at, _ = old.netloc.rpartition("@")
    return after if not at or "@" in new.netloc else urlunsplit(new._replace(netloc=f"{user}@{new.netloc}"))


def expand_braces(pattern: str) -> list[str]:
    """The names of a pattern with `{00000..00099}` (inclusive, zero-padded as written) and `{a,b}`, in order.

    Braces do not nest. A pattern without braces is its own only name.
    """
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise StorageError(f"{printable(pattern)}: braces do not match; write {{00000..00099}} or {{a,b}}, not nested")
    choices: list[list[str]] = []
    total = 1
    for number, piece in enumerate(pieces):
        options = list(_options(piece, pattern)) if number % 2 else [piece]
        total *= len(options)
        if total > MAX_NAMES:
            raise _too_many(pattern)
        choices.append(options)
    return ["".join(chosen) for chosen in product(*choices)]


def names_tars(location: str) -> bool:
    """Whether this names tars (one, or a pattern of them) and not a folder."""
    return "{" in location or location.partition("?")[0].endswith(".tar")


def split_pattern(location: str) -> tuple[str, list[str]]:
    """The folder and the file names of a pattern of files, such as `https://host/set/part-{000..099}.tar`.

    Everything up to the last `/` before the first brace (or before the file name) is the folder; a query stays with it.
    Names of http(s) may be percent-encoded or not: `joined` encodes them.
    """
    plain, mark, query = location.partition("?")
    place = plain.find("{")
    end = plain.rfind("/", 0, place if place >= 0 else len(plain)) + 1
    names = expand_braces(plain[end:])
    if plain.partition(":")[0].lower() in _DEFAULT_PORTS:
        names = [unquote(name) for name in names]
    for name in names:
        checked_name(name)
    if len(set(names)) != len(names):
        raise StorageError(f"{printable(location)}: the pattern names one file twice")
    return (plain[:end] or "./") + mark + query, names


def _options(piece: str, pattern: str) -> Iterator[str]:
    inner = piece[1:-1]
    found = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner)
    if found is None:
        if ".." in inner or "," not in inner:
            raise StorageError(f"{printable(pattern)}: {piece} is neither {{00000..00099}} nor {{a,b}}")
        yield from inner.split(",")
        return
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise StorageError(f"{printable(pattern)}: {piece} counts down; write the smaller number first")
    if last - first >= MAX_NAMES:
        raise _too_many(pattern)
    width = max(len(found[1]), len(found[2])) if "0" in (found[1][0], found[2][0]) else 0
    yield from (f"{number:0{width}d}" for number in range(first, last + 1))


def _too_many(pattern: str) -> StorageError:
    return StorageError(f"{printable(pattern)}: names more than {MAX_NAMES} files; give several sources")
