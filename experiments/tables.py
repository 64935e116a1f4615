"""Results of a study as part of its README."""

from __future__ import annotations

from pathlib import Path

START, END = "<!-- tables -->", "<!-- end of tables -->"


def write_tables(document: Path, tables: str) -> None:
    """Put text between the document's two marks; ValueError where it has none."""
    text = document.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{document} has no {START} and {END}; put them where the tables belong")
    before, rest = text.split(START)
    document.write_text(f"{before}{START}\n\n{tables}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
