"""From a typed `Run` to the pieces a fit needs: model, processor, run directory, first weights; the dry run's plan."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from bestiary.addresses import shown
from bestiary.compose import at_home, build, load_run
from bestiary.config import Data, Evaluation, Run, Source
from bestiary.language.tuning import check_quantization
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import NODE, Pieces, load_named, load_saved_run, with_processor
from bestiary.saved_tuning import BASE, base_sha256, check_base, saves_all, says
from bestiary.saved_weights import made_by
from bestiary.training.checkpoints import Checkpoint
from bestiary.training.memory import memory_lines
from bestiary.training.parents import load_first_weights, load_parent, wrong_stage
from bestiary.training.resuming import accept_stream, launched_rank, num_launched, open_run, resume_path
from bestiary.training.run_dir import RunDir
from bestiary.training.stages import apply_stage, parameter_table
from bestiary.training.strategies import check_machine
from bestiary.training.tuning import Plan, apply_plan, plan_tuning

if TYPE_CHECKING:
    from bestiary.training.fit import Summary, TrainingData

log = logging.getLogger(__name__)


def place(run: Run, root: Path) -> None:
    """Make the paths a person typed absolute, from the folder the command was given in; `root` is the project's.

    Raises where this machine lacks a package that the run asks for, before anything is made or loaded.
    """
    check_quantization(run.tuning.quantize)
    typed = [run.run_dir, run.resume, run.parent, run.data.skip]
    run.run_dir, run.resume, run.parent, run.data.skip = at_home(typed, root)


def check_start(run: Run) -> None:
    """Raise where a new run's first weights or its tokenizer are missing, before anything is built or made."""
    if run.resume:
        return
    missing = _missing_files(run)
    if lacks := _lacks_parent(run):
        raise ValueError(f"{lacks}, or stage.parent_optional=true to start from model.weights")
    if wrong := _wrong_parent(run):
        raise ValueError(wrong)
    if missing:
        more = f"; dry_run=true lists {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}; put it there or name another{more}")


def make_ready(run: Run, root: Path) -> None:
    """Check the machine and what a new run starts from, then make the data where a recipe makes its own.

    A dry run does none of it: it may be of a larger machine.

    root: the project's folder, see `place`.
    """
    place(run, root)
    talk()
    check_prepare(run.data)
    if run.dry_run:
        return
    check_machine(run.cluster)
    check_start(run)
    if run.data.prepare:
        build(run.data.prepare)


def check_prepare(data: Data) -> None:
    """Raise where a recipe would make its data at an address: data is made in folders alone."""
    root = str((data.prepare or {}).get("root", ""))
    if "://" in root:
        raise ValueError(
            f"data.prepare makes its data in a folder, and {shown(root)} is an address; set cluster.data_root to a "
            "folder, or data.prepare=null where the shards lie at that address already"
        )


def choose_run_dir(run: Run, *, sweep_dir: str | None) -> tuple[Path, bool]:
    """Where this run lives, and whether it goes on there; the runs of a sweep become one wandb group."""
    path, going_on = _run_dir(run, sweep_dir)
    run.logger.group = run.logger.group or (path.parent.name if sweep_dir else None)
    return path, going_on


def _run_dir(run: Run, sweep_dir: str | None) -> tuple[Path, bool]:
    runs_root = Path(run.cluster.runs_root)
    going_on = resume_path(run.resume, runs_root, run.stage.name)
    if going_on is not None:
        return going_on, True
    if run.run_dir or sweep_dir:
        return Path(run.run_dir or str(sweep_dir)), False
    if num_launched() > 1:
        raise ValueError(f"{num_launched()} processes would each name a run directory by their clock; give run_dir=")
    return runs_root / run.stage.name / time.strftime("%Y%m%d-%H%M%S"), False


