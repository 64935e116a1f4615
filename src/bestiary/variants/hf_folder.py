"""Hugging Face checkpoint folders, read and written one tensor at a time.

    model.safetensors | pytorch_model.bin                       one file
    model-00001-of-00003.safetensors ... + model.safetensors.index.json      a set of shards and which tensor is where
    pytorch_model-00001-of-00003.bin ... + pytorch_model.bin.index.json

A folder that was read is written back as it was: the same files with the same tensors, the index byte for byte, and
safetensors byte for byte; pickles tensor for tensor. Where a folder has safetensors and pickles, safetensors are read
and that is said.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bestiary.variants.pickles import Windowed, load_pickle, window_bytes
from bestiary.variants.tensor_file import (
    DTYPES,
    HEADER_DTYPES,
    Opened,
    TensorFile,
    Tensors,
    dtype_name,
    header_text,
    read_header,
)

log = logging.getLogger(__name__)

Format = Literal["safetensors", "bin"]
SINGLE = {
    "safetensors": ("model.safetensors", "open_clip_model.safetensors"),
    "bin": ("pytorch_model.bin", "open_clip_pytorch_model.bin"),
}
"""Names of a checkpoint in one file; the second is how open_clip's repositories call it."""
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
SHARD = re.compile(r"(?:model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
SUFFIXES: dict[str, Format] = {".safetensors": "safetensors", ".bin": "bin", ".pth": "bin", ".pt": "bin"}
WEIGHT_SUFFIXES = {*SUFFIXES, ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".tflite", ".ot"}
"""Files of these kinds are weights, never side files."""
SIDE_FILE_BYTES = 64 << 20
"""A larger file beside the weights is not carried along; no tokenizer comes near it."""


@dataclass(frozen=True)
class HfRecord:
    """What a folder looked like, enough to write it again.

    files: file name -> its tensors in order. dtypes: by tensor name. index: the index file's text. headers: text of
    each safetensors header. aliases: tensors of one pickle that share memory with an earlier one (tied weights).
    wrapped: key under which a pickle holds its tensors ("state_dict"), "" at the top.
    """

    format: Format
    files: dict[str, list[str]]
    dtypes: dict[str, str]
    index: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    wrapped: str = ""

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HfRecord:
        """The inverse of `to_json`; what is not one is a line of error."""
        try:
            told = json.loads(text)
            record = cls(**told)
            if record.format not in SINGLE or any(Path(name).name != name for name in record.files):
                raise KeyError(record.format)
            if odd := [dtype for dtype in record.dtypes.values() if dtype not in DTYPES]:
                raise KeyError(odd[0])
            return record
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a record of a folder by this version ({error}); import the weights again") from error


class HfFolder:
    """The tensors of one folder, or of one weights file, and what lies beside them.

    config: of config.json, {} without. shapes, dtypes: by published name, in the order of the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files, index = find_files(path)
        self.format: Format = SUFFIXES[self.files[0].suffix]
        self.file_bytes = [file.stat().st_size for file in self.files]
        self.config = read_object(path / "config.json") if path.is_dir() and (path / "config.json").is_file() else {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Windowed] = {}
        headers: dict[str, str] = {}
        aliases: dict[str, str] = {}
        self.wrapped = ""
        for file in self.files:
            if self.format == "safetensors":
                headers[file.name] = self._take_header(file)
            else:
                aliases |= self._take_pickle(file)
        _check_index(path, index, self._file_of)
        _check_total(index, self.shapes, self.dtypes, aliases)
        self.record = HfRecord(
            format=self.format,
            files={file.name: [n for n, place in self._file_of.items() if place == file] for file in self.files},
            dtypes={name: str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items()},
            index=index.read_text(encoding="utf-8") if index else None,
            headers=headers,
            aliases=aliases,
            wrapped=self.wrapped,
        )

    @property
    def side_files(self) -> dict[str, Path]:
        """Small files beside the weights by name: config, tokenizer, preprocessor, licence ..."""
        if not self.path.is_dir():
            return {}
        there = sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))
        kept = (f for f in there if f.suffix not in WEIGHT_SUFFIXES and f.name not in INDEX.values())
        return {file.name: file for file in kept if file.stat().st_size <= SIDE_FILE_BYTES}

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, mapped; let go of it before asking for the next."""
        file = self._file_of[name]
        if file not in self._open:
            self._open = {file: Windowed(lambda: self._read(file), window=window_bytes(file.stat().st_size))}
        return self._open[file][name]

    def _read(self, file: Path) -> Mapping[str, torch.Tensor]:
        return Opened(file) if self.format == "safetensors" else self._read_pickle(file)

    def _place(self, name: str, file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if name in self._file_of:
            raise ValueError(f"{file}: {name} is in {self._file_of[name].name}, too; keep one set in the folder")
        self._file_of[name], self.dtypes[name], self.shapes[name] = file, dtype, shape

    def _take_header(self, file: Path) -> str:
        text = read_header(file)
        told = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for name, entry in sorted(told.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in HEADER_DTYPES:
                raise ValueError(f"{file}: {name} is of type {entry['dtype']}, which is not read; convert it first")
            self._place(name, file, HEADER_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        return text

    def _take_pickle(self, file: Path) -> dict[str, str]:
        """Its tensors; returns those that share memory with an earlier one of the file."""
        tensors = self._read_pickle(file)
        places: dict[tuple[object, ...], str] = {}
        aliases = {}
        for name, tensor in tensors.items():
            dtype_name(tensor.dtype, f"{file}: {name}")
            self._place(name, file, tensor.dtype, tuple(tensor.shape))
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and place in places:
                aliases[name] = places[place]
            else:
                places[place] = name
        return aliases

    def _read_pickle(self, file: Path) -> Mapping[str, torch.Tensor]:
        state: Any = load_pickle(file)
        self.wrapped = next((key for key in ("state_dict", "model") if isinstance(state.get(key), dict)), "")
        state = state[self.wrapped] if self.wrapped else state
        if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
            raise ValueError(f"{file} holds no tensors by name; is it a published checkpoint?")
        return state  # type: ignore[no-any-return]


def looks_like_hf(path: Path) -> bool:
    """Whether a path is one weights file or holds files that are named as Hugging Face's are; reads none."""
    if path.is_file():
        return path.suffix in SUFFIXES
    known = {*INDEX.values(), *(name for names in SINGLE.values() for name in names)}
    return path.is_dir() and any(file.name in known or SHARD.fullmatch(file.name) for file in path.iterdir())


def find_files(path: Path) -> tuple[list[Path], Path | None]:
    """Weight files in order and the index, if there is one; anything but one whole set is one line of error."""
    if path.is_file() and path.suffix in SUFFIXES:
        return [path], None
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a published checkpoint")
    found = {name: _set_of(path, name) for name in SINGLE}
    present = [name for name, files in found.items() if files[0]]
    if not present:
        if stray := sorted(p.name for p in path.iterdir() if SHARD.fullmatch(p.name)):
            raise ValueError(f"{path}: {stray[0]} has no index.json beside it; fetch the index of these shards")
        raise ValueError(f"{path}: neither model.safetensors nor pytorch_model.bin nor the index of shards is there")
    if len(present) > 1:
        log.info("%s: safetensors are read, %s beside them is not", path, found["bin"][0][0].name)
    return found[present[0]]


def _set_of(path: Path, kind: str) -> tuple[list[Path], Path | None]:
    """The set of one format: by its index, or its single file."""
    index = path / INDEX[kind]
    singles = [path / name for name in SINGLE[kind] if (path / name).is_file()]
    if not index.is_file():
        return singles[:1], None
    if singles:
        raise ValueError(f"{path}: {singles[0].name} and {index.name} are two sets of weights; keep one in the folder")
    told = read_object(index).get("weight_map")
    if not isinstance(told, dict) or not told or not all(isinstance(name, str) for name in told.values()):
        raise ValueError(f"{index} has no weight_map of tensors and files; fetch it again")
    names = sorted(set(told.values()))
    if odd := [name for name in names if Path(name).name != name or SUFFIXES.get(Path(name).suffix) != kind]:
        raise ValueError(f"{index} names {odd[0]}, which is no {kind} file of this folder; shards of mixed formats?")
    if lost := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"{path}: missing {lost[0]}, {len(lost)} of {len(names)} shards of {index.name}; fetch it")
    return [path / name for name in names], index


def _check_index(path: Path, index: Path | None, places: Mapping[str, Path]) -> None:
    """The index and the files must tell of the same tensors in the same places."""
    if index is None:
        return
    told: dict[str, str] = read_object(index)["weight_map"]
    for name in [*told, *places]:
        here = places[name].name if name in places else "no file"
        if told.get(name, "no file") != here:
            raise ValueError(
                f"{path}: {name} is in {here}, but {index.name} says {told.get(name, 'no file')}; they are of two "
                "versions: fetch the folder again"
            )


def _check_total(
    index: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    aliases: Mapping[str, str],
) -> None:
    """The bytes the index tells of must be those of the tensors; a shared one counts once or, in some files, twice."""
    told = (read_object(index).get("metadata") or {}).get("total_size") if index else None
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    twice = sum(sizes.values())
    if told is not None and told not in (twice, twice - sum(sizes[name] for name in aliases)):
        raise ValueError(
            f"{index} says metadata.total_size {told}, but its shards hold {twice} bytes of tensors; they are of two "
            "versions: fetch the folder again, or take total_size out if it was wrong from the beginning"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; anything else in it is a line of error."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds a {type(told).__name__}, not an object of settings; fetch it again")
    return told


def write_hf(folder: Path, record: HfRecord, tensor: Callable[[str], torch.Tensor]) -> list[str]:
    """Write weight files and index into a folder; tensor: gives each published tensor whole; returns file names.

    Every tensor is brought to the recorded dtype. Safetensors hold one tensor in memory at a time, pickles a file.
    """
    for file, names in record.files.items():
        values = ((name, tensor(name).to(DTYPES[record.dtypes[name]])) for name in names)
        if record.format == "safetensors":
            _write_safetensors(folder / file, record.headers[file], values)
        else:
            _write_pickle(folder / file, record, values)
    if record.index is not None:
        (folder / INDEX[record.format]).write_text(record.index, encoding="utf-8")
    return [*record.files]


def _write_safetensors(path: Path, header: str, values: Iterator[tuple[str, torch.Tensor]]) -> None:
    told = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    plan = {name: (HEADER_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in told.items()}
    with TensorFile(path, plan, header=header) as file:
        for name, value in values:
            if tuple(value.shape) != plan[name][1]:
                raise ValueError(f"{name} is {tuple(value.shape)}, the folder it is written as has {plan[name][1]}")
            file.add(name, value)


def _write_pickle(path: Path, record: HfRecord, values: Iterator[tuple[str, torch.Tensor]]) -> None:
    state: dict[str, torch.Tensor] = {}
    for name, value in values:
        first = record.aliases.get(name)
        state[name] = state[first] if first else value.clone(memory_format=torch.contiguous_format)
    torch.save({record.wrapped: state} if record.wrapped else state, path)


def plan_hf(tensors: Tensors, *, max_shard_bytes: int = 5 << 30, kind: Format = "safetensors") -> HfRecord:
    """A new shard map in transformers' file names, filled in order up to `max_shard_bytes` (its default, 5 GB)."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    used = total = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, shape)
        used += size
        total += size
    stem, _, suffix = SINGLE[kind][0].rpartition(".")
    count = len(shards)
    files = [f"{stem}-{n:05d}-of-{count:05d}.{suffix}" for n in range(1, count + 1)] if count > 1 else SINGLE[kind][:1]
    placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}, indent=2) + "\n"
    headers = {file: header_text(shard, {"format": "pt"}) for file, shard in zip(files, shards, strict=True)}
    return HfRecord(
        format=kind,
        files={file: list(shard) for file, shard in zip(files, shards, strict=True)},
        dtypes={name: str(dtype).removeprefix("torch.") for name, (dtype, _) in tensors.items()},
        index=index if count > 1 else None,
        headers=headers if kind == "safetensors" else {},
    )
