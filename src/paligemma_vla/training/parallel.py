"""How the processes divide the model: a copy on each (DDP), or shards of one (FSDP2). The trainer sees no difference.

In shards a parameter, its gradient, its moments and its average are `DTensor`s; the functions at the end turn them into plain
tensors and back.
"""

from __future__ import annotations

import contextlib
import warnings
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
from paligemma_vla.model.vla_model import AUTOCAST, VLAModel, backbone_layers, large_tables
from paligemma_vla.training.distributed import Distributed, init_single_process_group


class Parallel:
    """A model on its device, divided as the configuration says. module: what every forward pass goes through."""

    module: nn.Module

    def __init__(self, model: VLAModel, distributed: Distributed) -> None:
        self.model, self.distributed = model, distributed

    def enter_stage(self, train: str) -> None:
        """Choose what learns: `head` or `all`, as `VLAModel.set_stage`."""
        raise NotImplementedError

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        """Before each step, with a loss of it: leaves gradients that mean nothing in the first step of a stage."""

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        """For all micro-batches of a step but its last."""
        # Sharded, each backward pass adds to the shards: full gradients would not fit.
        return contextlib.nullcontext()

    def reshard(self) -> None:
        """Free gathered weights: after forward passes alone, and after weights are overwritten."""

    def release(self) -> None:
        """Drop whatever uses the process group, which must not be destroyed before."""
        self.module = self.model


class Replicated(Parallel):
    """A copy of the model on each process; gradients are averaged during the backward pass."""

    def __init__(self, model: VLAModel, distributed: Distributed) -> None:
        super().__init__(model, distributed)
        self.module = model.to_device(distributed.device)
        self._warm = True

    def enter_stage(self, train: str) -> None:
        self.model.set_stage(train)
        if self.distributed.world_size > 1:
            device = self.distributed.device
            with warnings.catch_warnings():  # torch 2.13 prefers a new name for one of these, which 2.11 does not know yet
                warnings.simplefilter("ignore", FutureWarning)
                self.module = DistributedDataParallel(
                    self.model,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    gradient_as_bucket_view=True,  # gradients are stored once, in the buckets
                    broadcast_buffers=False,  # they are constants
                )
            self._warm = False

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        # DDP orders its buckets after its first backward pass, and with them the order of sums: the first step of a resumed
        # run would sum in another order than the same step of an uninterrupted one.
        if not self._warm:
            (0 * loss()).backward()
            self._warm = True

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else contextlib.nullcontext()


class Sharded(Parallel):
    """Each process keeps 1/n of every parameter (FSDP2). Layers are gathered one by one, as they are needed.

    Shards and sums over processes are float32. Autocast copies a layer's matrices into the type that the device computes in, so
    they are gathered in that type; norms and tables, which it leaves as they are, are gathered in float32.
    """

    def __init__(self, model: VLAModel, distributed: Distributed, settings: TrainingConfig, mesh: DeviceMesh) -> None:
        super().__init__(model, distributed)
        device = distributed.device
        model.cast_for(device)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
        stored = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        dtype = model.dtype
        computed = stored if dtype is torch.float32 else replace(stored, param_dtype=dtype)

        def shard(module: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy) -> None:
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)

        for layer in backbone_layers(model):
            if computed != stored and (norms := _not_autocast(layer)):
                shard(norms, stored)
            shard(layer, computed)
        for module in [*large_tables(model), model]:
            shard(module, stored)
        self.module = model
        # It warns of a velocity that is returned as a view; nothing is written into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

    def enter_stage(self, train: str) -> None:
        # FSDP reads requires_grad once, at the first pass: a stage only stops the gradient before the backbone.
        self.model.backbone_learns = train == "all" and any(p.requires_grad for p in self.model.paligemma_vlm.parameters())

    def reshard(self) -> None:
        cast(FSDPModule, self.model).reshard()


def _not_autocast(layer: nn.Module) -> list[nn.Module]:
    """Modules with weights that autocast leaves as they are: norms."""
    modules = [module for module in layer.modules() if not isinstance(module, AUTOCAST)]
    return [module for module in modules if next(module.parameters(recurse=False), None) is not None]


def parallelize(model: VLAModel, distributed: Distributed, settings: TrainingConfig, mesh: DeviceMesh | None) -> Parallel:
    """Bring a model to its device: sharded over `mesh`, or a full copy. Calls no collective."""
    return Replicated(model, distributed) if mesh is None else Sharded(model, distributed, settings, mesh)


def build_mesh(settings: TrainingConfig, distributed: Distributed) -> DeviceMesh | None:
    """The processes in one line (fsdp), or as (replicas, shards) (hsdp); None for ddp. A collective."""
    if settings.parallel == "ddp":
        return None
    init_single_process_group(distributed)
    kind, world = distributed.device.type, distributed.world_size
    if settings.parallel == "fsdp":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    group = settings.processes_per_copy(world, distributed.local_world_size)
    return init_device_mesh(kind, (world // group, group), mesh_dim_names=("replicate", "shard"))


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_local(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`, of shards this process's own."""
    to_local(target).copy_(to_local(distribute_like(value, target)))


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` sharded as `like` is. value: sharded so already, or a full tensor, the same on every process."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(to_local(like).device), like.device_mesh, like.placements, src_data_rank=None)