def start(
    run: Run, pieces: Pieces, *, path: Path, resume: bool, config: DictConfig, data: TrainingData | None = None
) -> tuple[RunDir, Checkpoint | None, str | None]:
    """Opens the run directory and puts the first weights into the model; returns what `fit` asks for.

    data: the stream, which may refuse to go on from a checkpoint before the directory changes.
    """

    def accept(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
        return accept_stream(RunDir(path), checkpoint, data) if data is not None else None

    if data is not None:
        _ = data.domains  # opens the shards: a missing one must not leave a run directory behind
    given = run.parent or run.stage.parent
    plan = plan_tuning(pieces.model, run.stage, run.tuning)
    if not resume:  # what is refused must not leave a run directory behind
        if launched_rank() == 0:
            RunDir(path).check_free()
        parent = _begin(run, pieces, plan, given, None)
    asked, resolved = OmegaConf.to_yaml(config), OmegaConf.to_yaml(config, resolve=True)
    directory, checkpoint = open_run(
        path, resume=resume, stage=run.stage.name, config=asked, resolved=resolved, accept=accept
    )
    log.info("run directory: %s", path)
    if checkpoint is not None and saves_all(run.tuning):
        return directory, checkpoint, None
    if resume:
        # A run killed before its first checkpoint starts again from what it was given then, not from a default.
        with directory.unless_refused():
            parent = _begin(run, pieces, plan, directory.status.parent or given, checkpoint)
    return directory, checkpoint, None if checkpoint else parent


def _begin(run: Run, pieces: Pieces, plan: Plan, parent: str | None, checkpoint: Checkpoint | None) -> str | None:
    """Puts the first weights into the model and tunes it; returns the parent as the run is to remember it."""
    if parent:
        opened = load_parent(pieces.model, parent, stage=run.stage, identity=pieces.identity,
                             weights=run.model.weights, unused=run.model.unused_weights)  # fmt: skip
        found, parent = set(opened.tensors), parent if saves_all(run.tuning) else str(opened.path)
    else:
        found = load_first_weights(pieces.model, run.model.weights, pieces.identity, unused=run.model.unused_weights)
    if not saves_all(run.tuning):
        _begin_tuning(run, pieces, plan, found, checkpoint)
    return parent


def _lacks_parent(run: Run) -> str | None:
    """What to say of a stage that needs a parent and was given none."""
    if run.parent or run.stage.parent or run.stage.parent_optional or not run.stage.parents:
        return None
    return f"parent: stage {run.stage.name} starts from {' or '.join(run.stage.parents)}; give parent="


def _begin_tuning(run: Run, pieces: Pieces, plan: Plan, found: set[str], checkpoint: Checkpoint | None) -> None:
    """Tune a model that has its base; what files gave of it and does not train is left out of checkpoints."""
    model = pieces.model
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(named[name]) for name in plan.whole}
    pieces.base.update(name for name in found if id(named.get(name)) not in trained)
    digest = base_sha256(model.state_dict().__getitem__, pieces.base)
    if checkpoint is not None:
        check_base(checkpoint.state.identity, digest, where=f"checkpoint {checkpoint.path}")
    pieces.identity.update({BASE: digest, "tuning": says(run.tuning)})
    gpu = run.cluster.accelerator == "gpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    apply_plan(model, run.tuning, plan, seed=run.seed, device=device)


def evaluated_run(asked: Evaluation, path: Path) -> Run:
    """The run of a directory; of weights without one what stands in for it: where data lies, and no benchmarks."""
    if _is_run(asked, path):
        run = load_run(path)
    else:
        run = Run()
        run.data.root = run.cluster.data_root
    run.data.root = asked.data.root or run.data.root
    run.data.heldout |= asked.data.heldout
    check_prepare(run.data)
    return run


def load_pieces(asked: Evaluation, run: Run, path: Path) -> Pieces:
    """Model and processor of what is evaluated: a run's newest complete checkpoint, or weights without a run."""
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = "cuda" if asked.accelerator == "gpu" else "cpu"
    if _is_run(asked, path):
        return load_saved_run(path, run=run, device=device)
    return load_named(path, model=asked.model, scale=asked.scale or "paper", device=device)


