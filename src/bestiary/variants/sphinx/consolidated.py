"""Published folders of tensor-parallel shards, read and written one parameter at a time.

Three layouts, each one torch pickle for every rank. Column-parallel weights are cut along dimension 0, row-parallel
ones and the embedding along 1 (`shard_dim`), everything else is in every shard:

    consolidated  consolidated.RR-of-NN.model.pth       {"model": {"llma.<name>": shard}}
    delta         consolidated.RR-of-NN.model-diff.pth  the same, to be added to a base
    meta          consolidated.RR.pth                   {"<name>": shard}, names without the prefix `llma.`

Pickles are read without running code and memory-mapped (`variants.pickles`).
Source: LLaMA2-Accessory commit 3777c43, accessory/util/tensor_parallel.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from bestiary.variants.pickles import Windowed, load_pickle, same_bits, window_bytes

log = logging.getLogger(__name__)

Format = Literal["consolidated", "delta", "meta"]

FILE_NAME = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")
SHARD_DIM = re.compile(
    r"llma\.(?:layers\.\d+\.(?:attention\.(?:(?P<q>wq|wk|wv)|wo)|feed_forward\.(?:(?P<f>w1|w3)|w2))"
    r"|(?P<o>output)|tok_embeddings)\.weight"
)
"""Names that are cut; a group took part where the cut is along dimension 0, none where it is along 1."""


def shard_dim(name: str) -> int | None:
    """The dimension along which shards cut a tensor; None where every shard holds all of it."""
    match = SHARD_DIM.fullmatch(name)
    if match is None:
        return None
    return 0 if any(match.groupdict().values()) else 1


FILE_NAMES: dict[Format, re.Pattern[str]] = {
    "consolidated": FILE_NAME,
    "delta": re.compile(r"consolidated\.(\d+)-of-(\d+)\.model-diff\.pth"),
    "meta": re.compile(r"consolidated\.(\d+)\.pth"),
}
PREFIX = "llma."


class ShardFolder:
    """The tensors of one published folder: what there is, and each of them whole on demand.

    names: with the prefix `llma.`, in the order of the file. wrapped: whether a file holds them below "model".
    unequal: names of tensors that every shard should hold alike and does not (filled by `whole`; shard 0 wins).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        layout, self.files = find_shards(path)
        self.layout: str = layout
        states = [load_pickle(file) for file in self.files]
        self.wrapped = _is_wrapped(states[0])
        shards = [self._named(state, file) for state, file in zip(states, self.files, strict=True)]
        self.names = list(shards[0])
        self.dtypes = {name: tensor.dtype for name, tensor in shards[0].items()}
        self.shapes = {name: self._whole_shape(name, shards) for name in self.names}
        self._check_same_names(shards)
        self.file_bytes = [file.stat().st_size for file in self.files]
        self.unequal: list[str] = []
        window = window_bytes(max(self.file_bytes)) // len(self.files)
        self._shards = [
            Windowed(self._reader(file), window=window, tensors=shard)
            for file, shard in zip(self.files, shards, strict=True)
        ]

    @property
    def is_delta(self) -> bool:
        """Whether its tensors are to be added to a base."""
        return self.layout == "delta"

    @property
    def record(self) -> str:
        """Nothing beyond what `Published` says anyway."""
        return ""

    def whole(self, name: str) -> torch.Tensor:
        """One tensor put together from all shards; let go of it before asking for the next."""
        dim = shard_dim(name)
        if dim is None or len(self._shards) == 1:
            first = self._shards[0][name]
            if not all(same_bits(first, shard[name]) for shard in self._shards[1:]):
                self.unequal.append(name)
            return first
        whole = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        for target, shard in zip(whole.chunk(len(self._shards), dim), self._shards, strict=True):
            target.copy_(shard[name])
            shard.trim()
        return whole

    def _reader(self, file: Path) -> Callable[[], Mapping[str, torch.Tensor]]:
        return lambda: self._named(load_pickle(file), file)

    def _named(self, state: Mapping[str, object], file: Path) -> dict[str, torch.Tensor]:
        inner = state["model"] if _is_wrapped(state) else state
        if not isinstance(inner, dict) or not inner or not all(isinstance(v, torch.Tensor) for v in inner.values()):
            raise ValueError(f"{file} holds no tensors by name; is it a published checkpoint?")
        prefix = PREFIX if self.layout == "meta" else ""
        return {prefix + name: tensor for name, tensor in inner.items()}

    def _check_same_names(self, shards: Sequence[Mapping[str, torch.Tensor]]) -> None:
        for file, shard in zip(self.files[1:], shards[1:], strict=True):
            if odd := set(self.names) ^ set(shard):
                raise ValueError(
                    f"{file.name} and {self.files[0].name} of {self.path} differ in names, first {min(odd)}; they are "
                    "shards of two models: fetch them again from one place"
                )
            for name in self.names:
                if shard[name].dtype != self.dtypes[name]:
                    raise ValueError(
                        f"{self.path}: {name} is {shard[name].dtype} in {file.name} but {self.dtypes[name]} in "
                        f"{self.files[0].name}; they are shards of two models: fetch them again from one place"
                    )

    def _whole_shape(self, name: str, shards: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, ...]:
        shapes = {tuple(shard[name].shape) for shard in shards if name in shard}
        dim, shape = shard_dim(name), tuple(shards[0][name].shape)
        if len(shapes) > 1:
            raise ValueError(
                f"{self.path}: {name} is {' and '.join(map(str, sorted(shapes)))} in its {len(shards)} shards, whose "
                "sizes must be equal; they are of two models or were cut for another number of shards"
            )
        if dim is None:
            return shape
        if len(shape) != 2:
            raise ValueError(f"{self.path}: {name} has {len(shape)} dimensions, not 2; is it the tensor it is named?")
        return tuple(size * len(shards) if at == dim else size for at, size in enumerate(shape))


