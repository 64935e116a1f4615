"""From YAML and the command line to a typed `Run`, with errors a person can act on.

`entry_point` wraps a main function with Hydra (composition, multirun, --cfg, --help) and turns every error a user can
cause into one line. `check_targets` holds the `_target_` nodes to an allowlist and to the signatures of what they
name, read from the source text, so that a typo fails before torch is ever imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from bestiary.config import Evaluation, Run, check_run

ALLOWED_TARGETS = ("bestiary.evaluation.", "bestiary.training.module.", "bestiary.variants.", "data_modules.")
"""Only public names defined below these prefixes may be a `_target_`: a run directory from elsewhere brings its own
config, which must not reach arbitrary callables, nor what our modules import from others (`json.dump`)."""

PLACES = {
    "model.build": (r"bestiary\.variants\.\w+\.model\.build_\w+", "a build_* of bestiary.variants.<variant>.model"),
    "model.processor": (
        r"bestiary\.variants\.\w+\.processor\.\w+Processor",
        "a *Processor of bestiary.variants.<variant>.processor",
    ),
    "model.module": (
        r"bestiary\.(?:training|variants\.\w+)\.module\.\w+Module",
        "a *Module of bestiary.training.module or bestiary.variants.<variant>.module",
    ),
    "data.prepare": (r"data_modules\.embedded\.(?:\w+\.)?build\w*", "a build* of data_modules.embedded"),
    "suite": (r"bestiary\.evaluation\.\w+\.[A-Z]\w*", "a class of bestiary.evaluation"),
}
"""What a `_target_` may be at and below a key of a run: (pattern of its name, the same in words). Among our public
functions are some that write files; a config from elsewhere must not reach them."""

_OURS = ("bestiary.", "data_modules.")

MARKERS = {"_target_": ALLOWED_TARGETS, "_args_of_": _OURS}
"""`_target_` names what a node builds; `_args_of_` whose arguments a nested node holds, for the check alone."""

GROUPS = ("data_mix", "decoder", "experiment")
"""Choices of conf/config.yaml that are no keys of a run, as its other groups are."""

ANEW = (*GROUPS, "model", "stage", "scale")
"""Choices that make a run what it is: a resume that names one is composed anew, not from its own config.yaml."""

ONE_START = ("run_dir", "resume", "parent", "stream", "dry_run")
"""What a run was told for one start alone, so that the next resume does not hear it again."""


class _Settled(dict[str, Any]):
    """Hydra's store of schemas, which is only read once they are in it.

    Hydra copies all of it anew for every group it lists: with a hundred groups that was most of `--help`.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settled:
        return self


def register_schema() -> None:
    """Makes the typed roots that conf/config.yaml and conf/eval.yaml name first."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Run)
    store.store(name="eval_schema", node=Evaluation)
    store.repo = _Settled(store.repo)


def typed(config: DictConfig) -> Any:
    """The composed configuration as a checked `Run` or `Evaluation` of plain dataclasses, lists and dicts."""
    check_typed_keys(config)
    check_targets(OmegaConf.to_container(config, resolve=True))
    asked = OmegaConf.to_object(config)
    if isinstance(asked, Run):
        check_run(asked)
    elif not isinstance(asked, Evaluation):
        raise TypeError(f"composed a {type(asked).__name__}: is a schema first in the defaults list?")
    return asked


def load_run(folder: Path) -> Run:
    """What a run directory was asked to be, from its config.resolved.yaml."""
    path = folder / "config.resolved.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no {path.name}")
    config = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(path))
    assert isinstance(config, DictConfig)
    run = typed(config)
    assert isinstance(run, Run)
    return run


def base_of(arguments: Sequence[str], name: str, conf: Path) -> str:
    """The configuration that a command line stands on: `name` in `conf`, or the own one of the run that it resumes.

    `resume=RUN` without a choice of ANEW goes on from RUN/config.yaml, as it was asked at the last start; the other
    arguments then change it. A choice of a group (`cluster=gpu`) takes the place of the one before; what no file of the
    group sets (`cluster.data_root`) stays.
    """
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    path = given.get("resume", "").strip("'\"")
    if path in ("", "auto", "null") or any(group in given for group in ANEW):
        return name
    file = Path(path) / "config.yaml"
    if not file.is_file():
        beside = [found.name for found in Path(path).absolute().parent.glob("*") if (found / "status.json").is_file()]
        raise ValueError(
            f"resume={path} is not a run directory: it has no {file.name}{nearest(Path(path).name, beside)}"
        )
    saved, root = OmegaConf.load(file), OmegaConf.load(conf / f"{name}.yaml")
    assert isinstance(saved, DictConfig) and isinstance(root, DictConfig)
    chosen = [group for group in given if (conf / group).is_dir()]
    for key in ONE_START:
        saved.pop(key, None)
    for source in _dropped_again(arguments, file.parent):
        saved.data.sources.setdefault(source, {})
    for group in chosen:
        if group in saved:
            _forget_choice(saved, group, conf / group)
    schema, *others = root.defaults
    own = [entry for entry in others if "override" in str(entry)]  # Hydra's own, as conf has them
    saved.defaults = [schema, "_self_", *({group: None} for group in chosen), *own]
    saved.hydra = root.hydra
    ConfigStore.instance().store(name="resumed", node=saved)
    return "resumed"


def _dropped_again(arguments: Sequence[str], folder: Path) -> list[str]:
    """Sources that a command drops although its run has done so: the one that dropped them was killed and repeated."""
    changes = folder / "changes.jsonl"
    told = changes.read_text(encoding="utf-8") if changes.is_file() else ""
    named = [argument[len(drop) :] for argument in arguments if argument.startswith(drop := "~data.sources.")]
    return [name for name in named if f"removed  {name}:" in told or f"sources.{name} is gone" in told]


def _forget_choice(saved: DictConfig, group: str, folder: Path) -> None:
    """Take out what the chosen file of a group had set: of a typed node its keys, of a free one everything."""
    if not is_dataclass(get_type_hints(Run)[group]):
        del saved[group]
        return
    for file in folder.glob("*.yaml"):
        loaded = OmegaConf.load(file)
        assert isinstance(loaded, DictConfig)
        for key in map(str, loaded.get(group, loaded)):
            saved[group].pop(key, None)


def at_home(paths: Sequence[str | None], root: Path) -> list[str | None]:
    """Makes paths a user typed absolute, then works in the project's folder, where paths in YAML files begin."""
    whole = [p if p in (None, "auto") else str(Path(p).absolute()) for p in paths if p is None or isinstance(p, str)]
    os.chdir(root)
    return whole


