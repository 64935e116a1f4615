"""What lies at a path: layout, variant, size, dtype, and how much of it a model of ours takes; no tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bestiary.variants.conversion import Fit
from bestiary.variants.hf_folder import HfFolder, read_object
from bestiary.variants.layouts import Layout, Model, Shapes
from bestiary.weights.checking import by_rules, check_tokenizer, compare
from bestiary.weights.exporting import PublishedView, published_of
from bestiary.weights.folder import PUBLISHED
from bestiary.weights.layouts import LAYOUTS, layout_of
from bestiary.weights.ours import OurTensors
from bestiary.weights.parts import is_part, part_of


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found. fit: None where there are no shapes to compare. lines: (label, text) for people.

    lost: names that have no place in the model, or places that no name fills; tables every model computes aside.
    """

    lines: tuple[tuple[str, str], ...]
    fit: Fit | None
    lost: int = 0


def inspect(path: Path) -> Inspected:
    """Look at a published folder, a folder of ours, or a manifest (JSON of names and shapes); ValueError else."""
    if path.is_file() and path.suffix == ".json":
        return _manifest(path)
    if (path / PUBLISHED).is_file():
        return _ours(path)
    if is_part(path):
        return _part(path)
    return _published(path, layout_of(path) or LAYOUTS[0])


def _published(path: Path, layout: Layout) -> Inspected:
    source = layout.open(path)
    side = layout.side_files(path)
    where = f"{source.layout}, {_shards(len(source.file_bytes))}, {sum(source.file_bytes) / 1e6:,.1f} MB"
    model = layout.model_of(source.shapes, side)
    more = [("dtype", _dtypes(source.dtypes))]
    if source.is_delta:
        return _described(where, model, source.shapes, {}, more, by_rules(model, source.shapes))
    rows = source.shapes.get(model.embedding, (0,))[0]
    tokenizer = layout.tokenizer(path, side)
    if check_tokenizer(tokenizer, rows, allows_spare=model.allows_spare_ids):
        assert tokenizer is not None
        more.append(("tokenizer", f"{'tokenizer.json' if tokenizer == path else tokenizer.name}, {rows:,} pieces"))
    config = layout.config(side)
    return _described(where, model, source.shapes, config, more, compare(model, source.shapes, config))


def _part(path: Path) -> Inspected:
    folder = HfFolder(path)
    part = part_of(folder)
    found = part.fit(folder.shapes, folder.config)
    where = f"{folder.format} of public weights, {_shards(len(folder.files))}, {sum(folder.file_bytes) / 1e6:,.1f} MB"
    lines = [("layout", where), ("part", f"{part.name}, for {part.target}"), ("size", _size(folder.shapes))]
    lines += [("dtype", _dtypes(folder.dtypes)), ("mapped", _mapped(found)), *_firsts(found)]
    return Inspected(tuple(lines), found, found.num_names - found.num_mapped)


def _ours(path: Path) -> Inspected:
    published, layout, model = published_of(path)
    shapes = PublishedView(OurTensors(path), None, published, model, path).shapes
    config = layout.config({name: path / name for name in published.side_files})
    more = [("dtype", _shares(Counter(published.tensors.values())))]
    where = f"ours, imported from {published.layout}, {published.num_shards} shards"
    return _described(where, model, shapes, config, more, compare(model, shapes, config))


def _manifest(path: Path) -> Inspected:
    told = read_object(path)
    params = told.get("params", told)
    if isinstance(params, dict) and params and all(isinstance(dim, int) for dim in params.values()):
        return _cuts(params)
    if not isinstance(params, dict) or not params or not all(_is_shape(shape) for shape in params.values()):
        raise ValueError(f"{path}: unknown layout; a manifest is JSON of published names and their shapes")
    layout = next((layout for layout in LAYOUTS if layout.knows(params)), LAYOUTS[0])
    config = layout.config_of_list(told)
    key = told.get("llama_type")
    model = layout.model_called(key) if key is not None else layout.model_of(params, {})
    return _described("manifest", model, params, config, [("dtype", "not said")], compare(model, params, config))


def _cuts(dims: Mapping[str, int]) -> Inspected:
    agreed = sum(LAYOUTS[0].cut_dim(name) == dim for name, dim in dims.items())
    return Inspected(
        (
            ("layout", "manifest of the dimensions that shards cut"),
            ("size", f"{len(dims):,} cut tensors"),
            ("mapped", f"{_percent(agreed, len(dims))} are cut where ours are"),
        ),
        None,
        len(dims) - agreed,
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _described(
    layout: str, model: Model, shapes: Shapes, config: Mapping[str, Any], more: list[tuple[str, str]], found: Fit
) -> Inspected:
    lines = [("layout", layout), ("variant", f"{model.name} ({model.key_word} {model.key})"), ("size", _size(shapes))]
    lines += [("begins", model.begins)] if model.begins else []
    lines += [*model.describe(shapes, config), *more, ("mapped", _mapped(found)), *_firsts(found)]
    derived = sum(model.derived.fullmatch(name) is not None for name in found.unexpected)
    return Inspected(tuple(lines), found, found.num_names - found.num_mapped - derived)


def _size(shapes: Shapes) -> str:
    return f"{len(shapes):,} tensors, {sum(math.prod(shape) for shape in shapes.values()):,} parameters"


def _mapped(found: Fit) -> str:
    return f"{_percent(found.num_mapped, found.num_names)} of {found.num_names:,} names: {found}"


def _firsts(found: Fit) -> list[tuple[str, str]]:
    firsts = {"missing": found.missing, "unexpected": found.unexpected, "dropped": found.dropped, "shape": found.wrong}
    return [(label, f"first {names[0]}") for label, names in firsts.items() if names]


def _dtypes(dtypes: Mapping[str, torch.dtype]) -> str:
    return _shares(Counter(str(dtype).removeprefix("torch.") for dtype in dtypes.values()))


def _shards(number: int) -> str:
    return f"{number} shard{'s' if number > 1 else ''}"


def _shares(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{dtype} ({number:,} tensors)" for dtype, number in counts.most_common())


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100."""
    share = math.floor(10000 * part / whole) / 100 if whole else 0.0
    return f"{share:g} %"
