"""Model and optimiser into a checkpoint and out of it, whether their tensors are whole or in shards on either side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from paligemma_vla.training import sharded
from paligemma_vla.training.parallel import copy_local, distribute_like, full_tensor


def gathered(payload: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A payload whose tensors in shards are whole, in the machine's memory, one after the other. Every process has to ask.

    keep: False on processes that only take part.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = full_tensor(value)
        return full.cpu() if keep else None

    whole_payload: dict[str, Any] = tree_map(gather, payload)
    return whole_payload


def restore_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Take over every weight and buffer. Raises `ValueError` for names or shapes of another model."""
    state = model.state_dict()
    if state.keys() != saved.keys():
        raise ValueError(f"other weights: {', '.join(sorted(state.keys() ^ saved.keys())[:3])}")
    for name, target in state.items():
        if target.shape != saved[name].shape:
            raise ValueError(f"{name} is {tuple(saved[name].shape)}, expected {tuple(target.shape)}")
        copy_local(target, saved[name])


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over moments and settings. Raises `ValueError` for those of other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _held_as(value, parameters[number]) for name, value in entry.items()}
        for number, entry in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _held_as(value: Any, parameter: Tensor) -> Any:
    """A moment is held as its parameter is."""
    return distribute_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def read_parts(
    folder: Path, record: dict[str, Any], model: nn.Module, optimizer: Optimizer, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """The tensors of a checkpoint in shards, held as this model's are: each process reads its part alone.

    record: see `sharded.read_record`. Raises `CheckpointError`.
    """
    weights = model.state_dict()
    parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    likes: dict[str, Tensor] = {f"state_dict/{name}": tensor for name, tensor in weights.items()}
    likes |= {f"ema/average/{name}": tensor for name, tensor in weights.items()}
    wanted = {}
    for note in sharded.notes({part: record[part] for part in sharded.IN_SHARDS}):
        key, shape = note[sharded.TENSOR], torch.Size(note["shape"])
        like = likes.get(key)
        if key.startswith("optimizer/state/"):
            like = parameters[int(key.split("/")[2])]
        dtype = getattr(torch, note["dtype"])
        if like is not None and like.shape == shape:
            wanted[key] = torch.zeros_like(like, dtype=dtype)
        else:
            wanted[key] = torch.zeros(shape, dtype=dtype)
    sharded.read_tensors(folder, wanted, group)
    return sharded.fill(record, wanted)