def sweep_dir() -> str | None:
    """The job's folder in a multirun, else None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    return str(Path(hydra.runtime.output_dir).absolute()) if hydra.mode == RunMode.MULTIRUN else None


def check_typed_keys(node: DictConfig, where: str = "") -> None:
    """Raises ValueError for a key that `+key=value` put where the schema has none: it would change nothing."""
    kind = OmegaConf.get_type(node)
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise ValueError(f"there is no {where}{key}{nearest(key, known)}")
        if not OmegaConf.is_missing(node, key) and isinstance(value := node[key], DictConfig):
            check_typed_keys(value, f"{where}{key}.")


def build(node: dict[str, Any], **extra: Any) -> Any:
    """Calls what a `_target_` node names with its keys and `extra`, which must not overlap."""
    both = sorted(set(node) & set(extra))
    if both:
        raise ValueError(f"{node['_target_']}: {', '.join(both)} is set by the program; take it out of the YAML")
    check_targets(node)
    module, _, name = str(node["_target_"]).rpartition(".")
    target = getattr(importlib.import_module(module), name)
    arguments = {**_without_markers(node), **extra}
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{node['_target_']}: {error}; add it to the YAML or take it out") from error
    return target(**arguments)


def _without_markers(tree: Any) -> Any:
    """The values alone, without the keys that only name whose arguments they are; inner `_target_` nodes are built."""
    if isinstance(tree, dict):
        return {k: _inner(v) for k, v in tree.items() if k not in MARKERS}
    if isinstance(tree, list):
        return [_inner(v) for v in tree]
    return tree


def _inner(tree: Any) -> Any:
    return build(tree) if isinstance(tree, dict) and "_target_" in tree else _without_markers(tree)


def check_targets(tree: Any, where: str = "") -> None:
    """Raises ValueError where a `_target_` is not allowed, does not exist, or does not take one of its keys."""
    if isinstance(tree, list):
        for i, item in enumerate(tree):
            check_targets(item, f"{where}[{i}]")
    if not isinstance(tree, dict):
        return
    for marker, allowed in MARKERS.items():
        if marker in tree:
            _check_keys(tree, str(tree[marker]), where or marker, allowed=allowed)
    if "_target_" in tree:
        _check_place(str(tree["_target_"]), where)
    for key, value in tree.items():
        check_targets(value, f"{where}.{key}" if where else str(key))


def _check_place(target: str, where: str) -> None:
    for place, (pattern, told) in PLACES.items():
        if f"{where}.".startswith(f"{place}.") and not re.fullmatch(pattern, target):
            raise ValueError(f"{where}: _target_ {target!r} is not allowed there; name {told}")


def _check_keys(node: dict[str, Any], target: str, where: str, *, allowed: tuple[str, ...]) -> None:
    if not target.startswith(allowed):
        raise ValueError(f"{where}: _target_ {target!r} is not allowed; it must begin with {', '.join(allowed)}")
    if target.rpartition(".")[2].startswith("_"):
        raise ValueError(f"{where}: _target_ {target!r} is not allowed; it is private: name a public class or function")
    parameters = signature(target)
    if parameters is None:
        return
    for key in node:
        if key not in MARKERS and key not in parameters:
            raise ValueError(f"{where}: {target} takes no {key!r}{nearest(str(key), parameters)}")


@cache
def signature(target: str) -> tuple[str, ...] | None:
    """Parameter names of a function or class, read from its source without importing it; None with **kwargs."""
    module, _, name = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        raise ValueError(f"_target_ {target!r}: there is no module {module!r}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    named = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    if name in named:
        return _parameters(named[name])
    for node in tree.body:  # a name the package re-exports
        if isinstance(node, ast.ImportFrom) and node.module and any(name == (a.asname or a.name) for a in node.names):
            original = next(a.name for a in node.names if name == (a.asname or a.name))
            if not f"{node.module}.".startswith(_OURS):
                raise ValueError(f"_target_ {target!r} is not allowed; {module} only imports {name} from {node.module}")
            return signature(f"{node.module}.{original}")
    raise ValueError(f"_target_ {target!r}: {module} has no {name!r}{nearest(name, named)}")


def _parameters(node: ast.FunctionDef | ast.ClassDef) -> tuple[str, ...] | None:
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            own = tuple(
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            )
            return own if own or not node.bases else None
        node = init
    if node.args.kwarg:
        return None
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return tuple(n for n in names if n not in ("self", "cls"))


def nearest(name: str, choices: Iterable[str]) -> str:
    """A clause with the most similar valid names, for the end of an error line."""
    options = sorted(str(c) for c in choices)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5) or options[:8]
    return f"; nearest valid: {', '.join(close)}" if close else ""


def schema_keys(kind: Any = Run) -> Iterator[tuple[str, type]]:
    """(key, dataclass that holds it) of every typed key below a dataclass."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        yield f.name, kind
        for inner in (hints[f.name], *get_args(hints[f.name])):
            if is_dataclass(inner):
                yield from schema_keys(inner)


