"""LLaMA2-Accessory's list of annotation files: a yaml with `META`, one entry a file (also SPHINX-V's)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_modules.adapters.files import AnnotationFile
from data_modules.adapters.tables import one_line

ENTRY_FIELDS = ("path", "type", "root", "ratio", "preprocess", "prompt_type")
PREPROCESS = ("single_turn_llava", "caption")
_ALONE = (".yaml", ".yml")


def listed_files(annotations: Path, images: Path | None, *, allowed: Collection[str]) -> list[AnnotationFile]:
    """The files of a META yaml, or the annotation file itself; ValueError on anything the list may not say.

    Relative paths are relative to the yaml; an entry's `root` is relative to `images` (default: the yaml's folder).
    allowed: the fields of an entry that the format knows.
    """
    if annotations.suffix not in _ALONE:
        return [AnnotationFile(annotations, images)]
    entries = _load(annotations)
    if not isinstance(entries, dict) or not isinstance(entries.get("META"), list) or not entries["META"]:
        raise ValueError(f"{annotations} has no list META; write META: [{{path: ..., type: ...}}]")
    if len(entries) > 1:
        raise ValueError(f"{annotations} has {', '.join(map(str, entries))}; only META has a meaning")
    return [_file(entry, annotations, images, allowed) for entry in entries["META"]]


def _load(path: Path) -> Any:
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise ValueError(f"{path} is not a file; correct the path of the list")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as yaml: {one_line(error)}") from error


def _file(entry: object, path: Path, images: Path | None, allowed: Collection[str]) -> AnnotationFile:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{path}: the META entry {entry!r} has no path; name an annotation file")
    name = entry["path"]
    if unknown := [str(option) for option in entry if option not in allowed]:
        raise ValueError(
            f"{path}: the entry of {name} has {', '.join(unknown)}; it may have {', '.join(sorted(allowed))}"
        )
    for option in ("type", "root", "preprocess", "prompt_type"):
        if not isinstance(entry.get(option), str | None):
            raise ValueError(f"{path}: {option} of {name} is {entry[option]!r}; it must be text")
    ratio = entry.get("ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"{path}: ratio of {name} is {ratio!r}; it must be above 0 and at most 1")
    if entry.get("preprocess") not in (None, *PREPROCESS):
        raise ValueError(f"{path}: preprocess of {name} is {entry['preprocess']!r}; use {' or '.join(PREPROCESS)}")
    return AnnotationFile(
        path=path.parent / name,
        images=(images or path.parent) / (entry.get("root") or ""),
        label=name,
        ratio=ratio,
        facts={option: entry[option] for option in ("type", "preprocess", "prompt_type") if entry.get(option)},
    )
