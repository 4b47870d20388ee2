"""Checkpoints in shards: a folder to which every process writes its part while training goes on (torch's DCP).

Tensors lie in safetensors, `shard-<process>-...`; everything else, and the sha256 of every shard, in `record.pt`. The folder
gets its name when all of it is there. What was saved by any number of processes is read by any other.
"""

from __future__ import annotations

import copy
import errno
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError, first_line
from paligemma_vla.storage import atomic_file, sha256, sync_folder
from paligemma_vla.training.distributed import Distributed, is_communication

SUFFIX = ".dcp"
RECORD = "record.pt"
SHARDS = "shards"
TENSOR = "tensor"
SHARD_FILES = "*.safetensors"
# What says nothing about a file, but that it cannot be read here and now.
PASSING = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
IN_SHARDS = ("state_dict", "optimizer", "ema")
Tree = Any


def split(payload: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for the shards by key, and the payload with a note in the place of each of them."""
    tensors: dict[str, Tensor] = {}

    def note(path: tuple[str, ...], value: Tensor) -> Any:
        if value.ndim == 0:  # how many steps the optimiser took: the same for all processes
            return value
        key = "/".join(path)
        tensors[key] = value.detach()
        return {TENSOR: key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    record = {name: _mapped(value, (name,), note) if name in IN_SHARDS else value for name, value in payload.items()}
    return tensors, record


def fill(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The way back from `split`: notes whose tensor is not given stay."""

    def replace(value: Tree) -> Tree:
        if is_note(value):
            return tensors.get(value[TENSOR], value)
        if isinstance(value, Mapping):
            return {name: replace(part) for name, part in value.items()}
        return value

    return {name: replace(value) for name, value in record.items()}


def is_note(value: Tree) -> bool:
    """Whether a value stands for a tensor that lies in the shards."""
    return isinstance(value, Mapping) and value.keys() == {TENSOR, "shape", "dtype"}


def notes(value: Tree) -> Iterator[dict[str, Any]]:
    """Every note in a tree."""
    if is_note(value):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from notes(part)


def _mapped(value: Tree, path: tuple[str, ...], change: Callable[[tuple[str, ...], Tensor], Any]) -> Tree:
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return {name: _mapped(part, (*path, str(name)), change) for name, part in value.items()}
    return value


class ShardedWriter:
    """Writes one checkpoint at a time, in a thread of each process. Every process has to make the same calls."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._rank = dist.get_rank(group) if group is not None else 0
        # Also from DCP's own thread, for one process alone.
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled", UserWarning)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, payload: Mapping[str, Any], completed: Callable[[], None]) -> None:
        """Begin to write `payload` to the folder `path`; returns when its tensors have been copied.

        completed: called on rank 0, in the thread, when the checkpoint is whole. `wait` first.
        """
        assert self._pending is None
        tensors, record = split(payload)
        record = copy.deepcopy(record)  # written in a while, when training has gone on
        temporary = path.with_name(f".{path.name}.tmp")
        if self._rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what a failed save left; no other process writes before the plan
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        copied = async_save(tensors, storage_writer=writer, process_group=self._group)
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
        fault: str | None = None
        digests: dict[str, str] = {}
        try:
            written.result()
            digests = {shard.name: sha256(shard) for shard in temporary.glob(f"shard-{self._rank + 1:05d}-*")}
        except (CheckpointException, Exception) as error:  # of any kind: the others wait to be told
            fault = f"{path}: cannot be written ({_reason(error)}); the checkpoints before it are whole"
        parts = self._gather((fault, digests))
        faults = [told for told, _ in parts if told is not None]
        if not faults and self._rank == 0:
            try:
                shards = {name: digest for _, found in parts for name, digest in found.items()}
                missing = [name for name in shards if not (temporary / name).is_file()]
                if missing:
                    raise OSError(f"{missing[0]} of another machine is not there: checkpoint_dir has to be shared by all")
                with atomic_file(temporary / RECORD) as file:
                    torch.save({**record, SHARDS: shards}, file)
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                sync_folder(path.parent)
                completed()
            except Exception as error:  # of any kind: the others wait to be told
                faults = [f"{path}: cannot be completed ({first_line(error)})"]
        faults = self._gather(faults)[0]
        if faults:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(faults[0])

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _reason(error: BaseException) -> str:
    """DCP wraps what happened on each rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {first_line(cause)}" for rank, (cause, _) in error.failures.items())
    return first_line(error)


def damaged_entry(path: Path) -> str | None:
    """The first entry of an archive of torch's whose CRC is wrong: torch does not look at them."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def is_in_shards(path: Path) -> bool:
    """Whether a path is a checkpoint in shards."""
    return (path / RECORD).is_file()


def read_record(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Everything but the tensors of a checkpoint in shards. verify: read every shard and hold it against its digest, and the
    record against the checksums in it.

    Raises `CheckpointError` naming what is wrong.
    """
    record, shards = _open_record(folder, verify)
    if verify and (fault := _fault(folder, shards)) is not None:
        raise fault
    return record


def verify_together(folder: Path, distributed: Distributed) -> None:
    """Raise `CheckpointError` on every process for a checkpoint in shards that is not what was written.

    Every process has to ask. Rank 0 reads the record, each its part of the shards: of a folder that another machine does not
    have it reads none.
    """
    shards = distributed.broadcast(lambda: _open_record(folder, verify=True)[1])
    part = sorted(shards.items())[distributed.rank :: distributed.world_size]
    for fault in distributed.all_gather(_fault(folder, dict(part)) if folder.is_dir() else None):
        if fault is not None:
            raise fault


def _open_record(folder: Path, verify: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The record, and the digests of the shards by their names."""
    try:
        if verify and (entry := damaged_entry(folder / RECORD)) is not None:
            raise CheckpointError(f"the checksum of '{entry}' in {RECORD} is wrong")
        record: dict[str, Any] = torch.load(folder / RECORD, map_location="cpu", weights_only=True)
        shards = {str(name): digest for name, digest in record.pop(SHARDS).items()}
        there = {path.name for path in folder.glob(SHARD_FILES)}
    except Exception as error:  # of any kind: a damaged file can hold anything
        raise unreadable(folder, error) from error
    if different := sorted(shards.keys() ^ there):  # all that are there would be read
        what = "is not one of the shards that were written" if different[0] in there else "is missing"
        raise CheckpointError(f"{folder}: {different[0]} {what}; copy it again, or use an older checkpoint")
    return record, shards


def _fault(folder: Path, shards: Mapping[str, str]) -> CheckpointError | None:
    """What is wrong with the first of these shards that is not what was written."""
    try:
        for name, digest in shards.items():
            if sha256(folder / name) != digest:
                return CheckpointError(f"{folder / name}: damaged: its sha256 differs from {RECORD}; use an older checkpoint")
    except Exception as error:  # of any kind: a record can hold anything
        return unreadable(folder, error)
    return None


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to tell of a checkpoint that reading has failed for."""
    text = f"{path}: cannot be read ({first_line(error)})"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING):
        return UnreadableCheckpointError(f"{text}; it may be whole: see to that, or move it away and use an older one")
    return CheckpointError(f"{text}; is it a whole checkpoint?")


def read_tensors(folder: Path, wanted: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Read tensors, by key, into `wanted`: of those in shards only this process's part. Raises `CheckpointError`.

    group: of processes that all read, None for one alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.distributed is disabled")
            load(
                wanted,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=group,
                no_dist=group is None,
            )
    except (CheckpointException, Exception) as error:  # of any kind: what DCP and safetensors raise has no common base
        if is_communication(error):  # of which the checkpoint knows nothing
            raise
        raise CheckpointError(f"{folder}: does not fit ({_reason(error)})") from error


def read_whole(folder: Path, parts: tuple[str, ...], verify: bool = True) -> dict[str, Any]:
    """A checkpoint in shards as one payload, as a `.pth.tar` holds it; of the tensors only those under `parts`."""
    record = read_record(folder, verify)
    wanted = {
        note[TENSOR]: torch.empty(note["shape"], dtype=getattr(torch, note["dtype"]))
        for part in parts
        for note in notes(record.get(part))
    }
    read_tensors(folder, wanted)
    return fill(record, wanted)
