"""The two ends of the scale: the bare loop nobody can beat by much, and the references' own path."""

from __future__ import annotations

import io
import json
import mmap
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.throughput.reference_transform import prepare as prepare_picture

Item = tuple[Any, ...]


def open_contender(task: str, folder: str, *, kind: str) -> Callable[[], Iterator[Item]]:
    """The epochs of one kind over the data below `folder`."""
    return {"floor": _floor, "references": _references, "pillow": _pillow}[kind](task, Path(folder))


def _floor(task: str, folder: Path) -> Callable[[], Iterator[Item]]:
    """Slices of a map and json.loads, in an order made beforehand; for pictures, one decode and resize of each."""
    places: list[tuple[mmap.mmap, str, int, int, int, int]] = []
    for path in sorted((folder / "ours").glob("*.tar")):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        for record, image in zip(members[::2], members[1::2], strict=True):
            key = record.name.rpartition(".")[0]
            places.append((data, key, record.offset_data, record.size, image.offset_data, image.size))
    order = np.random.default_rng(0)

    def read() -> Iterator[Item]:
        for number in order.permutation(len(places)).tolist():
            data, key, start, size, image_start, image_size = places[number]
            yield key, json.loads(data[start : start + size]), data[image_start : image_start + image_size]

    if task == "read":
        return read
    from experiments.throughput.ours import canvas_of  # the project's own decoder, bytes at hand

    held = [(key, image) for key, _, image in read()]

    def prepare() -> Iterator[Item]:
        for key, image in held:
            yield key, canvas_of(image, 448)

    return prepare


def _references(task: str, folder: Path) -> Callable[[], Iterator[Item]]:
    """One JSON list in memory, one file opened a sample; the transform of the SPHINX reference."""
    table = json.loads((folder / "files" / "annotations.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(0)

    def read() -> Iterator[Item]:
        for number in order.permutation(len(table)).tolist():
            entry = table[number]
            yield entry["key"], entry["record"], (folder / "files" / entry["image"]).read_bytes()

    if task == "read":
        return read

    def prepare() -> Iterator[Item]:
        for key, _, image in read():
            yield key, prepare_picture(image)

    return prepare


def _pillow(task: str, folder: Path) -> Callable[[], Iterator[Item]]:
    """Pillow alone, without pad and normalisation: full decode, bicubic to 448 on the longer side."""
    read = _references("read", folder)

    def prepare() -> Iterator[Item]:
        for key, _, data in read():
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = 448 / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            yield key, np.asarray(image.resize(size, Image.Resampling.BICUBIC))

    return prepare
