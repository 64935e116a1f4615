"""Published checkpoint folders of the SPHINX family: tensor-parallel shards put together again.

A folder holds consolidated.00-of-02.model.pth, consolidated.01-of-02.model.pth and so on, each `{"model": {name:
shard}}`. Column-parallel weights are cut along dimension 0, row-parallel ones and the embedding along 1, everything
else is in every shard. Source: LLaMA2-Accessory commit 3777c43, accessory/util/tensor_parallel.py.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch

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


def read_published(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a published folder, whole, by their published names.

    Pickles are read with `weights_only=True`, which runs no code, and memory-mapped.
    """
    folder = Path(folder)
    shards = [_read(path) for path in _shard_files(folder)]
    names = set(shards[0])
    for number, shard in enumerate(shards[1:], start=1):
        if odd := names ^ set(shard):
            raise ValueError(
                f"{folder}: shards 0 and {number} differ in names, first {min(odd)}; they are of two models"
            )
    return {name: _merged([shard[name] for shard in shards], shard_dim(name)) for name in shards[0]}


def _merged(parts: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def _shard_files(folder: Path) -> list[Path]:
    found = {path: match for path in sorted(folder.glob("*.pth")) if (match := FILE_NAME.fullmatch(path.name))}
    if not found:
        raise ValueError(
            f"{folder}: no consolidated.RR-of-NN.model.pth there; give the folder of a published checkpoint"
        )
    totals = {int(match[2]) for match in found.values()}
    ranks = [int(match[1]) for match in found.values()]
    if len(totals) > 1 or ranks != list(range(max(totals))):
        raise ValueError(f"{folder}: shards {[path.name for path in found]} are not all of one set; fetch the others")
    return list(found)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a whole checkpoint of tensors ({reason}); fetch it again") from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no 'model' of tensors; is it a published checkpoint?")
    return state
