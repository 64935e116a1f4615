"""Annotation files and pictures for the adapters' tests, and the way from records to read-back samples."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bestiary.schema import Sample
from data_modules.adapters import Adapter, RejectedRecordError, make_adapter
from data_modules.shards import read_source, write_samples

SHARED = Path(os.environ.get("BESTIARY_SHARED") or Path(__file__).parents[4] / "shared") / "data"
"""Real files of the published data sets, never part of the repository."""


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips where the real data is not there."""
    missing = [name for name in names if not (SHARED / name).exists()]
    reason = f"{', '.join(missing)} not in {SHARED}; set BESTIARY_SHARED to the folder that holds data/"
    return pytest.mark.skipif(bool(missing), reason=reason)


def picture(width: int = 8, height: int = 6, form: str = "PNG") -> bytes:
    """An encoded picture of that size."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 9)).save(file, form)
    return file.getvalue()


def put(folder: Path, **files: bytes) -> Path:
    """Writes pictures, `a_png` as a.png; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def put_json(path: Path, value: object) -> Path:
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def adapter(format_name: str, annotations: Path, images: Path | None = None, **options: Any) -> Adapter:
    """An adapter as the console script makes it: every option a text."""
    domain = options.pop("domain", "natural")
    texts = {name: str(value) for name, value in options.items()}
    return make_adapter(format_name, annotations, images, source="s", domain=domain, options=texts)


def adapted(made: Adapter) -> tuple[list[Sample], list[str]]:
    """All samples, and one line for every rejected record."""
    samples, lines = [], []
    for record in made.records():
        try:
            found = made.to_sample(record)
        except RejectedRecordError as error:
            lines.append(str(error))
            continue
        samples += found if isinstance(found, list) else [found]
    return samples, lines


def stored(folder: Path, samples: list[Sample]) -> list[Sample]:
    """The samples after they were written into shards and read back."""
    write_samples(folder, iter(samples), source="s", samples_per_shard=50)
    return list(read_source(folder))


def only(made: Adapter) -> Sample:
    """The sample of a file with one good record."""
    samples, lines = adapted(made)
    assert not lines, lines
    (sample,) = samples
    return sample


def problem(made: Adapter) -> str:
    """The line of a file with one bad record."""
    samples, lines = adapted(made)
    assert not samples
    (line,) = lines
    assert "\n" not in line
    return line
