"""Trains one stage: pieces in, a finished (or resumable) run directory out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bestiary.config import Cluster, Logger, Tuning
from bestiary.language.tuning import plain_name
from bestiary.saved_tuning import frozen_dtype
from bestiary.saved_weights import CheckpointError, check_identity
from bestiary.training.callbacks.evaluating import Evaluate, Evaluating
from bestiary.training.callbacks.progress import ProgressView
from bestiary.training.callbacks.recording import Listener, Recorder, StepClock
from bestiary.training.callbacks.saving import Saving
from bestiary.training.callbacks.wandb_watch import WandbWatch
from bestiary.training.checkpoints import Checkpoint, TrainState
from bestiary.training.flops import estimate
from bestiary.training.mix import notes_of, write_changes, write_mix
from bestiary.training.model_state import load_model_tensors
from bestiary.training.module import MLLMModule
from bestiary.training.report import Totals
from bestiary.training.resuming import launched_rank
from bestiary.training.run_dir import RunDir
from bestiary.training.signals import StopRequests, exit_code
from bestiary.training.stages import cast_frozen
from bestiary.training.strategies import build_strategy, check_machine, environment_plugin, precision_plugin

log = logging.getLogger(__name__)

InWords = Callable[[BaseException], BaseException | None]


class TrainingData(Protocol):
    """What a stream's LightningDataModule offers beside its loader of `list[Batch]`.

    on_change: what to do where the stream is not the one that was saved: refuse, remix or restart.
    """

    on_change: str

    @property
    def domains(self) -> Sequence[str]:
        """All domains of its sources, in one order on every rank."""

    def fingerprint(self) -> Mapping[str, Any]:
        """JSON-like facts that shape the sequence of rows."""

    def load_states(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> int:
        """Go on after these states (lane -> bytes, all lanes); returns the next step.

        A stream of another fingerprint is treated as its policy says: refused, mixed anew, or begun again.
        """

    def explain_change(self, states: Mapping[int, bytes], fingerprint: Mapping[str, Any]) -> list[str]:
        """What `load_states` will change in the sequence of rows, one line each; nothing for the same stream."""

    def shares(self, step: int) -> Mapping[str, float]:
        """The resolved share of every source at a step, from 0, in the unit of the mix."""

    def losses(self, states: Sequence[bytes]) -> list[str]:
        """What was left out up to these states, one line each."""

    def check_damage(self, states: Sequence[bytes]) -> None:
        """ValueError where too much was left out up to these states, those of all lanes."""

    def fetched(self) -> Mapping[str, int]:
        """What reading remote data has cost this rank's processes so far; {} where all data is local."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a fit ended. metrics, table: the last evaluation's. exit_code: for the process (0, 130, 143)."""

    state: str
    step: int
    exit_code: int
    run_dir: Path
    checkpoint: Path | None
    metrics: dict[str, Any] = field(default_factory=dict)
    table: str = ""


@dataclass(slots=True)
class _Watchers:
    """The callbacks of one fit, in their order."""

    recorder: Recorder
    saving: Saving
    evaluating: Evaluating | None
    wandb: WandbWatch | None

    def callbacks(self) -> list[Callback]:
        parts: list[Callback | None] = [self.recorder, self.saving, self.evaluating]
        return [part for part in parts if part is not None]


def fit(
    module: MLLMModule,
    data: LightningDataModule,
    *,
    run: RunDir,
    cluster: Cluster,
    logger: Logger | None = None,
    checkpoint: Checkpoint | None = None,
    identity: Mapping[str, str] | None = None,
    parent: str | None = None,
    evaluate: Evaluate | None = None,
    config: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
    base: Collection[str] = (),
    in_words: InWords = lambda error: None,
) -> Summary:
    """Train `module` to the end of its stage; a signal ends it early with a checkpoint to resume from.

    checkpoint: where to go on (`resuming.open_run`). identity: what weights depend on (sha256 of the tokenizer ...).
    parent: what the weights started from, for status.json. evaluate: see `callbacks.evaluating`. config: for wandb.
    tuning: how frozen parameters are held. base: plain names that checkpoints leave out, because files have them.
    in_words: what to raise in place of an error that tells a person nothing; None leaves it.
    """
    logger = logger or Logger(wandb=False, progress=False)
    prepare_machine(cluster)
    stage, is_writer = module.stage, launched_rank() == 0
    stream, totals = cast(TrainingData, data), checkpoint.state.totals if checkpoint else Totals()
    changes = restore(module, data, checkpoint, identity or {}) if checkpoint is not None else []
    state = _first_state(module, data, identity or {}, config or {}, cluster)
    if is_writer:
        write_changes(run, module.step, changes, totals)
        run.update(
            state="running", stage=stage.name, max_steps=stage.max_steps, **({"parent": parent} if parent else {})
        )
    requests = StopRequests(lambda: run.update(state="interrupted") if is_writer else None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(requests)
        listeners: list[Listener] = []
        if is_writer and logger.progress:
            view = ProgressView(name=stage.name, start=module.step, max_steps=stage.max_steps)
            listeners.append(stack.enter_context(view))
        wandb = _wandb(run, module, stream, logger, config or {}) if is_writer and logger.wandb else None
        listeners += [wandb] if wandb else []
        clock = StepClock()
        recorder = Recorder(
            run,
            clock,
            totals,
            estimate(module.model),
            precision=cluster.precision,
            listeners=listeners,
            fetched=stream.fetched,
        )
        saving = Saving(
            run,
            clock,
            recorder,
            state,
            requests,
            every=stage.checkpoint_every,
            keep=stage.keep_checkpoints,
            max_steps=stage.max_steps,
            resumed=checkpoint,
            base=base,
            left_out=stream.losses,
            check_damage=stream.check_damage,
        )
        evaluating = None
        if evaluate is not None:
            show = wandb.log_evaluation if wandb else None
            evaluating = Evaluating(
                evaluate,
                run,
                clock,
                every=stage.eval_every,
                max_steps=stage.max_steps,
                at_start=stage.eval_at_start,
                on_result=show,
            )
        settings = (config or {}).get("data", {})
        if is_writer:
            write_mix(run, module.step, totals, stream.shares, settings)
        frozen = frozen_dtype(tuning or Tuning(), cluster)
        if frozen is not None:
            cast_frozen(module.model, frozen)
        summary = _run(module, data, run, cluster, _Watchers(recorder, saving, evaluating, wandb), requests, in_words)
        if is_writer:
            write_mix(run, module.step, totals, stream.shares, settings)
        return summary


def restore(
    module: MLLMModule, data: LightningDataModule, checkpoint: Checkpoint, identity: Mapping[str, str]
) -> list[str]:
    """Put weights, stream and step counter back; moments follow when the optimiser exists.

    Returns what changes in the stream, one line each.
    """
    stream = cast(TrainingData, data)
    check_identity(checkpoint.state.identity, identity, where=f"checkpoint {checkpoint.path}")
    left_out = set(checkpoint.state.absent)
    absent = frozenset(name for name in module.model.state_dict() if plain_name(name) in left_out)
    load_model_tensors(module.model, checkpoint.model(), where=f"checkpoint {checkpoint.path}", may_lack=absent)
    changes = stream.explain_change(checkpoint.state.lanes, checkpoint.state.fingerprint)
    step = stream.load_states(checkpoint.state.lanes, checkpoint.state.fingerprint)
    if step != checkpoint.state.step:
        raise CheckpointError(f"{checkpoint.path} is of step {checkpoint.state.step} but its lanes are at step {step}")
    module.step = step
    log.info("resuming at step %d from %s", module.step, checkpoint.path)
    return changes


def prepare_machine(cluster: Cluster) -> None:
    """Threads, after a look whether the machine has what the cluster asks for."""
    check_machine(cluster)
    if cluster.threads:
        torch.set_num_threads(cluster.threads)


def build_trainer(cluster: Cluster, *, steps: int, clip_norm: float, callbacks: list[Callback]) -> Trainer:
    """A Trainer reduced to the loop and the strategy; files, logs and screens are our callbacks'."""
    precision = precision_plugin(cluster)
    plugins: list[Any] = [plugin for plugin in (precision, environment_plugin()) if plugin is not None]
    return Trainer(
        accelerator=cluster.accelerator,
        devices=cluster.devices,
        num_nodes=cluster.nodes,
        strategy=build_strategy(cluster, clip_norm=clip_norm),
        precision=None if precision else cast(Any, cluster.precision),
        plugins=plugins or None,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _run(
    module: MLLMModule,
    data: LightningDataModule,
    run: RunDir,
    cluster: Cluster,
    watchers: _Watchers,
    requests: StopRequests,
    in_words: InWords,
) -> Summary:
    """The fit itself, and a true status.json whatever happens."""
    max_steps, is_writer = module.stage.max_steps, launched_rank() == 0
    code = 1
    try:
        if module.step < max_steps:
            with _quiet_lightning():
                trainer = build_trainer(
                    cluster,
                    steps=max_steps - module.step,
                    clip_norm=module.stage.clip_norm,
                    callbacks=watchers.callbacks(),
                )
                trainer.fit(module, datamodule=data)
        elif watchers.evaluating is not None and is_writer:
            _evaluate_only(module, watchers.evaluating)
        state, code = _ending(module, watchers.saving, max_steps)
    except SIGTERMException:
        state, code = "interrupted", exit_code(requests.counts())
    except BaseException as raised:
        error = in_words(raised) or raised
        if is_writer:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            run.update(state="failed", step=module.step, error=line)
        if error is raised:
            raise
        raise error from raised
    finally:
        if watchers.wandb is not None:
            watchers.wandb.finish(code)
        run.unlock()
    if is_writer:
        run.update(state=state, step=module.step)
        for line in cast(TrainingData, data).losses(watchers.saving.lanes):
            log.warning("left out: %s", line)
    found = (watchers.evaluating.results, watchers.evaluating.table) if watchers.evaluating else ()
    return Summary(state, module.step, code, run.path, watchers.saving.last, *found)


def _ending(module: MLLMModule, saving: Saving, max_steps: int) -> tuple[str, int]:
    """State and exit code of a fit that returned."""
    if any(saving.stopped_by):
        return "interrupted", exit_code(saving.stopped_by)
    if module.step < max_steps:
        raise RuntimeError(f"the loader ended at step {module.step} of {max_steps}; a stream must not end")
    return "finished", 0


def _evaluate_only(module: MLLMModule, evaluating: Evaluating) -> None:
    """A run that was stopped between its last checkpoint and its last score."""
    log.info("all %d steps are done; evaluating only", module.step)
    module.model.eval()
    evaluating.record(module.step, evaluating.evaluate(module.step))


def _first_state(
    module: MLLMModule,
    data: LightningDataModule,
    identity: Mapping[str, str],
    config: Mapping[str, Any],
    cluster: Cluster,
) -> TrainState:
    """What every checkpoint of this run repeats."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return TrainState(
        step=0,
        stage=module.stage.name,
        seed=module.seed,
        fingerprint=dict(cast(TrainingData, data).fingerprint()),
        identity=dict(identity),
        config_sha256=digest,
        world_size=cluster.devices * cluster.nodes,
    )


def _wandb(
    run: RunDir, module: MLLMModule, stream: TrainingData, logger: Logger, config: Mapping[str, Any]
) -> WandbWatch:
    return WandbWatch(
        run,
        project=logger.project,
        group=logger.group or module.stage.name,
        job_type=module.stage.name,
        config=config,
        log_every=module.stage.log_every,
        asked=stream.shares,
        notes=notes_of(run),
    )


@contextlib.contextmanager
def _quiet_lightning() -> Any:
    """Leave out Lightning's banners and its advice on loaders that are not its own kind."""
    names = (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.accelerators.cuda",
    )
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for kind in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind, module="lightning.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
