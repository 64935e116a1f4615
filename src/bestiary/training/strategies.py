"""Where and how a run computes: Lightning strategies by name, and what differs between them inside a step.

auto, ddp: whole replicas. zero2, zero3: DeepSpeed (extra `deepspeed`), on GPUs and, for tests, on CPUs. fsdp2: sharded
parameters through Lightning's ModelParallelStrategy. Every strategy averages gradients over ranks; the step undoes it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, HalfPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bestiary.config import Cluster

_NO_CLIPPING = float("inf")
ZERO_BUCKET = 200_000_000
"""Elements of a bucket in which ZeRO's gradients travel, as Monkey's published json has it (reference/monkey.md 3.1);
DeepSpeed's own default takes two and a half times the memory."""


class WholeBatches(HalfPrecision):
    """Half-precision weights; batches stay as they are (ids and pixels are integers, coordinates need float32)."""

    def convert_input(self, data: Any) -> Any:
        """The batch, untouched."""
        return data


class WholeBatchesDeepSpeed(DeepSpeedPrecision):
    """DeepSpeed's precision; batches stay as they are."""

    def convert_input(self, data: Any) -> Any:
        """The batch, untouched."""
        return data


class AnywhereDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed that also runs on CPUs, where Lightning's own refuses; used by tests and small machines."""

    def setup_environment(self) -> None:
        """Skip the check for CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Set ranks and join the process group without the check of CUDA device numbers."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The rank's device; CPUs carry the index 0, which DeepSpeed compares."""
        assert self.parallel_devices is not None
        device = self.parallel_devices[self.local_rank]
        return torch.device("cpu", 0) if device.type == "cpu" else device


def check_machine(cluster: Cluster) -> None:
    """Raises where this machine cannot do what the cluster asks for; called before a run directory is made or changed.

    Only looks: no process group is made and no setting touched.
    """
    check_launch(cluster)
    if cluster.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("cluster.accelerator=gpu but torch sees no GPU; use cluster=cpu")
    if cluster.strategy.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(f"cluster.strategy={cluster.strategy} needs DeepSpeed: pip install 'bestiary[deepspeed]'")
        if cluster.accelerator != "gpu" and cluster.precision.startswith("16"):
            raise ValueError(
                f"cluster.precision={cluster.precision} is not possible with DeepSpeed on CPUs; take bf16-mixed"
            )


def check_launch(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> None:
    """Several processes must have been started by torchrun or SLURM, not by this process.

    (Lightning's own launcher repeats the command line in sub-processes, which under Hydra composes a second run.)
    """
    wanted = cluster.devices * cluster.nodes
    started = int(environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS") or 1)
    if wanted > 1 and started != wanted:
        raise ValueError(
            f"cluster asks for {cluster.nodes} x {cluster.devices} processes but {started} was started; launch with "
            f"`torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.devices} train.py ...` or through SLURM"
        )


def build_strategy(cluster: Cluster, *, clip_norm: float) -> Strategy | str:
    """The Lightning strategy of `cluster.strategy`, which `check_machine` let pass."""
    world = cluster.devices * cluster.nodes
    backend = "nccl" if cluster.accelerator == "gpu" else "gloo"
    if world > 1:
        atexit.register(_leave)
    match cluster.strategy:
        case "auto" | "ddp" if world == 1:
            return "auto"
        case "auto" | "ddp":
            return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
        case "zero2" | "zero3":
            return _deepspeed(int(cluster.strategy[-1]), backend, clip_norm)
        case "fsdp2":
            return ModelParallelStrategy(
                data_parallel_size=world, tensor_parallel_size=1, process_group_backend=backend
            )
        case other:
            raise ValueError(f"cluster.strategy={other} is not one of auto, ddp, zero2, zero3, fsdp2")


def _leave() -> None:
    """Take the process group down before the interpreter ends: a thread of gloo's that outlives it aborts the process.

    Lightning does so for nccl alone.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def precision_plugin(cluster: Cluster) -> Precision | None:
    """A plugin where Lightning's own would rewrite batches; None leaves the choice to Lightning."""
    precision = cast(Any, cluster.precision)
    if cluster.strategy.startswith("zero"):
        return WholeBatchesDeepSpeed(precision)
    if precision in ("bf16-true", "16-true"):
        return WholeBatches(precision)
    return None


def environment_plugin() -> SLURMEnvironment | None:
    """SLURM without Lightning's own requeueing (our signals write the checkpoint); None outside SLURM."""
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


def _deepspeed(stage: int, backend: str, clip_norm: float) -> Strategy:
    if backend == "gloo":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": backend == "nccl",
            "contiguous_gradients": True,
            "reduce_bucket_size": ZERO_BUCKET,
            "allgather_bucket_size": ZERO_BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip_norm,
        "train_micro_batch_size_per_gpu": 1,
    }
    return AnywhereDeepSpeed(config=config, process_group_backend=backend)


def is_zero(strategy: Strategy) -> bool:
    """True under DeepSpeed, whose engine holds gradients, clips them and steps."""
    return isinstance(strategy, DeepSpeedStrategy)


def zero_optimizer(strategy: Strategy) -> Any:
    """DeepSpeed's optimiser, None under other strategies."""
    return cast(Any, strategy.model).optimizer if is_zero(strategy) else None


def is_sharded(strategy: Strategy) -> bool:
    """True where a forward needs every rank (parameters are gathered on use)."""
    if isinstance(strategy, DeepSpeedStrategy):
        return bool(cast(Any, strategy).zero_stage_3)
    return isinstance(strategy, ModelParallelStrategy)


def shard_for_strategy(strategy: Strategy, model: nn.Module) -> None:
    """FSDP2: one shard group per decoder block, one for the rest. Nothing under other strategies."""
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    mesh = strategy.device_mesh["data_parallel"]
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and any(p.requires_grad for p in module.parameters()):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def call_model(strategy: Strategy, model: nn.Module, batch: Any) -> Any:
    """The model's forward; under ZeRO past the outermost hooks, which only understand dicts and open objects.

    (The model itself owns no parameter; its parts are called as modules and keep their hooks.) The engine's forward is
    the whole step, so it does not see the micro-batches: unless told here, ZeRO-3 keeps only the last one's gradients.
    """
    if not is_zero(strategy):
        return model(batch)
    zero_optimizer(strategy).clear_backward_seen_flag()
    return model.forward(batch)


@contextlib.contextmanager
def accumulating(strategy: Strategy, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around a backward: gradients travel between ranks only on a step's last micro-batch."""
    wrapped = strategy.model
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if isinstance(strategy, ModelParallelStrategy):
        cast(Any, model).set_requires_gradient_sync(last)
    elif is_zero(strategy):
        cast(Any, wrapped).set_gradient_accumulation_boundary(last)
    yield


def clip_gradients(strategy: Strategy, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor | None:
    """Clip by the global norm (0 = not at all); returns the norm before, None where the engine clips itself."""
    if is_zero(strategy):
        return None
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or _NO_CLIPPING)
    return cast(torch.Tensor, cast(Any, norm).full_tensor()) if hasattr(norm, "full_tensor") else norm


def norm_after_step(strategy: Strategy) -> torch.Tensor:
    """The gradient norm that DeepSpeed's engine computed in its step."""
    norm = cast(Any, strategy.model).get_global_grad_norm()
    return torch.as_tensor(float("nan") if norm is None else norm, device=strategy.root_device)