def explain(error: BaseException) -> str:
    """One line: what is wrong, where, and the nearest valid key or choice."""
    root: Any = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(error).split()).partition(". To append to your config")[0]
    if not type(error).__module__.startswith(("hydra", "omegaconf")):
        return " ".join(str(error).split())  # ours: it says everything itself
    override = getattr(error, "override", None)
    if override is not None:
        key, equals, value = str(override).partition("=")
        quoted = f"; with such signs in it write '{key}=\"{value}\"'" if equals else ""
        return f"cannot read {override!r}: {text.partition(' See https')[0]}{quoted}"
    reason = " ".join(str(root).split())
    absent = re.search(r"Key '([^']+)' is not in struct full_key: (\S+)", reason)
    if absent and root.parent_node is not None:
        return f"there is no {absent[2]}{nearest(absent[1], root.parent_node)}"
    null = re.search(r"interpolation '\$\{([\w.]+)\}': Incompatible value 'None'.* full_key: (\S+)", reason)
    if null:
        place = null[2].partition("[")[0]
        return f"{null[2]} refers to {null[1]}, which is null; give {null[1]} a value, or set {place} without it"
    reason = reason.partition(" full_key: ")[0] if "reference_type=" in reason and "Key '" not in reason else reason
    if "is not a subclass of Source" in reason:
        return f"{text}: a new source comes from a file of dataset/, as +dataset@data.sources.NAME=FILE"
    line = text if reason in text else f"{text}: {reason}"
    unknown = re.search(r"Key '([^']+)' (?:is )?not in '([^']+)'", line)
    if unknown:
        key, holder = unknown.groups()
        every = [pair for schema in (Run, Evaluation) for pair in schema_keys(schema)]
        keys = {k for k, kind in every if kind.__name__ == holder} or {k for k, _ in schema_keys()}
        keys |= set(GROUPS) if holder == "Run" else set()
        return f"unknown key {key!r} in {holder}{nearest(key, keys)}  ({text.split(' full_key')[0]})"
    group = re.search(r"Could not find '([^']+)/([^'/]+)'", line)
    if group:
        return f"there is no {group[1]}={group[2]}{nearest(group[2], getattr(error, 'options', None) or ())}"
    return line


def entry_point(main: Callable[[Any, DictConfig], int | None], *, config_path: Path, name: str = "config") -> None:
    """Runs `main(asked, config)` under Hydra; an error a user can cause ends with one line and exit code 1."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    expected = (HydraException, OmegaConfBaseException, ValueError, FileNotFoundError)
    if name == "config":
        try:
            name = base_of(sys.argv[1:], name, config_path)
        except expected as error:
            _end_with(error)
    # Hydra otherwise prints errors itself, without the nearest valid name, and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(config_path), config_name=name)  # type: ignore[untyped-decorator]
    def job(config: DictConfig) -> None:
        try:
            code = main(typed(config), config)
        except expected as error:
            _end_with(error)
        if code:
            sys.exit(code)

    try:
        job()
    except expected as error:
        _end_with(error)


def _end_with(error: Exception) -> NoReturn:
    if os.environ.get("BESTIARY_TRACEBACK"):
        raise error
    sys.stderr.write(f"error: {explain(error)}\n")
    sys.exit(1)
