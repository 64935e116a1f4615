"""From a typed `Run` to the pieces a fit needs: model, processor, run directory, first weights; the dry run's plan."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bestiary.compose import at_home, build
from bestiary.config import Data, Run, Source
from bestiary.mllm import MultimodalLM
from bestiary.schema import Processor
from bestiary.training.checkpoints import Checkpoint
from bestiary.training.model_state import load_model_tensors
from bestiary.training.parents import check_identity, load_parent, open_parent
from bestiary.training.resuming import launched_rank, num_launched, open_run, resume_path
from bestiary.training.run_dir import RunDir
from bestiary.training.stages import apply_stage, parameter_table

if TYPE_CHECKING:
    from bestiary.training.fit import Summary, TrainingData

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pieces:
    """A model with the processor made for it. identity: what its weights depend on beside shapes."""

    model: MultimodalLM
    processor: Processor
    identity: dict[str, str]


def build_pieces(run: Run, *, on_meta: bool = False) -> Pieces:
    """The model with random weights drawn from `run.seed` (or shapes alone) and its processor."""
    torch.manual_seed(run.seed)
    with torch.device("meta" if on_meta else "cpu"):
        # Shapes need no kernels: a run for other machines can be looked at on this one.
        model: MultimodalLM = build(run.model.build, attention="sdpa" if on_meta else run.attention)
    processor = build_processor(run, model)
    vocab, pieces = model.decoder.vocab_size, processor.tokenizer.vocab_size
    if vocab != pieces:
        raise ValueError(
            f"the decoder has {vocab} token ids but the tokenizer {run.model.processor['tokenizer']} has {pieces}; "
            "set model.build.decoder.vocab_size, or use the tokenizer of the weights"
        )
    return Pieces(model, processor, {"tokenizer": processor.tokenizer.sha256})


def build_processor(run: Run, model: MultimodalLM) -> Any:
    """The processor, told by the model how many positions an image and the prompts take."""
    path = Path(run.model.processor["tokenizer"])
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; put it there or set model.processor.tokenizer")
    return build(run.model.processor, **model.layout, max_tokens=run.data.max_tokens, too_long=run.data.too_long)


def place(run: Run, root: Path) -> None:
    """Make the paths a person typed absolute, from the folder the command was given in; `root` is the project's."""
    typed = [run.run_dir, run.resume, run.parent, run.data.skip]
    run.run_dir, run.resume, run.parent, run.data.skip = at_home(typed, root)


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

    def accept(checkpoint: Checkpoint) -> None:
        if data is not None:
            data.load_states(checkpoint.state.lanes, checkpoint.state.fingerprint)

    if data is not None:
        _ = data.domains  # opens the shards: a missing one must not leave a run directory behind
    given = run.parent or run.stage.parent
    if given and not resume and not Path(given).exists():
        open_parent(Path(given))  # raises: a typo must not leave a run directory behind
    asked, resolved = OmegaConf.to_yaml(config), OmegaConf.to_yaml(config, resolve=True)
    directory, checkpoint = open_run(
        path, resume=resume, stage=run.stage.name, config=asked, resolved=resolved, accept=accept
    )
    log.info("run directory: %s", path)
    if checkpoint is not None:
        return directory, checkpoint, None
    # A run killed before its first checkpoint starts again from what it was given then, not from a default.
    parent = (directory.status.parent if resume else None) or given
    if parent:
        load_parent(pieces.model, parent, stage=run.stage, identity=pieces.identity)
    else:
        load_first_weights(pieces.model, run.model.weights, pieces.identity)
    return directory, None, parent


