"""How the processes hold the model: each as a whole (DDP), or together in shards (FSDP2). The trainer sees no difference.

With shards a parameter, its gradient, its moments and its average are `DTensor`s; the functions here are what turns them into
plain tensors and back.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from paligemma_vla.config import TrainingConfig
from paligemma_vla.errors import ConfigError
from paligemma_vla.model.vla_model import AUTOCAST, VLAModel, backbone_layers, large_tables
from paligemma_vla.training.distributed import Distributed, init_single_process_group


class Parallel(ABC):
    """A model on its device, held as the configuration says. module: what every forward pass goes through."""

    module: nn.Module

    def __init__(self, model: VLAModel, distributed: Distributed) -> None:
        self.model, self.distributed = model, distributed

    @abstractmethod
    def enter_stage(self, train: str) -> None:
        """Choose what learns: `head` or `all`, as `VLAModel.set_stage`."""

    @abstractmethod
    def settle(self, loss: Callable[[], Tensor]) -> None:
        """Before the first step of a stage, with a loss of it. Parameters may have gradients then that mean nothing."""

    @abstractmethod
    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        """For micro-batches of a step before its last one."""

    @abstractmethod
    def forget_gathered(self) -> None:
        """After passes without a backward one, and before weights are written to: the next pass gathers them anew."""

    def leave(self) -> None:
        """Let go of whatever uses the process group, which must not end before it."""
        self.module = self.model


class Replicated(Parallel):
    """The whole model on each process; gradients are averaged while backward runs."""

    def __init__(self, model: VLAModel, distributed: Distributed) -> None:
        super().__init__(model, distributed)
        self.module = model.to_device(distributed.device)
        self._settled = True

    def enter_stage(self, train: str) -> None:
        self.model.set_stage(train)
        if self.distributed.world_size > 1:
            device = self.distributed.device
            ids = [device.index] if device.type == "cuda" else None
            self.module = DistributedDataParallel(
                self.model,
                device_ids=ids,
                gradient_as_bucket_view=True,  # gradients lie in the buckets only, instead of there and in the parameters
                broadcast_buffers=False,  # they are constants: each pass would wait for nothing
            )
            self._settled = False

    def settle(self, loss: Callable[[], Tensor]) -> None:
        # DDP puts its buckets in order after its first backward pass, and with them the order of sums: a run that goes on
        # would have another one in its first step than the run that went through.
        if not self._settled:
            (0 * loss()).backward()
            self._settled = True

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return contextlib.nullcontext()

    def forget_gathered(self) -> None:
        pass  # nothing is


class Sharded(Parallel):
    """Each process holds 1/n of every parameter (FSDP2). Layers are gathered one by one, as they are needed.

    Shards and what is summed over processes are float32. Autocast takes copies of a layer's matrices in the type that
    the device computes in, so they are gathered in it; what it leaves as it is (norms, tables) is gathered as it is.
    """

    def __init__(self, model: VLAModel, distributed: Distributed, settings: TrainingConfig, mesh: DeviceMesh) -> None:
        super().__init__(model, distributed)
        device = distributed.device
        model.cast_for(device)
        shared: dict[str, Any] = {
            "mesh": mesh,
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.cpu_offload else OffloadPolicy(),
        }
        as_held = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        computed = model.arithmetic.dtype
        as_computed = as_held if computed is torch.float32 else replace(as_held, param_dtype=computed)
        for layer in backbone_layers(model):
            if as_computed != as_held and (norms := _not_autocast(layer)):
                fully_shard(norms, mp_policy=as_held, **shared)
            fully_shard(layer, mp_policy=as_computed, **shared)
        for table in large_tables(model):
            fully_shard(table, mp_policy=as_held, **shared)
        fully_shard(model, mp_policy=as_held, **shared)
        self.module = model
        # Of a velocity that is returned as a view: nothing is written into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

    def enter_stage(self, train: str) -> None:
        # What learns at all was settled before the first pass, when FSDP looks at it: a stage only stops the gradient.
        self.model.backbone_learns = train == "all" and any(p.requires_grad for p in self.model.paligemma_vlm.parameters())

    def settle(self, loss: Callable[[], Tensor]) -> None:
        pass  # what is summed together was settled with the shards

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # each pass adds to the shards: whole gradients would be what does not fit

    def forget_gathered(self) -> None:
        cast(FSDPModule, self.model).reshard()


def _not_autocast(layer: nn.Module) -> list[nn.Module]:
    """Modules with weights that autocast leaves as they are: norms."""
    modules = [module for module in layer.modules() if not isinstance(module, AUTOCAST)]
    return [module for module in modules if next(module.parameters(recurse=False), None) is not None]


def parallelize(model: VLAModel, distributed: Distributed, settings: TrainingConfig, mesh: DeviceMesh | None) -> Parallel:
    """Bring a model to its device, held over `mesh`, or with None as a whole. Asks no other process."""
    return Replicated(model, distributed) if mesh is None else Sharded(model, distributed, settings, mesh)


def build_mesh(settings: TrainingConfig, distributed: Distributed) -> DeviceMesh | None:
    """The processes in one line (fsdp), or as (replicas, shards) (hsdp); None where each holds the whole model (ddp). Every
    process has to ask. Raises `ConfigError` where groups do not come out."""
    if settings.parallel == "ddp":
        return None
    init_single_process_group(distributed)
    kind, world = distributed.device.type, distributed.world_size
    if settings.parallel == "fsdp":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    group = group_size(settings, distributed)
    return init_device_mesh(kind, (world // group, group), mesh_dim_names=("replicate", "shard"))


def group_size(settings: TrainingConfig, distributed: Distributed) -> int:
    """How many processes hold one model together. Raises `ConfigError` where they do not come out even."""
    world = distributed.world_size
    on_machine = distributed.local_world_size
    if settings.parallel == "hsdp" and settings.shard_processes is None:
        counts = distributed.all_gather(on_machine)
        if len(set(counts)) > 1:
            raise ConfigError(
                f"training.shard_processes: got null, expected a number: the machines have {min(counts)} to {max(counts)} "
                f"processes each, so those of one machine are no group"
            )
    group = settings.processes_per_copy(world, on_machine)
    if world % group:
        raise ConfigError(
            f"training.shard_processes: got {group}, expected a divisor of the {world} processes; give one of "
            f"{', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
        )
    return group


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_local(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`: what belongs to this process. Asks no other process."""
    to_local(target).copy_(to_local(distribute_like(value, target)))


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` held as `like` is. value: held so already, or whole, and then the same on every process."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(to_local(like).device), like.device_mesh, like.placements, src_data_rank=None)