def find_shards(path: Path) -> tuple[Format, list[Path]]:
    """Format and files of a folder, in the order of ranks; anything but one whole set is one line of error."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a published checkpoint")
    found: dict[Format, dict[Path, re.Match[str]]] = {}
    for file in sorted(path.glob("*.pth")):
        for layout, pattern in FILE_NAMES.items():
            if match := pattern.fullmatch(file.name):
                found.setdefault(layout, {})[file] = match
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing"
        raise ValueError(
            f"{path}: unknown layout, no consolidated.RR-of-NN.model.pth there ({there}); known beside it: "
            "consolidated.RR-of-NN.model-diff.pth, Meta's consolidated.RR.pth"
        )
    if len(found) > 1:
        examples = " and ".join(next(iter(files)).name for files in found.values())
        raise ValueError(f"{path}: shards of mixed formats ({examples}); keep one set in the folder")
    layout, files = next(iter(found.items()))
    _check_ranks(path, layout, list(files.values()))
    return layout, sorted(files, key=lambda file: int(files[file][1]))


def _check_ranks(path: Path, layout: Format, names: Sequence[re.Match[str]]) -> None:
    totals = {int(name[2]) for name in names} if layout != "meta" else {max(int(name[1]) for name in names) + 1}
    if len(totals) > 1:
        raise ValueError(f"{path}: shards of several sets ({names[0][0]}, {names[-1][0]}); keep one set in the folder")
    total = totals.pop()
    ranks = [int(name[1]) for name in names]
    if lost := sorted(set(range(total)) - set(ranks)):
        raise ValueError(
            f"{path}: missing {file_name(layout, lost[0], total)}, {len(lost)} of {total} shards, so they are not all "
            "of one set; fetch it"
        )
    if len(ranks) != total:
        raise ValueError(f"{path}: {len(ranks)} files for {total} shards; keep one set in the folder")


def file_name(layout: Format, rank: int, total: int) -> str:
    """Name of one shard's file."""
    if layout == "meta":
        return f"consolidated.{rank:02d}.pth"
    return f"consolidated.{rank:02d}-of-{total:02d}.model{'-diff' if layout == 'delta' else ''}.pth"


def check_cut(shapes: Mapping[str, Sequence[int]], num_shards: int) -> None:
    """Raise unless every cut tensor can be dealt evenly to the shards."""
    if num_shards < 1:
        raise ValueError(f"--shards {num_shards}: a checkpoint has at least one")
    for name, shape in shapes.items():
        dim = shard_dim(name)
        if dim is not None and shape[dim] % num_shards:
            raise ValueError(
                f"{name} {tuple(shape)} cannot be cut into {num_shards} equal shards along dimension {dim}; "
                "choose a number that divides it"
            )


def shard_of(name: str, whole: torch.Tensor, rank: int, total: int) -> torch.Tensor:
    """What rank's file holds of a whole tensor, as memory of its own."""
    dim = shard_dim(name)
    part = whole if dim is None else whole.chunk(total, dim)[rank]
    return part.clone(memory_format=torch.contiguous_format)


def save_shard(tensors: Mapping[str, torch.Tensor], path: Path, *, layout: Format, wrapped: bool = True) -> None:
    """Write one rank's file; names with the prefix `llma.`, which Meta's layout does without."""
    state = {name.removeprefix(PREFIX) if layout == "meta" else name: tensor for name, tensor in tensors.items()}
    torch.save({"model": state} if wrapped and layout != "meta" else state, path)


def _is_wrapped(state: Mapping[str, object]) -> bool:
    return isinstance(state.get("model"), dict)


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a published folder, whole, by their published names."""
    folder = ShardFolder(Path(path))
    if folder.is_delta:
        raise ValueError(f"{path} holds differences to a base; import it together with the base's folder")
    tensors = {name: folder.whole(name) for name in folder.names}
    if folder.unequal:
        log.warning("%s: %d tensors are not the same in every shard; shard 0's were taken", path, len(folder.unequal))
    return tensors
