"""Published checkpoints to ours and back: rules of names, strict both ways.

A variant lists `Rule`s; everything else is done here. A rule may rename, cut one stacked tensor into ours (query, key
and value; gate and up) or reorder the rows of a rotary projection. Because a rule works in both directions, a
published name maps to ours exactly as long as the same checkpoint can be written back.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from bestiary.language.decoder import Decoder
from bestiary.saved_weights import check_names

FIELDS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias", "rest": ".+"}
"""What a `{field}` of a rule's template stands for."""


@dataclass(frozen=True)
class Rule:
    """One published name (a template, see `FIELDS`) and ours; several of ours are stacked rows of theirs, in order.

    rotary: the rows are pairs of neighbours in the published tensor (Meta's layout) and halves in ours.
    """

    theirs: str
    ours: tuple[str, ...]
    rotary: bool = False

    @cached_property
    def their_pattern(self) -> re.Pattern[str]:
        """Matches a published name."""
        return _pattern(self.theirs)

    @cached_property
    def our_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Match our names, one for each part."""
        return tuple(_pattern(name) for name in self.ours)

    @property
    def converts(self) -> bool:
        """Whether values move, not only names."""
        return self.rotary or len(self.ours) > 1


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for field, meaning in FIELDS.items():
        escaped = escaped.replace(re.escape("{" + field + "}"), f"(?P<{field}>{meaning})")
    return re.compile(escaped)


@dataclass(frozen=True, slots=True)
class Report:
    """What a load did, by our names. missing: left as they were, because the caller allowed it (`may_lack`).

    unexpected: always empty, since a name too many raises; told because a reader asks.
    """

    matched: tuple[str, ...]
    converted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} matched, {len(self.converted)} converted, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """How published tensors fit the model they claim to be, by published names.

    matched: renamed only. converted: values are reordered or cut, too. wrong: of another shape, as lines of text.
    dropped: known, but with no place in the part that was asked for (a text encoder beside the vision encoder).
    """

    matched: tuple[str, ...]
    converted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def num_mapped(self) -> int:
        """Tensors that have their place."""
        return len(self.matched) + len(self.converted)

    @property
    def num_names(self) -> int:
        """Tensors that are there or should be."""
        return self.num_mapped + len(self.missing) + len(self.unexpected) + len(self.wrong)

    def __str__(self) -> str:
        counts = [f"{len(self.matched):,} matched", f"{len(self.converted):,} converted"]
        counts += [f"{len(self.missing):,} missing", f"{len(self.unexpected):,} unexpected"]
        counts += [f"{len(self.dropped):,} dropped"] if self.dropped else []
        return ", ".join(counts + ([f"{len(self.wrong):,} of another shape"] if self.wrong else []))


@dataclass(frozen=True)
class Converter:
    """A variant's rules. `head_dim` of every method is the decoder's, which the rotary rows need."""

    rules: tuple[Rule, ...]

    def to_ours(self, state: Mapping[str, torch.Tensor], *, head_dim: int) -> dict[str, torch.Tensor]:
        """Published tensors under our names; a name without a rule raises."""
        out: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            rule, fields = self._rule_of(name)
            value = _halves(tensor, head_dim) if rule.rotary else tensor
            for ours, part in zip(rule.ours, _parts(name, value, len(rule.ours)), strict=True):
                out[ours.format(**fields)] = part
        return out

    def to_reference(self, state: Mapping[str, torch.Tensor], *, head_dim: int) -> dict[str, torch.Tensor]:
        """Our tensors under the published names; a name without a rule, or half of a stack, raises."""
        stacks: dict[str, tuple[Rule, dict[int, torch.Tensor]]] = {}
        for name, tensor in state.items():
            rule, part, theirs = self.place_of(name)
            stacks.setdefault(theirs, (rule, {}))[1][part] = tensor
        out: dict[str, torch.Tensor] = {}
        for theirs, (rule, parts) in stacks.items():
            if len(parts) != len(rule.ours):
                raise ValueError(f"{theirs} needs {len(rule.ours)} of our tensors ({rule.ours}), found {len(parts)}")
            value = torch.cat([parts[n] for n in range(len(parts))]) if len(parts) > 1 else parts[0]
            out[theirs] = _pairs(value, head_dim) if rule.rotary else value
        return out

    def manifest(self, model: nn.Module, *, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of a model (on the meta device, of any size)."""
        meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        return {name: tuple(tensor.shape) for name, tensor in self.to_reference(meta, head_dim=head_dim).items()}

    def load_reference(
        self,
        model: nn.Module,
        state: Mapping[str, torch.Tensor],
        *,
        head_dim: int,
        may_lack: Sequence[str] = (),
        origin: str = "the published checkpoint",
    ) -> Report:
        """Put published tensors into the model, strictly; `may_lack` as in `load_state`."""
        report = load_state(model, self.to_ours(state, head_dim=head_dim), origin=origin, may_lack=may_lack)
        moved = {name for name in report.matched if self.rules[self._index_of(name)].converts}
        same = tuple(name for name in report.matched if name not in moved)
        return replace(report, matched=same, converted=tuple(sorted(moved)))

    def _rule_of(self, theirs: str) -> tuple[Rule, dict[str, str]]:
        for rule in self.rules:
            if match := rule.their_pattern.fullmatch(theirs):
                return rule, match.groupdict()
        known = [rule.theirs for rule in self.rules]
        raise ValueError(f"no rule for the published name {theirs}; nearest: {_nearest(theirs, known)}")

    def _index_of(self, ours: str) -> int:
        for index, rule in enumerate(self.rules):
            if any(pattern.fullmatch(ours) for pattern in rule.our_patterns):
                return index
        known = [name for rule in self.rules for name in rule.ours]
        raise ValueError(f"no rule for our name {ours}; nearest: {_nearest(ours, known)}")

    def names_of(self, theirs: str) -> tuple[str, ...]:
        """Our names for a published one; a name without a rule has none."""
        for rule in self.rules:
            if match := rule.their_pattern.fullmatch(theirs):
                return tuple(name.format(**match.groupdict()) for name in rule.ours)
        return ()

    def place_of(self, ours: str) -> tuple[Rule, int, str]:
        """See `find`; a name without a rule raises."""
        self._index_of(ours)
        place = self.find(ours)
        assert place is not None
        return place

    def find(self, ours: str) -> tuple[Rule, int, str] | None:
        """The rule of one of our names, which of the rule's parts it is, and the published name it belongs to."""
        for rule in self.rules:
            for part, pattern in enumerate(rule.our_patterns):
                if match := pattern.fullmatch(ours):
                    return rule, part, rule.theirs.format(**match.groupdict())
        return None


