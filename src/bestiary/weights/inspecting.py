"""What lies at a path: layout, variant, size, dtype, and how much of it a model of ours takes; no tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestiary.variants.sphinx.consolidated import ShardFolder
from bestiary.variants.sphinx.published import shard_dim
from bestiary.weights.exporting import OurTensors, PublishedView
from bestiary.weights.families import EMBEDDING, Family, Fit, Shapes, compare, decoder_sizes, family_of
from bestiary.weights.folder import PUBLISHED, Published
from bestiary.weights.importing import SIDE_FILES, check_tokenizer, model_config, read_object


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found. fit: None where there are no shapes to compare. lines: (label, text) for people."""

    lines: tuple[tuple[str, str], ...]
    fit: Fit | None


def inspect(path: Path) -> Inspected:
    """Look at a published folder, a folder of ours, or a manifest (JSON of names and shapes); ValueError else."""
    if path.is_file() and path.suffix == ".json":
        return _manifest(path)
    if (path / PUBLISHED).is_file():
        return _ours(path)
    return _shards(path)


def _shards(path: Path) -> Inspected:
    folder = ShardFolder(path)
    side = {name: path / name for name in SIDE_FILES if (path / name).is_file()}
    total = f"{len(folder.files)} shard{'s' if len(folder.files) > 1 else ''}"
    layout = f"{folder.layout}, {total}, {sum(folder.file_bytes) / 1e6:,.1f} MB"
    family = family_of(folder.shapes, read_object(side.get("meta.json")).get("llama_type"))
    dtypes = Counter(str(dtype).removeprefix("torch.") for dtype in folder.dtypes.values())
    more = [("dtype", _shares(dtypes))]
    if folder.layout == "delta":
        return _described(layout, family, folder.shapes, {}, more, _by_rules(family, folder.shapes))
    if check_tokenizer(side.get("tokenizer.model"), folder.shapes):
        more.append(("tokenizer", "tokenizer.model, as many pieces as the embedding has rows"))
    config = model_config(side)
    return _described(layout, family, folder.shapes, config, more, compare(family, folder.shapes, config))


def _ours(path: Path) -> Inspected:
    published = Published.read(path / PUBLISHED)
    family = family_of(published.tensors, published.llama_type)
    shapes = PublishedView(OurTensors(path), None, published, family, path).shapes
    config = model_config({name: path / name for name in published.side_files})
    more = [("dtype", _shares(Counter(published.tensors.values())))]
    layout = f"ours, imported from {published.layout}, {published.num_shards} shards"
    return _described(layout, family, shapes, config, more, compare(family, shapes, config))


def _manifest(path: Path) -> Inspected:
    told = read_object(path)
    params = told.get("params", told)
    if isinstance(params, dict) and params and all(isinstance(dim, int) for dim in params.values()):
        return _cuts(params)
    if not isinstance(params, dict) or not params or not all(_is_shape(shape) for shape in params.values()):
        raise ValueError(f"{path}: unknown layout; a manifest is JSON of published names and their shapes")
    family = family_of(params, told.get("llama_type"))
    config = told.get("model_args")
    config = config if isinstance(config, dict) else {}
    return _described("manifest", family, params, config, [("dtype", "not said")], compare(family, params, config))


def _cuts(dims: Mapping[str, int]) -> Inspected:
    agreed = sum(shard_dim(name) == dim for name, dim in dims.items())
    return Inspected(
        (
            ("layout", "manifest of the dimensions that shards cut"),
            ("size", f"{len(dims):,} cut tensors"),
            ("mapped", f"{_percent(agreed, len(dims))} are cut where ours are"),
        ),
        None,
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _described(
    layout: str, family: Family, shapes: Shapes, config: Mapping[str, Any], more: list[tuple[str, str]], found: Fit
) -> Inspected:
    size = f"{len(shapes):,} tensors, {sum(math.prod(shape) for shape in shapes.values()):,} parameters"
    lines = [("layout", layout), ("variant", f"{family.name} (llama_type {family.llama_type})"), ("size", size)]
    if EMBEDDING in shapes:
        sizes = decoder_sizes(shapes, config)
        heads = f", {sizes['n_heads']} heads" if config.get("n_heads") else ""
        words = f"{sizes['n_layers']} layers of {sizes['dim']:,}{heads}, vocabulary {sizes['vocab_size']:,}"
        lines.append(("decoder", words))
    lines += [*more, ("mapped", f"{_percent(found.num_mapped, found.num_names)} of {found.num_names:,} names: {found}")]
    firsts = {"missing": found.missing, "unexpected": found.unexpected, "shape": found.wrong}
    lines += [(label, f"first {names[0]}") for label, names in firsts.items() if names]
    return Inspected(tuple(lines), found)


def _by_rules(family: Family, shapes: Shapes) -> Fit:
    """A delta need not hold everything, so only names can be checked."""
    rules = family.converter.rules
    rule_of = {name: next((r for r in rules if r.their_pattern.fullmatch(name)), None) for name in shapes}
    return Fit(
        matched=tuple(name for name, rule in rule_of.items() if rule and not rule.converts),
        converted=tuple(name for name, rule in rule_of.items() if rule and rule.converts),
        unexpected=tuple(name for name, rule in rule_of.items() if rule is None),
    )


def _shares(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{dtype} ({number:,} tensors)" for dtype, number in counts.most_common())


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100."""
    share = math.floor(10000 * part / whole) / 100 if whole else 0.0
    return f"{share:g} %"
