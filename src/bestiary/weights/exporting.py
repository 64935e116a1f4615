"""Our weights back to published files: an import gives back what it read, a trained run fills in its own values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bestiary.compose import load_run
from bestiary.named_model import at_project
from bestiary.saved_run import build_pieces
from bestiary.saved_tuning import BASE
from bestiary.variants.layouts import FirstExport, Layout, Model, Published, Writing
from bestiary.variants.tensor_file import DTYPES
from bestiary.weights.difference import Difference
from bestiary.weights.folder import EXTRA, PUBLISHED, new_folder
from bestiary.weights.layouts import LAYOUTS, layout_called
from bestiary.weights.ours import OurTensors

CONFIG = "config.resolved.yaml"
"""What a run directory was asked to be."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did. cast: tensors whose dtype was changed to the published one; filled: taken from `like`.

    difference: of an export of a difference to a base, what it holds and what it costs.
    """

    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    cast: int
    filled: int
    difference: Difference | None = None


def export_weights(
    path: Path,
    out: Path,
    *,
    layout: str | None = None,
    num_shards: int | None = None,
    like: Path | None = None,
    delta_from: Path | None = None,
    delta_dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write `out`, a published folder. like: the import whose names, order, dtypes and side files it takes.

    None keeps what the import recorded; a trained run needs `like`, and takes from there what it left out (frozen
    encoders kept elsewhere), unless its layout can be made of the run's configuration alone (Ovis). delta_from: write
    the difference to this import only (a `*.model-diff.pth` folder), in `delta_dtype`; it serves as `like`, too.
    """
    if delta_from is not None and layout not in (None, "consolidated", "delta"):
        raise ValueError(f"--layout {layout} has no files of differences; leave it out, or use consolidated")
    if delta_from is None and layout == "delta":
        raise ValueError("a difference needs the base it is to be added to; name its imported folder with --delta-from")
    own = _whole_tensors(path)
    like = like or delta_from
    origin = like or path
    if like is None and not (path / PUBLISHED).is_file() and (made := first_export(path, step=own.step)) is not None:
        return _export_first(own, out, made, layout=layout, num_shards=num_shards)
    published, owner, model = published_of(origin)
    source = PublishedView(own, OurTensors(like) if like else None, published, model, origin)
    side_files = {name: origin / name for name in published.side_files}
    difference: Difference | None = None
    shapes = {name: source.shapes[name] for name in source.names}
    whole = source.__getitem__
    target = layout or published.layout
    if target not in owner.formats:
        raise ValueError(f"--layout {target} is none of {', '.join(owner.formats)}, which these weights can have")
    if delta_from is not None:
        base = PublishedView(OurTensors(delta_from), None, published, model, delta_from)
        difference = Difference(whole, base.__getitem__, source.names, delta_dtype)
        whole, target, side_files = difference.__getitem__, "delta", {}
        shapes = {name: shapes[name] for name in difference.names}
    with new_folder(out) as folder:
        files, num_bytes = owner.write(
            folder, Writing(published, whole, shapes, side_files, layout=target, num_shards=num_shards)
        )
    return Exported(tuple(files), len(shapes), num_bytes, len(source.cast), len(source.filled), difference)


def first_export(path: Path, *, step: int) -> tuple[Layout, FirstExport] | None:
    """How the weights of a run are published that began as no import; None where its layout needs one."""
    folder = next((up for up in (path, *list(path.absolute().parents)[:2]) if (up / CONFIG).is_file()), None)
    if folder is None:
        return None
    run = load_run(folder)
    run.model.processor["tokenizer"] = str(at_project(run.model.processor["tokenizer"]))
    model = build_pieces(run, on_meta=True).model
    made = ((owner, owner.first_export(run, model, step=step)) for owner in LAYOUTS)
    return next(((owner, found) for owner, found in made if found is not None), None)


