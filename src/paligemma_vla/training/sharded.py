"""What all processes of a run do together with a checkpoint: write it in shards while training goes on, gather its tensors for
one file, and restore model and optimiser from either, however their tensors are sharded now.

Shards are written by torch's DCP and read by any number of processes. Their format is described in `checkpoint.py`.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map, tree_map_with_path

from paligemma_vla.errors import CheckpointError, first_line
from paligemma_vla.storage import atomic_file, sha256, sync_folder
from paligemma_vla.training.checkpoint import DIGESTS, IN_SHARDS, RECORD, fill, placeholders, read_tensors, reason_of
from paligemma_vla.training.distributed import Distributed, is_communication
from paligemma_vla.training.parallel import copy_local, distribute_like, full_tensor


class ShardedWriter:
    """Writes one checkpoint at a time, in a thread of each process. Every process has to make the same calls.

    processes: with a group for these threads alone.
    """

    def __init__(self, processes: Distributed) -> None:
        self._processes = processes
        # Also from DCP's own thread, for one process alone.
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled", UserWarning)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, payload: Mapping[str, Any], completed: Callable[[], None]) -> None:
        """Begin to write `payload` to the folder `path`; returns when its tensors have been copied.

        completed: called on rank 0, in the thread, when the checkpoint is complete. `wait` first.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        assert self._pending is None
        tensors, record = split(payload)
        record = copy.deepcopy(record)  # it is written later, when training has gone on
        temporary = path.with_name(f".{path.name}.tmp")
        if self._processes.main:
            shutil.rmtree(temporary, ignore_errors=True)  # what a failed save left; no other process writes before the plan
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        copied = async_save(tensors, storage_writer=writer, process_group=self._processes.group)
        assert isinstance(copied, Future)
        self._pending = self._thread.submit(self._complete, copied, temporary, path, record, completed)

    def wait(self) -> None:
        """Until nothing is being written. Raises `CheckpointError` on every process when the last save failed on one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _complete(
        self, written: Future[Any], temporary: Path, path: Path, record: dict[str, Any], completed: Callable[[], None]
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        def hash_shards() -> dict[str, str]:
            try:
                written.result()
            except CheckpointException as error:  # it is no `Exception`
                raise OSError(reason_of(error)) from error
            return {shard.name: sha256(shard) for shard in temporary.glob(f"shard-{self._processes.rank + 1:05d}-*")}

        def finish() -> None:
            shards = {name: digest for found in parts for name, digest in found.items()}
            if missing := [name for name in shards if not (temporary / name).is_file()]:
                raise OSError(f"{missing[0]} of another machine is not there: checkpoint_dir has to be shared by all")
            with atomic_file(temporary / RECORD) as file:
                torch.save({**record, DIGESTS: shards}, file)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            sync_folder(path.parent)
            completed()

        try:
            parts = self._processes.all_gather(self._processes.on_all(hash_shards))
            self._processes.on_main(finish)
        except Exception as error:  # of any kind: the disk's, torch's, or of what is called at the end
            if is_communication(error):
                raise
            if self._processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = first_line(error)
            raise CheckpointError(f"{path}: cannot be written ({reason}); the checkpoints before it are intact") from error


def split(payload: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for the shards by key, and the payload with a placeholder instead of each of them; `fill` is the inverse."""
    tensors: dict[str, Tensor] = {}

    def replace(path: Sequence[Any], value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:  # a scalar (the optimiser's steps) is the same on all processes
            return value
        key = "/".join(str(step.key) for step in path)
        tensors[key] = value.detach()
        return {"tensor": key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    return tensors, {**payload, **tree_map_with_path(replace, {name: payload[name] for name in IN_SHARDS})}


def gather_tensors(payload: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A payload with full tensors instead of sharded ones, in the machine's memory, gathered one by one by all processes.

    keep: False on processes that only take part.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = full_tensor(value)
        return full.cpu() if keep else None

    gathered: dict[str, Any] = tree_map(gather, payload)
    return gathered


def read_shards(
    folder: Path, record: dict[str, Any], model: nn.Module, optimizer: Optimizer, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """A record of `open_to_resume` with its tensors: of those that are sharded in this model, each process reads its part.

    Raises `CheckpointError`.
    """
    weights = model.state_dict()
    likes = {f"{part}/{name}": tensor for name, tensor in weights.items() for part in ("state_dict", "ema/average")}
    parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    wanted = {}
    for value in placeholders({part: record[part] for part in IN_SHARDS}):
        key, shape, dtype = value["tensor"], torch.Size(value["shape"]), getattr(torch, value["dtype"])
        like = parameters[int(key.split("/")[2])] if key.startswith("optimizer/state/") else likes.get(key)
        if like is None or like.shape != shape:
            like = torch.empty(shape)
        wanted[key] = torch.zeros_like(like, dtype=dtype)
    try:
        read_tensors(folder, wanted, group)
    except CheckpointError as error:
        if error.__cause__ is not None and is_communication(error.__cause__):  # of which the checkpoint knows nothing
            raise error.__cause__ from None
        raise
    return fill(record, wanted)


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
    """Take over moments, sharded as their parameters are, and settings. Raises `ValueError` for those of other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: Any, parameter: Tensor) -> Any:
        return distribute_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

    state = {
        number: {name: shard(value, parameters[number]) for name, value in entry.items()}
        for number, entry in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
