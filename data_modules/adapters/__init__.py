"""Adapters: one module for each published annotation format, read record by record into samples.

To add a format, write a class that is a `protocol.Adapter` and name it in FORMATS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from data_modules.adapters.protocol import Adapter, Record, RejectedRecordError, Rejection

__all__ = ["FORMATS", "Adapter", "Record", "RejectedRecordError", "Rejection", "described", "make_adapter"]

FORMATS: dict[str, tuple[str, str]] = {
    "benchmark": ("data_modules.adapters.benchmark", "BenchmarkAdapter"),
    "llava": ("data_modules.adapters.llava", "LlavaAdapter"),
    "mdvp": ("data_modules.adapters.mdvp", "MdvpAdapter"),
    "mdvp_bench": ("data_modules.adapters.mdvp_bench", "MdvpBenchAdapter"),
    "ovis": ("data_modules.adapters.ovis", "OvisAdapter"),
    "plain": ("data_modules.adapters.plain", "PlainAdapter"),
    "qwen_vl": ("data_modules.adapters.qwen_vl", "QwenVlAdapter"),
    "sphinx": ("data_modules.adapters.sphinx", "SphinxAdapter"),
}
"""FORMAT of `bestiary shards write` -> module and class, imported when asked for."""

_FIXED = ("annotations", "images", "source", "domain")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def make_adapter(
    format_name: str,
    annotations: Path,
    images: Path | None,
    *,
    source: str,
    domain: str | None = None,
    options: Mapping[str, str] | None = None,
) -> Adapter:
    """The adapter of a format; ValueError names the known formats or options and the nearest one."""
    if format_name not in FORMATS:
        raise ValueError(f"format {format_name!r} is unknown{_nearest(format_name, FORMATS)}; known: {_list(FORMATS)}")
    made, parameters = _constructor(format_name)
    converted = {}
    for option, text in (options or {}).items():
        if option not in parameters:
            known = f"known: {_list(parameters)}" if parameters else "it has none"
            raise ValueError(
                f"--option {option} is unknown to format {format_name}{_nearest(option, parameters)}; {known}"
            )
        converted[option] = _convert(option, text, parameters[option].annotation)
    adapter: Adapter = made(annotations, images, source=source, domain=domain, **converted)
    return adapter


def described() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(format, what it is, its options with their defaults) of every format, for people."""
    for name in sorted(FORMATS):
        _, parameters = _constructor(name)
        summary = (import_module(FORMATS[name][0]).__doc__ or "").strip().partition("\n")[0]
        yield name, summary, {option: parameter.default for option, parameter in parameters.items()}


def _constructor(format_name: str) -> tuple[Callable[..., Adapter], dict[str, inspect.Parameter]]:
    """The class of a format and the parameters that are its options."""
    module, name = FORMATS[format_name]
    made = getattr(import_module(module), name)
    types = get_type_hints(made if is_dataclass(made) else made.__init__)  # of a base class, too, by its own module
    parameters = inspect.signature(made).parameters
    return made, {
        option: parameter.replace(annotation=types[option])
        for option, parameter in parameters.items()
        if option not in _FIXED
    }


def _convert(option: str, text: str, annotation: Any) -> Any:
    if annotation is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(f"--option {option}={text}: write true or false")
        return _TRUTH[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError as error:
            raise ValueError(f"--option {option}={text}: write a number ({annotation.__name__})") from error
    return text


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _list(known: Mapping[str, Any]) -> str:
    return ", ".join(sorted(known))
