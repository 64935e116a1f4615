"""Imported weights as a folder of ours, written one tensor at a time and complete or absent.

    model.safetensors      the model's tensors under our names
    state.json             what a checkpoint says of itself (step 0, no stage, the tokenizer's hash, absent names)
    published.json         what export needs: layout, shards, order and dtypes of the published names (`Published`)
    part.json              instead of it, of an import of one part: what was dropped, settings that no shape shows
    config.json ...        the published side files, byte for byte
    model.yaml             the model as conf/model would say it, where the published config says everything
    extra.tensors          safetensors of published tensors that no model of ours has (only when asked to keep them)
    MANIFEST.json          bytes and sha256 of each, written last

It is a checkpoint folder as training writes it, so train.py takes it as `parent=` and in `model.weights`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bestiary.training.checkpoints import sync

MODEL, STATE, PUBLISHED, PART, EXTRA, NODE = (
    "model.safetensors",
    "state.json",
    "published.json",
    "part.json",
    "extra.tensors",
    "model.yaml",
)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when everything went well and otherwise leaves nothing behind."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            sync(file)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
