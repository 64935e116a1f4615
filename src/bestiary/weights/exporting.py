"""Our weights back to published shards: an import gives back what it read, a trained run fills in its own values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from bestiary.training.checkpoints import CheckpointError, newest, read
from bestiary.variants.sphinx.consolidated import (
    Layout,
    Windowed,
    check_cut,
    file_name,
    save_shard,
    shard_of,
    window_bytes,
)
from bestiary.weights.families import EMBEDDING, Family, family_of
from bestiary.weights.folder import DTYPES, EXTRA, MODEL, PUBLISHED, Published, new_folder
from bestiary.weights.importing import read_object


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did. cast: tensors whose dtype was changed to the published one; filled: taken from `like`."""

    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    cast: int
    filled: int


class OurTensors:
    """Lazily read tensors of weights of ours: a run directory, a checkpoint folder or a safetensors file."""

    def __init__(self, path: Path) -> None:
        tied: dict[str, str] = {}
        if path.is_file():
            file = path
        elif not path.is_dir():
            raise ValueError(f"{path} does not exist; give an imported folder, a run directory or a checkpoint")
        else:
            root = path / "checkpoints"
            checkpoint = newest(root) if root.is_dir() else read(path)
            if checkpoint is None:
                raise CheckpointError(f"{path} has no complete checkpoint; let that run reach one, or name another")
            file, tied = checkpoint.path / MODEL, checkpoint.state.tied
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                tied = tied or json.loads((tensors.metadata() or {}).get("tied", "{}"))
                self.shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
        self._stored = {name: name for name in names} | tied
        self.shapes |= {name: self.shapes[stored] for name, stored in tied.items()}
        self._tensors = Windowed(lambda: _Opened(file), window=window_bytes(file.stat().st_size))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._stored[name]]


class _Opened(Mapping[str, torch.Tensor]):
    """A mapped safetensors file as a mapping."""

    def __init__(self, file: Path) -> None:
        self._file: Any = safe_open(file, framework="pt")

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def export_weights(
    path: Path,
    out: Path,
    *,
    layout: Literal["consolidated", "meta"] | None = None,
    num_shards: int | None = None,
    like: Path | None = None,
) -> Exported:
    """Write `out`, a published folder. like: the import whose names, order, dtypes and side files it takes.

    None keeps what the import recorded; a trained run needs `like`, and takes from there what it left out (frozen
    encoders kept elsewhere).
    """
    origin = like or path
    if not (origin / PUBLISHED).is_file():
        raise ValueError(f"{origin} has no {PUBLISHED}; name the imported folder these weights began as with --like")
    published = Published.read(origin / PUBLISHED)
    family = family_of(published.tensors, published.llama_type)
    target = layout or _layout(published.layout)
    if target == "meta" and published.llama_type != "llama":
        raise ValueError(f"Meta's layout holds LLaMA alone, not {family.name}; use --layout consolidated")
    total = published.num_shards if num_shards is None else num_shards
    source = PublishedView(OurTensors(path), OurTensors(like) if like else None, published, family, origin)
    check_cut(source.shapes, total)
    files = tuple(file_name(target, rank, total) for rank in range(total))
    num_bytes = 0
    with new_folder(out) as folder:
        for rank, name in enumerate(files):
            tensors = {theirs: shard_of(theirs, source[theirs], rank, total) for theirs in published.tensors}
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            save_shard(tensors, folder / name, layout=target, wrapped=published.wrapped or target != published.layout)
            del tensors
        _side_files(origin, folder, published, target, source.shapes)
    return Exported(files, len(published.tensors), num_bytes, len(source.cast), len(source.filled))