def load_pieces(run: Run, folder: Path, *, accelerator: str, threads: int) -> Pieces:
    """Model and processor of a run directory, with the weights of its newest complete checkpoint."""
    if threads:
        torch.set_num_threads(threads)
    pieces = build_pieces(run)
    checkpoint = open_parent(folder)
    check_identity(checkpoint.identity, pieces.identity, where=f"run {folder}")
    load_model_tensors(pieces.model, checkpoint.tensors, where=f"run {folder}", may_lack=checkpoint.absent)
    pieces.model.to("cuda" if accelerator == "gpu" else "cpu").eval()
    log.info("%s: stage %s, step %d", checkpoint.path, checkpoint.stage, checkpoint.step)
    return pieces


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
        "cache_root": run.data.cache_root or str(Path(run.data.root) / ".remote"),
        "on_change": run.stream.on_change,
        "max_steps": run.stage.max_steps,
        "seed": run.seed,
        "num_lanes": run.stage.batch_size,
        "micro_batch": run.stage.micro_batch,
    }


def module_arguments(run: Run, data: TrainingData) -> dict[str, Any]:
    """The seed, and the sources and domains that losses are reported for, in one order on every rank."""
    used = [name for name, source in run.data.sources.items() if source.weight != 0]
    return {"seed": run.seed, "sources": used, "domains": list(data.domains)}


def load_first_weights(model: nn.Module, files: Sequence[str], identity: Mapping[str, str]) -> None:
    """Pretrained parts, each a safetensors file of some of the model's names."""
    if not files:
        log.warning("no parent and no model.weights: training starts from random weights")
    for file in files:
        weights = open_parent(Path(file))
        check_identity(weights.identity, identity, where=f"weights {file}")
        absent = frozenset(model.state_dict()) - set(weights.tensors)
        load_model_tensors(model, weights.tensors, where=f"weights {file}", may_lack=absent)
        log.info("weights %s: %d tensors, %d names left as drawn", file, len(weights.tensors), len(absent))


def show_plan(run: Run, missing: Mapping[str, str], stream: Callable[..., Any]) -> int:
    """Says what a run would do, without weights: parameters by part, trainable counts, the mix, what is missing.

    missing: location -> line of every source that is not on disk. stream: makes the data of a processor; asked for the
    resolved mix where nothing is missing.
    """
    with torch.device("meta"):
        model: MultimodalLM = build(run.model.build, attention="sdpa")
    apply_stage(model, run.stage)
    made = [place for place in missing if _is_made(run.data, place)]
    by = f"made at first use by {run.data.prepare['_target_']}" if run.data.prepare else ""
    files = _missing_files(run)
    absent = [*(line for place, line in missing.items() if place not in made), *files]
    used = {name: source for name, source in run.data.sources.items() if source.weight != 0}
    if missing or files:
        shares = asked_shares(run.data)
        mix = [f"  {shares[n]:>12}  {n:<32} {s.domain or '-':<12} {s.path}" for n, s in used.items()]
    else:
        mix = [stream(processor=build_pieces(run, on_meta=True).processor).resolved_table(run.stage.max_steps)]
    lines = [
        f"stage {run.stage.name} at scale {run.scale}: {run.stage.max_steps:,} steps of {run.stage.batch_size} rows "
        f"of at most {run.data.max_tokens:,} positions, lr {run.stage.optimizer.lr:g}",
        "",
        parameter_table(model),
        "",
        f"mix of {len(used)} sources:",
        *mix,
        *([f"sources {by}: {len(made)}"] if made else []),
        "",
        f"missing on disk: {len(absent)}" if absent else "nothing is missing on disk",
        *(f"  {line}" for line in absent),
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


def show_summary(summary: Summary, text: str) -> int:
    """Says how a fit ended and where everything lies; returns the process's exit code."""
    if text:
        show(text)
    show(f"{summary.state} at step {summary.step}: {summary.run_dir}")
    if summary.exit_code:
        show(f"go on with the same command and resume={summary.run_dir}")
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
    if run.stage.parents and not parent:
        found.append(f"parent: stage {run.stage.name} starts from {' or '.join(run.stage.parents)}; give parent=")
    return found
