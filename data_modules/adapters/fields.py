"""The fields of one record, taken one by one: what no adapter took goes into the sample's meta, so nothing is lost."""

from __future__ import annotations

from typing import Any

import msgspec

from data_modules.adapters.protocol import RejectedRecordError

FIELD_BYTES = 16 * 2**10
"""A field of more JSON than this (masks, embedded pictures) is not copied into meta; `left_out` names it."""


class Fields:
    """The fields of one record and where it stands; RejectedRecordError unless it is a JSON object."""

    def __init__(self, found: object, where: str) -> None:
        if not isinstance(found, dict):
            raise RejectedRecordError(where, f"is {shown(found)}, not an object of fields")
        self.where = where
        self._found: dict[str, Any] = found
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def look(self, name: str) -> Any:
        """The value of a field that also stays in meta; None where it is missing."""
        return self._found.get(name)

    def take(self, name: str) -> Any:
        """The value of a field that the sample holds elsewhere, so meta need not; None where it is missing."""
        self._taken.add(name)
        return self._found.get(name)

    def need(self, name: str) -> Any:
        """As `take`, of a field that must be there."""
        if name not in self._found:
            raise self.rejected(f"has no field {name!r}, only {shown(list(self._found))}")
        return self.take(name)

    def text(self, name: str) -> str:
        """As `need`, of a field that must hold text or a number."""
        return text_of(self.need(name), f"field {name!r}", self.where)

    def rejected(self, problem: str) -> RejectedRecordError:
        """The error to raise for this record."""
        return RejectedRecordError(self.where, problem)

    def meta(self, **own: Any) -> dict[str, Any]:
        """Meta of the sample: `own` facts that are not None, and every field that was not taken under its own name.

        A field whose name is one of `own` becomes `record_<name>`. `left_out` says of fields that are too large or no
        plain JSON how many bytes, or what, they are.
        """
        meta = {name: value for name, value in own.items() if value is not None}
        left_out = {}
        for name, value in self._found.items():
            if name in self._taken:
                continue
            problem = _unfit(value)
            if problem is not None:
                left_out[name] = problem
            else:
                meta[f"record_{name}" if name in own or name == "left_out" else name] = value
        return meta | ({"left_out": left_out} if left_out else {})


def text_of(value: object, what: str, where: str) -> str:
    """A text, or a number as its text (published loaders do the same); RejectedRecordError for anything else."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problem = f"{what} is {shown(value)}; it holds bytes that are no UTF-8"
            raise RejectedRecordError(where, problem) from error
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RejectedRecordError(where, f"{what} is {shown(value)}; it must be text")


def shown(value: object) -> str:
    """A value in a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unfit(value: object) -> str | None:
    """Why a field cannot stand in meta, or None where it can."""
    if value is None or isinstance(value, bool):
        return None
    try:
        encoded = msgspec.json.encode(value)
        is_plain = msgspec.json.decode(encoded) == value
    except (TypeError, ValueError, OverflowError, RecursionError):
        return type(value).__name__
    if not is_plain:  # dates, bytes and NaN have no JSON of their own
        return type(value).__name__
    return f"{len(encoded)} bytes" if len(encoded) > FIELD_BYTES else None
