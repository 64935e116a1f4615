"""The typed configuration: every key a YAML file or the command line may set, and the checks that cross keys.

Hydra composes YAML into `Run` (registered as the first entry of the defaults list), so an unknown key fails at
composition. The parts of a model, the benchmarks and the data preparation are `_target_` nodes: their keys are checked
against the signature of what they name (`bestiary.compose.check_targets`). Below train.py nobody sees a DictConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Optimizer:
    """AdamW. `no_decay` are globs of parameter names without weight decay."""

    lr: float = MISSING
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: list[str] = field(default_factory=lambda: ["*.bias", "*norm.weight"])
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Glob of parameter names -> factor on lr."""


@dataclass
class Schedule:
    """Linear warm-up from 0, then half a cosine down to `min_lr` at the end of the stage; or another `shape`."""

    warmup: float = 0.0
    """Share of the stage, [0, 1)."""
    min_lr: float = 0.0
    shape: str = "cosine"
    """cosine | log_then_constant (the logarithm of the step over the warm-up, then the rate for good)"""


@dataclass
class Stage:
    """What trains, how long, on which batches."""

    name: str = MISSING
    parents: list[str] = field(default_factory=list)
    """Names of the stages whose checkpoint this stage may start from."""
    parent_optional: bool = False
    """Whether the stage may also start from `model.weights` alone."""
    parent_may_lack: list[str] = field(default_factory=list)
    """Globs of tensors a parent of another model may lack, all of a glob together; they come from `model.weights`."""
    parent: str | None = None
    """Taken when the command names none: a run directory or a file; null = start from `model.weights`."""
    train: list[str] = field(default_factory=lambda: ["*"])
    """Globs of parameter names that train. A glob that matches nothing raises."""
    freeze: list[str] = field(default_factory=list)
    """Globs taken out of `train` again."""
    max_steps: int = MISSING
    batch_size: int = MISSING
    """Global rows per optimiser step = lanes."""
    micro_batch: int = 0
    """Rows per forward on one device; 0 = all of the device's rows."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 0.0
    """Global gradient norm; 0 = no clipping."""
    checkpoint_every: int = 0
    """Steps; 0 = only at the end (and at a signal)."""
    keep_checkpoints: int = 2
    eval_every: int = 0
    """Steps between evaluations; 0 = only at the end."""
    eval_at_start: bool = False
    """Score before the first step too: what the parent could do already."""
    log_every: int = 1
    activation_checkpointing: bool = False


@dataclass
class Source:
    """One data set: shards, where they come from, and its share of the mix."""

    path: str = MISSING
    """Folder of shards, relative to `data.root` unless absolute."""
    domain: str | None = None
    """The domain of all its samples; null = whatever its shards say of each (pictures and text in one folder)."""
    weight: float | None = None
    """Share on any scale; 0 leaves the source out. At most one of weight, count, repeat; none of them = weight 1."""
    count: float | None = None
    """Share as a number of samples: drawn so many times for every `count` of the others."""
    repeat: float | None = None
    """Share as passes: proportional to repeat times the number of samples."""
    max_epochs: float | None = None
    """The share is cut so that at most so many passes are expected over `stage.max_steps`."""
    schedule: list[Any] = field(default_factory=list)
    """[step, weight] points: linear in between, constant before and after; empty = a constant share."""
    loss_weight: float = 1.0
    """Factor on the loss of every token of this source."""
    format: str = "bestiary"
    """bestiary | caption | llava: what the members of a foreign tar mean."""
    kind: str | None = None
    """Its group with `data.order=grouped` (SPHINX's `type`); null = image_text or text, by each sample's pictures."""
    chunk: int | None = None
    """Consecutive samples that stay together; null = `data.chunk`."""
    licence: str = ""
    origin: str = ""
    """Where the annotations and pictures are published."""
    make: str = ""
    """The command that writes its shards; said where they are missing."""


@dataclass
class Data:
    """The stream: sources, their mix, the budgets of a row (data_modules keeps the promises)."""

    root: str = "${cluster.data_root}"
    prepare: dict[str, Any] | None = None
    """`_target_` called with `root=` before the sources are opened: makes what is missing."""
    sources: dict[str, Source] = field(default_factory=dict)
    heldout: dict[str, Source] = field(default_factory=dict)
    """Sources the benchmarks read."""
    max_tokens: int = MISSING
    """Positions of the longest sample (images, prompts and text), and of a row."""
    row_tokens: int = 0
    """Positions of a packed row where it is to hold more than the longest sample; 0 = max_tokens."""
    max_views: int = 0
    """Views of a row; 0 = no second budget."""
    packing: bool = True
    look_ahead: int = 16
    chunk: int = 1
    too_long: str = "error"
    """error | skip | truncate_text"""
    num_workers: int = 0
    """Processes that decode; more of them than a rank has lanes become threads of its processes."""
    bad_budget: float = 0.01
    """Share of damaged samples beyond which the run stops."""
    augment: bool = True
    unit: str = "samples"
    """samples | tokens | target_tokens: what the shares of the mix are shares of."""
    temperature: float = 1.0
    """Shares are raised to 1/temperature: 1 leaves them, large values make them equal."""
    order: str = "stratified"
    """stratified (by shares, a promise for every prefix) | grouped (SPHINX's published order: every sample once an
    epoch, a global batch of one kind and similar length; `packing=false`, no shares)"""
    skip: str | None = None
    """A file of `source<tab>key` lines: samples that are never drawn."""
    cache_root: str | None = None
    """Folder of what is fetched from URLs; null = `.remote` below `data.root`."""
    cache_gb: float = 20.0
    """Gibibytes the cache may hold; the least recently used goes first."""


@dataclass
class StreamPolicy:
    """What a resume does when the stream is not the one that was saved."""

    on_change: str = "refuse"
    """refuse | remix (sources come, go, change their weight; the rest goes on) | restart (the data begins again)"""


@dataclass
class Model:
    """One MLLM variant: `_target_` nodes of its builder, its processor and its LightningModule."""

    name: str = MISSING
    build: dict[str, Any] = MISSING
    processor: dict[str, Any] = MISSING
    module: dict[str, Any] = MISSING
    weights: list[str] = field(default_factory=list)
    """Weights loaded before training without a parent (pretrained parts): safetensors files, or folders as `bestiary
    weights import` makes them; relative to the project."""
    decoder_weights: str | None = None
    """The language model's own weights, named by the choice of `decoder`; an entry of `weights` refers to it."""
    unused_weights: list[str] = field(default_factory=list)
    """Globs of names in `weights` that this model has no part for; any other name it lacks raises."""


@dataclass
class Tuning:
    """How much of the decoder trains, and how what rests is held; every other part trains as the stage says."""

    method: str = "full"
    """full | lora (adapters; the stage's `decoder.*` globs mean them) | bias_norm (norms and biases of the decoder)"""
    rank: int = 0
    """Of the adapters' matrices."""
    alpha: float = 0.0
    """The adapters' products count alpha / rank times."""
    dropout: float = 0.0
    """On the adapters' inputs, [0, 1)."""
    targets: list[str] = field(default_factory=list)
    """Linear layers that take adapters: globs of their names, or their last names alone (q_proj)."""
    beside: list[str] = field(default_factory=list)
    """Globs of parameters of the decoder that train themselves beside the adapters."""
    quantize: str = "none"
    """none | nf4 | int8: linear layers of the decoder whose weights do not train (bitsandbytes)."""
    frozen_dtype: str | None = None
    """float32 | bfloat16 of what does not train; null = bfloat16 under bf16-mixed on GPUs, else float32."""


@dataclass
class Cluster:
    """Where it runs."""

    accelerator: str = "cpu"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    """auto | ddp | zero2 | zero3 | fsdp2"""
    precision: str = "32-true"
    memory_gb: float = 0.0
    """Gibibytes of one device (24 for a GPU of "24 GB"), with which a dry run compares its estimate; 0 = unknown."""
    threads: int = 0
    """torch threads of a process; 0 = torch's own choice."""
    data_root: str = ".cache/data"
    """Folder of all shards, relative to the project unless absolute."""
    weights_root: str = "weights"
    """Folder of published weights, relative to the project unless absolute."""
    runs_root: str = "runs"


@dataclass
class Logger:
    """Who watches besides the run directory."""

    wandb: bool = True
    """Writes a wandb run; offline unless logged in."""
    project: str = "bestiary"
    group: str | None = None
    """wandb group; null = the sweep's folder in a sweep, else the stage's name."""
    progress: bool = True


@dataclass
class Run:
    """Everything a run is asked to be."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    stream: StreamPolicy = field(default_factory=StreamPolicy)
    stage: Stage = field(default_factory=Stage)
    tuning: Tuning = field(default_factory=Tuning)
    cluster: Cluster = field(default_factory=Cluster)
    logger: Logger = field(default_factory=Logger)
    suite: dict[str, Any] = field(default_factory=dict)
    """Benchmarks by name, each a `_target_` node."""
    scale: str = "demo"
    seed: int = 0
    run_dir: str | None = None
    """null = <runs_root>/<stage>/<time>; in a sweep the job's folder."""
    resume: str | None = None
    """A run directory, or `auto`: the newest unfinished run of this stage below runs_root."""
    parent: str | None = None
    """A run directory, a checkpoint folder or a safetensors file to start from; null = stage.parent."""
    dry_run: bool = False
    attention: str = "auto"
    """auto | sdpa | varlen | flash_attn"""


@dataclass
class EvaluationData:
    """What a suite's benchmarks bring."""

    heldout: dict[str, Source] = field(default_factory=dict)
    """Held-out sources beside those of the run, below `root`."""
    root: str | None = None
    """null = the run's `data.root`; for weights without a run that of a cluster"""


@dataclass
class Every:
    """Set in every benchmark of the suite; null leaves what each of them says."""

    max_samples: int | None = None
    batch_size: int | None = None
    decoding: str | None = None
    reference_quirks: bool | None = None
    control: bool | None = None


@dataclass
class Evaluation:
    """What eval.py may be told."""

    run: str = MISSING
    """A run directory, whose newest complete checkpoint is scored; or weights without a run: an imported folder, with
    `model` also a published folder or a safetensors file."""
    model: str | None = None
    """Of weights without a run: a name in conf/model, or a yaml with a model node; null = the model.yaml there."""
    scale: str | None = None
    """Of that name; null = paper."""
    suite: dict[str, Any] = field(default_factory=dict)
    every: Every = field(default_factory=Every)
    data: EvaluationData = field(default_factory=EvaluationData)
    accelerator: str = "cpu"
    """cpu | gpu"""
    threads: int = 0


def check_run(run: Run) -> None:
    """Raises ValueError for values that contradict one another or lie outside their range."""
    stage, data, cluster = run.stage, run.data, run.cluster
    _positive("stage.max_steps", stage.max_steps)
    _positive("stage.batch_size", stage.batch_size)
    _positive("data.max_tokens", data.max_tokens)
    _positive("cluster.devices", cluster.devices)
    _one_of("attention", run.attention, ("auto", "sdpa", "varlen", "flash_attn"))
    _one_of("data.too_long", data.too_long, ("error", "skip", "truncate_text"))
    _one_of("data.order", data.order, ("stratified", "grouped"))
    _one_of("data.unit", data.unit, ("samples", "tokens", "target_tokens"))
    _one_of("stream.on_change", run.stream.on_change, ("refuse", "remix", "restart"))
    _one_of("cluster.strategy", cluster.strategy, ("auto", "ddp", "zero2", "zero3", "fsdp2"))
    _one_of("cluster.accelerator", cluster.accelerator, ("cpu", "gpu"))
    _check_tuning(run.tuning, cluster)
    world = cluster.devices * cluster.nodes
    if stage.batch_size % world:
        raise ValueError(
            f"stage.batch_size={stage.batch_size} rows cannot be dealt evenly to {world} processes "
            f"(cluster.devices={cluster.devices} x cluster.nodes={cluster.nodes}); make it a multiple of {world}"
        )
    if not 0 <= stage.schedule.warmup < 1:
        raise ValueError(f"stage.schedule.warmup={stage.schedule.warmup} is a share of the stage: give 0 <= value < 1")
    _one_of("stage.schedule.shape", stage.schedule.shape, ("cosine", "log_then_constant"))
    if stage.schedule.shape != "cosine" and stage.schedule.min_lr:
        raise ValueError(
            f"stage.schedule.min_lr={stage.schedule.min_lr:g} has no effect with stage.schedule.shape="
            f"{stage.schedule.shape}, which never falls; set it to 0, or take shape=cosine"
        )
    if not 0 <= data.bad_budget <= 1:
        raise ValueError(f"data.bad_budget={data.bad_budget} is a share of the samples: give 0 <= value <= 1")
    if data.row_tokens and not data.packing:
        raise ValueError(
            f"data.row_tokens={data.row_tokens} has no effect with data.packing=false; leave one of them out"
        )
    if data.row_tokens and data.row_tokens < data.max_tokens:
        raise ValueError(
            f"data.row_tokens={data.row_tokens}: a row must hold the longest sample; give at least "
            f"data.max_tokens={data.max_tokens}, or leave it out"
        )
    if not data.sources:
        raise ValueError("data.sources is empty; choose a data_mix, for example data_mix=sphinxv_stage2")
    for name, source in data.sources.items():
        if source.weight is not None and source.weight < 0:
            raise ValueError(f"data.sources.{name}.weight={source.weight} is negative; 0 leaves the source out")
    if all(source.weight == 0 for source in data.sources.values()):
        raise ValueError("data.sources: every source has weight 0, which leaves it out; give one of them a share")
    if run.resume and run.parent:
        raise ValueError(
            f"resume={run.resume} continues a run, parent={run.parent} starts a new one from its weights; "
            "give one of them"
        )


def _check_tuning(tuning: Tuning, cluster: Cluster) -> None:
    _one_of("tuning.method", tuning.method, ("full", "lora", "bias_norm"))
    _one_of("tuning.quantize", tuning.quantize, ("none", "nf4", "int8"))
    if tuning.frozen_dtype is not None:
        _one_of("tuning.frozen_dtype", tuning.frozen_dtype, ("float32", "bfloat16"))
    if tuning.quantize != "none" and cluster.strategy not in ("auto", "ddp"):
        raise ValueError(
            f"tuning.quantize={tuning.quantize} cannot be sharded by cluster.strategy={cluster.strategy}; "
            "take auto or ddp, or tuning.quantize=none"
        )
    if tuning.method != "lora":
        for name in ("rank", "alpha", "dropout", "targets", "beside"):
            if getattr(tuning, name):
                raise ValueError(
                    f"tuning.{name}={getattr(tuning, name)} has no effect with tuning.method={tuning.method}; "
                    "take tuning=lora, or leave it out"
                )
        return
    _positive("tuning.rank", tuning.rank)
    if tuning.alpha <= 0:
        raise ValueError(f"tuning.alpha={tuning.alpha} must be positive; alpha equal to the rank is scale 1")
    if not 0 <= tuning.dropout < 1:
        raise ValueError(f"tuning.dropout={tuning.dropout} is a probability: give 0 <= value < 1")
    if not tuning.targets:
        raise ValueError("tuning.targets is empty, so no layer takes an adapter; name some, as [q_proj, v_proj]")


def _positive(name: str, value: int) -> None:
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value} is not one of {', '.join(choices)}")