def _parts(name: str, stack: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if count == 1:
        return (stack,)
    if stack.shape[0] % count:
        raise ValueError(f"{name} has {stack.shape[0]} rows, not a multiple of {count}; is it the tensor it is named?")
    return stack.chunk(count)


def _halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (2i, 2i + 1) of a head that rotate together, to (i, i + half)."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).flatten(0, 2)


def _pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `_halves`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).flatten(0, 2)


def _nearest(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)) or "none"


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, origin: str, may_lack: Sequence[str] = ()
) -> Report:
    """Load strictly: every name and shape must agree, otherwise nothing is loaded and the differences are listed.

    may_lack: globs of our names that the state may leave out; they stay as they are and are reported as missing.
    Parameters on the meta device take the given tensors as they are; others are copied into.
    """
    own = model.state_dict()
    for glob in may_lack:
        if not fnmatch.filter(own, glob):
            raise ValueError(f"may_lack {glob!r} matches no name of the model; nearest: {_nearest(glob, own)}")
    lacking = [name for name in own if name not in state]
    allowed = frozenset(name for name in lacking if any(fnmatch.fnmatchcase(name, glob) for glob in may_lack))
    check_names(model, state, where=origin, may_lack=allowed)
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict(dict(state), strict=not allowed, assign=on_meta)
    for module in list(model.modules()) if on_meta else []:
        if isinstance(module, Decoder) and not module.lm_head.weight.is_meta:
            module.restore_buffers()
    matched = tuple(name for name in own if name not in allowed)
    return Report(matched=matched, missing=tuple(name for name in lacking if name in allowed))
