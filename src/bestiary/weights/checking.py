"""What an import refuses: tensors that do not fit the model, and tokenizers that do not fit the tensors."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.text.tokenizer import load_tokenizer
from bestiary.training.names import nearest
from bestiary.variants.conversion import Fit, Rule
from bestiary.variants.layouts import Model, Shapes


def compare(model: Model, shapes: Shapes, config: Mapping[str, Any]) -> Fit:
    """Published names and whole shapes against the model of these sizes; config: of config.json, may be empty."""
    expected = model.expected(shapes, config)
    wrong = [name for name in shapes if name in expected and tuple(shapes[name]) != expected[name]]
    agreed = [name for name in shapes if name in expected and name not in set(wrong)]
    moved = {name for name in agreed if any(r.converts and r.their_pattern.fullmatch(name) for r in _rules(model))}
    return Fit(
        matched=tuple(name for name in agreed if name not in moved),
        converted=tuple(name for name in agreed if name in moved),
        missing=tuple(name for name in expected if name not in shapes),
        unexpected=tuple(name for name in shapes if name not in expected),
        wrong=tuple(f"{name}: {tuple(shapes[name])}, not {expected[name]}" for name in wrong),
    )


def by_rules(model: Model, shapes: Shapes) -> Fit:
    """A delta need not hold everything, so only names can be checked."""
    rule_of = {name: next((r for r in _rules(model) if r.their_pattern.fullmatch(name)), None) for name in shapes}
    return Fit(
        matched=tuple(name for name, rule in rule_of.items() if rule and not rule.converts),
        converted=tuple(name for name, rule in rule_of.items() if rule and rule.converts),
        unexpected=tuple(name for name, rule in rule_of.items() if rule is None),
    )


def _rules(model: Model) -> tuple[Rule, ...]:
    return model.converter.rules


def near(name: str, known: Collection[str]) -> str:
    """The known names most like this one, for the end of a line."""
    return ", ".join(nearest(name, known, count=2)) or "none"


def check_fit(
    found: Fit,
    *,
    where: str,
    may_lack: Sequence[str] = (),
    keep_unknown: bool = False,
    unknown: Sequence[str] | None = None,
    ours: Callable[[str], Sequence[str]] = lambda name: (),
) -> None:
    """Raise one line when tensors are missing, unknown or of another shape.

    may_lack: globs of published names or of ours, which `ours` tells. unknown: the unexpected names that count as
    such, all of them by default.
    """
    named = {name: (name, *ours(name)) for name in found.missing}
    allowed = {glob: {n for n, both in named.items() if fnmatch.filter(both, glob)} for glob in may_lack}
    for glob, names in allowed.items():
        if not names:
            raise ValueError(f"--may-lack {glob!r} matches none of the {len(found.missing)} missing names")
    lacking = [name for name in found.missing if not any(name in names for names in allowed.values())]
    odd = found.unexpected if unknown is None else unknown
    problems = []
    if found.wrong:
        problems.append(f"{len(found.wrong)} of another shape, first {found.wrong[0]}")
    if lacking:
        hint = near(lacking[0], found.unexpected)
        problems.append(f"{len(lacking)} missing, first {lacking[0]} (nearest: {hint}; --may-lack GLOB allows it)")
    if odd and not keep_unknown:
        hint = near(odd[0], found.missing or found.matched)
        problems.append(f"{len(odd)} unexpected, first {odd[0]} (nearest: {hint}; --keep-unknown keeps them)")
    if problems:
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems)}")


def check_tokenizer(path: Path | None, rows: int, *, allows_spare: bool = False) -> dict[str, str]:
    """The identity that weights with this tokenizer have; raises when its pieces are not the embedding's rows.

    allows_spare: the embedding may have more rows than there are pieces.
    """
    if path is None:
        return {}
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not allows_spare):
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces but the embedding {rows} rows; it is not the "
            "tokenizer of these weights: give theirs with --tokenizer FILE"
        )
    return {"tokenizer": tokenizer.sha256}