def _is_run(asked: Evaluation, path: Path) -> bool:
    if (path / "config.resolved.yaml").is_file():
        if asked.model or asked.scale:
            raise ValueError(
                f"model={asked.model} and scale={asked.scale} have no effect: {path} is a run directory and says both; "
                "leave them out"
            )
        return True
    if asked.scale and not asked.model:
        raise ValueError(f"scale={asked.scale} has no effect without model=NAME; give it, or leave scale out")
    return not (asked.model or (path / NODE).is_file())


def source_arguments(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(training sources, held-out sources) with their paths below `data.root`; those of weight 0 are left out."""

    def placed(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
        return {n: {**asdict(s), "path": _below(run.data.root, s.path)} for n, s in sources.items() if s.weight != 0}

    return placed(run.data.sources), placed(run.data.heldout)


def stream_arguments(run: Run) -> dict[str, Any]:
    """Keyword arguments of the stream: the data settings, the lanes, the seed, and what a change of it means."""
    taken_elsewhere = ("root", "prepare", "sources", "heldout")
    settings = {k: v for k, v in vars(run.data).items() if k not in taken_elsewhere}
    return {
        **settings,
        **cache_arguments(run),
        "on_change": run.stream.on_change,
        "max_steps": run.stage.max_steps,
        "seed": run.seed,
        "num_lanes": run.stage.batch_size,
        "micro_batch": run.stage.micro_batch,
    }


def cache_arguments(run: Run) -> dict[str, Any]:
    """Where what is fetched from URLs is kept, and how much; None, below an address, is the user's cache folder."""
    beside = None if "://" in run.data.root else str(Path(run.data.root) / ".remote")
    return {"cache_root": run.data.cache_root or beside, "cache_gb": run.data.cache_gb}


def module_arguments(run: Run, data: TrainingData) -> dict[str, Any]:
    """The seed, and the sources and domains that losses are reported for, in one order on every rank."""
    used = [name for name, source in run.data.sources.items() if source.weight != 0]
    return {"seed": run.seed, "sources": used, "domains": list(data.domains)}


def show_plan(run: Run, missing: Mapping[str, str], stream: Callable[..., Any]) -> int:
    """Says what a run would do, without weights: parameters, what trains, memory of GPUs, the mix, what is missing.

    missing: location -> line of every source that is not on disk. stream: makes the data of a processor; asked for the
    resolved mix where nothing is missing.
    """
    with torch.device("meta"):
        model: MultimodalLM = build(run.model.build, attention="sdpa")
    apply_plan(model, run.tuning, plan_tuning(model, run.stage, run.tuning), seed=run.seed)
    apply_stage(model, run.stage)
    # A tokenizer that does not suit the model is said here already, whatever else is missing.
    has_tokenizer = Path(run.model.processor.get("tokenizer", "")).exists()
    processor = with_processor(run, model).processor if has_tokenizer else None
    made = [place for place in missing if _is_made(run.data, place)]
    by = f"made at first use by {run.data.prepare['_target_']}" if run.data.prepare else ""
    files = _missing_files(run)
    absent = [*(line for place, line in missing.items() if place not in made), *files]
    wrong = _wrong_parent(run)
    used = {name: source for name, source in run.data.sources.items() if source.weight != 0}
    data = stream(processor=processor)  # what the numbers of `data` cannot be is said here, sources or not
    if missing or files:
        shares = asked_shares(run.data)
        mix = [f"  {shares[n]:>12}  {n:<32} {s.domain or '-':<12} {shown(s.path)}" for n, s in used.items()]
    else:
        assert processor is not None
        mix = [data.resolved_table(run.stage.max_steps)]
    lines = [
        f"stage {run.stage.name} at scale {run.scale}: {run.stage.max_steps:,} steps of {run.stage.batch_size} rows "
        f"of at most {run.data.row_tokens or run.data.max_tokens:,} positions, lr {run.stage.optimizer.lr:g}",
        "",
        parameter_table(model),
        *memory_lines(model, run),
        "",
        f"mix of {len(used)} sources:",
        *mix,
        *([f"sources {by}: {len(made)}"] if made else []),
        "",
        f"missing on disk: {len(absent)}" if absent else "nothing is missing on disk",
        *(f"  {line}" for line in absent),
        *(["a source: write its shards there, or set data.sources.NAME.path"] if len(absent) > len(files) else []),
        *(["", f"this run would be refused: {wrong}"] if wrong else []),
    ]
    show("\n".join(lines))
    return 0


def _is_made(data: Data, place: str) -> bool:
    """Whether `data.prepare` makes what is missing at a place: it makes nothing outside its own root."""
    root = (data.prepare or {}).get("root")
    return root is not None and Path(place).is_relative_to(root)


def asked_shares(data: Data) -> dict[str, str]:
    """What the mix asks of each source, in words; as percentages where no sizes of the data are needed to know them."""
    used = {name: source for name, source in data.sources.items() if source.weight != 0}
    for kind in ("weight", "count"):
        numbers = {name: _number(source, kind) for name, source in used.items()}
        plain = all(not (source.schedule or source.max_epochs) for source in used.values())
        if plain and all(number is not None for number in numbers.values()):
            powers = {name: (number or 0.0) ** (1 / data.temperature) for name, number in numbers.items()}
            return {name: f"{power / sum(powers.values()):.2%}" for name, power in powers.items()}
    return {name: _in_words(source) for name, source in used.items()}


def show_summary(summary: Summary) -> int:
    """Says how a fit ended and where everything lies; returns the process's exit code."""
    if summary.table:
        show(summary.table)
    show(f"{summary.state} at step {summary.step}: {summary.run_dir}")
    if summary.exit_code:
        show(f"go on with: python train.py resume={summary.run_dir}")
    return summary.exit_code


def talk() -> None:
    """Log lines of this project on the terminal, once a process."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("bestiary", "data_modules"):
        logging.getLogger(name).setLevel(logging.INFO)


def show(text: str) -> None:
    """Says something to the person at the terminal, on the first rank alone."""
    if launched_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _number(source: Source, kind: str) -> float | None:
    """A source's weight or count; a source that says nothing has weight 1."""
    asked = [source.weight, source.count, source.repeat]
    if kind == "weight" and asked == [None, None, None]:
        return 1.0
    return float(getattr(source, kind)) if getattr(source, kind) is not None else None


def _in_words(source: Source) -> str:
    cap = f", at most {source.max_epochs:g} passes" if source.max_epochs else ""
    if source.schedule:
        return "weight " + " -> ".join(f"{weight:g} at {step}" for step, weight in source.schedule) + cap
    if source.repeat is not None:
        return f"{source.repeat:g} passes{cap}"
    return (f"{source.count:g} samples" if source.count is not None else f"weight {_number(source, 'weight'):g}") + cap


def _below(root: str, path: str) -> str:
    """A path below the root, unless it stands for itself: an address or an absolute path."""
    if "://" in path:
        return path
    return f"{root.rstrip('/')}/{path}" if "://" in root else str(Path(root) / path)


def _missing_files(run: Run) -> list[str]:
    parent = run.parent or run.stage.parent
    wanted: dict[str, str | None] = {"tokenizer": run.model.processor.get("tokenizer"), "parent": parent}
    if not parent:
        wanted |= {f"weights {i}": path for i, path in enumerate(run.model.weights, 1)}
    found = [f"{name}: {path} does not exist" for name, path in wanted.items() if path and not Path(path).exists()]
    return [*found, *(line for line in (_lacks_parent(run),) if line)]


def _wrong_parent(run: Run) -> str | None:
    """What to say of a parent that another stage made than this one starts from."""
    given = run.parent or run.stage.parent
    return wrong_stage(given, made_by(Path(given)), run.stage) if given and Path(given).exists() else None
