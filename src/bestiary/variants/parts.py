"""What `bestiary weights` must know about public weights of one part of a model (an encoder, the decoder).

A variant lists `Part`s; recognising a folder, comparing it with the part and converting its tensors is done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bestiary.variants.conversion import Converter, Fit

Shapes = Mapping[str, Sequence[int]]
ANY_HEADS = 1
"""Heads change no shape, so a comparison of shapes needs no right number."""
MAX_DEPTH = 1000
"""Layers of any part; a number beyond it is a damaged name, not a model to be built."""
ANY_DIM = 2
"""Head dimension where no rule reorders rotary rows."""


@dataclass(frozen=True)
class Part:
    """One layout of one part's public weights.

    name: what people call it. target: the prefix of our names. sign: (prefix of the published names, a name that must
    be there behind it). converter: published names without that prefix, and ours. build: our module of the sizes
    that tensors (by our names) and config.json tell. types: model_type of config.json, none for files without one.
    dropped: pattern of published names that have no place in the part. settings: what config.json says that no shape
    shows, as overrides of the command line. embedding: the tensor with as many rows as the tokenizer has pieces.
    keep: pattern of our names to be expected, for a part that fills only some of the module's. model: whose part it
    is, where others have it under other names. allows_spare_ids: the embedding may have more rows than the tokenizer
    pieces.
    """

    name: str
    target: str
    sign: tuple[str, str]
    converter: Converter
    build: Callable[[Shapes, Mapping[str, Any]], nn.Module]
    types: tuple[str, ...] = ()
    dropped: str = r"(?!)"
    settings: Callable[[Mapping[str, Any]], list[str]] | None = None
    embedding: str = ""
    keep: str = ".*"
    model: str = "sphinx"
    allows_spare_ids: bool = False

    def recognises(self, names: Mapping[str, object], config: Mapping[str, Any]) -> bool:
        """Whether the tensors' names and config.json's model_type are of this layout."""
        told = config.get("model_type")
        return "".join(self.sign) in names and (told in self.types if told else not self.types)

    def to_ours(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """One published tensor under our names; none for a name that has no place here."""
        inner = self._inner(name)
        if inner is None or re.fullmatch(self.dropped, name):
            return {}
        return self.converter.to_ours({inner: tensor}, head_dim=ANY_DIM)

    def fit(self, shapes: Shapes, config: Mapping[str, Any]) -> Fit:
        """Published names and shapes against the part at the sizes they tell."""
        ours: dict[str, tuple[int, ...]] = {}
        places: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            for our_name, value in self.to_ours(name, torch.empty(tuple(shape), device="meta")).items():
                ours[our_name] = tuple(value.shape)
                places.setdefault(name, []).append(our_name)
        with torch.device("meta"):
            module = self.build(ours, config)
        state = {f"{self.target}.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
        expected = {name: shape for name, shape in state.items() if re.fullmatch(self.keep, name)}
        return self._compare(shapes, ours, places, expected)

    def _compare(
        self, shapes: Shapes, ours: Shapes, places: Mapping[str, list[str]], expected: Mapping[str, tuple[int, ...]]
    ) -> Fit:
        known = {name: parts for name, parts in places.items() if all(part in expected for part in parts)}
        wrong = [name for name, parts in known.items() if any(ours[part] != expected[part] for part in parts)]
        good = {name: parts for name, parts in known.items() if name not in set(wrong)}
        dropped = tuple(name for name in shapes if re.fullmatch(self.dropped, name))
        lost = {self._published(name): None for name in expected if name not in ours}
        odd = tuple(name for name in shapes if name not in known and name not in set(dropped))
        return Fit(
            matched=tuple(name for name, parts in good.items() if len(parts) == 1),
            converted=tuple(name for name, parts in good.items() if len(parts) > 1),
            missing=tuple(lost),
            unexpected=odd,
            wrong=tuple(
                f"{name}: {tuple(shapes[name])}, as {places[name][0]} {expected[places[name][0]]}" for name in wrong
            ),
            dropped=dropped,
        )

    def _published(self, ours: str) -> str:
        """The published name that one of ours comes from."""
        rule, _, theirs = self.converter.place_of(ours)
        assert rule is not None
        return self.sign[0] + theirs

    def _inner(self, name: str) -> str | None:
        prefix = self.sign[0]
        inner = name.removeprefix(prefix)
        fits = name.startswith(prefix) and any(rule.their_pattern.fullmatch(inner) for rule in self.converter.rules)
        return inner if fits else None


def size(shapes: Shapes, name: str, dims: int) -> Sequence[int]:
    """The shape of a tensor that tells a size of the model; raises when it is missing or of other dimensions."""
    if name not in shapes:
        raise ValueError(f"{name}, which tells a size of the model, has no published tensor; is the file whole?")
    if len(shapes[name]) != dims:
        raise ValueError(f"{name} would be {tuple(shapes[name])}, which has not {dims} dimensions; is it that tensor?")
    return shapes[name]


def depth(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix."""
    number = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = 1 + max((int(match[1]) for name in shapes if (match := number.match(name))), default=-1)
    if not 0 < found <= MAX_DEPTH:
        raise ValueError(f"{prefix} has {found} layers, which is not from 1 to {MAX_DEPTH}; is the file whole?")
    return found