def _export_first(
    own: OurTensors, out: Path, made: tuple[Layout, FirstExport], *, layout: str | None, num_shards: int | None
) -> Exported:
    owner, first = made
    model = owner.model_called(first.key)
    target = layout or first.layout
    if target not in owner.formats:
        raise ValueError(f"--layout {target} is none of {', '.join(owner.formats)}, which these weights can have")
    if own.absent:
        raise ValueError(
            f"{own.path} leaves out {min(own.absent)}; name what holds it with --like, or merge them first"
        )
    dtypes = {ours: str(own.dtypes[ours]).removeprefix("torch.") for ours in own.shapes}
    parts = _published_names(model, own.stored)
    published = Published(target, 0, first.key, first.head_dim, {name: dtypes[at[0]] for name, at in parts.items()})
    view = PublishedView(own, None, published, model, own.path)
    with new_folder(out) as folder:
        side_files = dict(first.files)
        shapes = {name: view.shapes[name] for name in published.tensors}
        files, num_bytes = owner.write(
            folder, Writing(published, view.__getitem__, shapes, side_files, layout=target, num_shards=num_shards)
        )
        for name, text in first.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return Exported(tuple(files), len(shapes), num_bytes, 0, 0)


def _whole_tensors(path: Path) -> OurTensors:
    """The weights to be written; raises where they are what a tuned run trained, without their base."""
    own = OurTensors(path)
    if BASE in own.identity:
        raise ValueError(
            f"{path} holds what was trained without its base; make it whole with `bestiary weights merge {path} OUT` "
            "and export OUT"
        )
    return own


def published_of(origin: Path) -> tuple[Published, Layout, Model]:
    """What an imported folder says of its origin, whose layout that is, and the model it is of."""
    if not (origin / PUBLISHED).is_file():
        raise ValueError(f"{origin} has no {PUBLISHED}; name the imported folder these weights began as with --like")
    published = Published.read(origin / PUBLISHED)
    owner = layout_called(published.layout)
    return published, owner, owner.model_called(published.llama_type)


class PublishedView:
    """Published tensors, whole, made of ours (`own`, and `like` where that lacks some).

    shapes: by published name. names: what there is to write: the import's names in order, then those that the import
    declared absent and the weights have. cast: names whose dtype was changed; filled: our names taken from `like`.
    """

    def __init__(
        self, own: OurTensors, like: OurTensors | None, published: Published, model: Model, origin: Path
    ) -> None:
        self._own, self._like, self._published, self._model = own, like, published, model
        self._extra = _extra_file(origin, published)
        self.cast: set[str] = set()
        self.filled: set[str] = set()
        shapes = _joined(own, like, origin)
        self._parts = _published_names(model, shapes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for ours in self._parts.values():
            empty = {name: torch.empty(shapes[name], device="meta") for name in ours}
            whole = model.converter.to_reference(empty, head_dim=published.head_dim)
            self.shapes |= {name: tuple(value.shape) for name, value in whole.items()}
        self.shapes |= self._extra.shapes if self._extra is not None else {}
        lost = [name for name in published.tensors if name not in self.shapes]
        absent = like.absent if like is not None else own.absent
        tied = own.tied.keys() | (like.tied.keys() if like is not None else set())
        added = [n for n, ours in self._parts.items() if n not in published.tensors and not tied.issuperset(ours)]
        more = [name for name in added if not absent.issuperset(self._parts[name])]
        self.names = [*published.tensors, *added]
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
        value = self._model.converter.to_reference(parts, head_dim=self._published.head_dim)[theirs]
        told = self._published.tensors
        dtype = DTYPES[told.get(theirs, told[self._model.embedding])]  # parts that the import lacked go with the rest
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


def _published_names(model: Model, ours: Iterable[str]) -> dict[str, list[str]]:
    """Published name -> our names it is made of, in the order of its rows."""
    found: dict[str, dict[int, str]] = {}
    for name in ours:
        place = model.converter.find(name)
        if place is None:
            raise ValueError(f"{name} is no tensor of {model.name}; are these weights of another model?")
        _, part, theirs = place
        found.setdefault(theirs, {})[part] = name
    return {theirs: [parts[part] for part in sorted(parts)] for theirs, parts in found.items()}


def _extra_file(origin: Path, published: Published) -> OurTensors | None:
    if not published.extra:
        return None
    if not (origin / EXTRA).is_file():
        raise ValueError(f"{origin / EXTRA} is missing; import the weights again")
    return OurTensors(origin / EXTRA)