class PublishedView:
    """Published tensors, whole, made of ours (`own`, and `like` where that lacks some).

    shapes: by published name. cast: names whose dtype was changed; filled: our names taken from `like`.
    """

    def __init__(
        self, own: OurTensors, like: OurTensors | None, published: Published, family: Family, origin: Path
    ) -> None:
        self._own, self._like, self._published, self._family = own, like, published, family
        self._extra = _extra_file(origin, published)
        self.cast: set[str] = set()
        self.filled: set[str] = set()
        shapes = _joined(own, like, origin)
        self._parts = _published_names(family, shapes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for ours in self._parts.values():
            empty = {name: torch.empty(shapes[name], device="meta") for name in ours}
            whole = family.converter.to_reference(empty, head_dim=published.head_dim)
            self.shapes |= {name: tuple(value.shape) for name, value in whole.items()}
        self.shapes |= self._extra.shapes if self._extra is not None else {}
        lost = [name for name in published.tensors if name not in self.shapes]
        more = [name for name in self._parts if name not in published.tensors]
        if lost or more:
            counts = f"{len(lost)} of its tensors are lacking and {len(more)} are too many"
            raise ValueError(
                f"the weights are not those {origin / PUBLISHED} tells of: {counts}, first {(lost or more)[0]}; is it "
                "the import this model began as?"
            )

    def __getitem__(self, theirs: str) -> torch.Tensor:
        if theirs in self._published.extra:
            assert self._extra is not None
            return self._extra[theirs]
        parts = {name: self._part(name) for name in self._parts[theirs]}
        value = self._family.converter.to_reference(parts, head_dim=self._published.head_dim)[theirs]
        dtype = DTYPES[self._published.tensors[theirs]]
        if value.dtype != dtype:
            self.cast.add(theirs)
        return value.to(dtype)

    def _part(self, name: str) -> torch.Tensor:
        if name in self._own.shapes or self._like is None:
            return self._own[name]
        self.filled.add(name)
        return self._like[name]


def _joined(own: OurTensors, like: OurTensors | None, origin: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of both by our names; where both have a tensor they must agree."""
    if like is None:
        return own.shapes
    for name in own.shapes.keys() & like.shapes.keys():
        if own.shapes[name] != like.shapes[name]:
            raise ValueError(
                f"{name} is {own.shapes[name]} in the weights but {like.shapes[name]} in {origin}; is it the import "
                "this model began as?"
            )
    return like.shapes | own.shapes


def _published_names(family: Family, ours: Iterable[str]) -> dict[str, list[str]]:
    """Published name -> our names it is made of, in the order of its rows."""
    found: dict[str, dict[int, str]] = {}
    for name in ours:
        places = (
            (rule, part, match)
            for rule in family.converter.rules
            for part, pattern in enumerate(rule.our_patterns)
            if (match := pattern.fullmatch(name))
        )
        rule, part, match = next(places, (None, 0, None))
        if rule is None or match is None:
            raise ValueError(f"{name} is no tensor of {family.name}; are these weights of another model?")
        found.setdefault(rule.theirs.format(**match.groupdict()), {})[part] = name
    return {theirs: [parts[part] for part in sorted(parts)] for theirs, parts in found.items()}


def _extra_file(origin: Path, published: Published) -> OurTensors | None:
    if not published.extra:
        return None
    if not (origin / EXTRA).is_file():
        raise ValueError(f"{origin / EXTRA} is missing; import the weights again")
    return OurTensors(origin / EXTRA)


def _layout(name: str) -> Literal["consolidated", "meta"]:
    if name not in ("consolidated", "meta"):
        raise ValueError(f"{PUBLISHED} names the layout {name!r}, which is none of consolidated, meta")
    return "meta" if name == "meta" else "consolidated"


def _side_files(
    origin: Path, folder: Path, published: Published, target: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """The files beside the weights: byte for byte, and in the words of the other layout where that is wanted."""
    for name in published.side_files:
        shutil.copyfile(origin / name, folder / name)
    wanted, other = ("params.json", "config.json") if target == "meta" else ("config.json", "params.json")
    if target != published.layout and not (folder / wanted).exists() and (folder / other).is_file():
        config = read_object(folder / other) | {"vocab_size": shapes[EMBEDDING][0]}
        (folder / wanted).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / other).unlink()
    if target == "consolidated" and not (folder / "meta.json").exists() and published.layout == "meta":
        (folder / "meta.json").write_text(json.dumps({"llama_type": published.llama_type}, indent=2), encoding="utf-8")
