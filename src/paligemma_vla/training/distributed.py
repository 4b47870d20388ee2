"""Processes of a run: how they start, join, exchange plain data, and fail together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from paligemma_vla.errors import CommunicationError, ConfigError, Terminated, TrainingError, VLAError, first_line
from paligemma_vla.workers import end_with

Result = TypeVar("Result")
SHUTDOWN_SECONDS = "300"  # for a rank to finish its step and save
GRACE_SECONDS = 2.0
COMMUNICATION_REMEDY = (
    "see the first error above (out of memory, killed); if a rank was only slow (first epoch, large checkpoints), set "
    "NCCL_TIMEOUT=1800 or more, in seconds"
)


@dataclass(frozen=True)
class Distributed:
    """This process among `world_size`; rank 0 writes files. A single process has no process group.

    local_rank, local_world_size: the same on its machine. group: the process group of `all_gather`, None for that of the run.
    """

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """True on every process if `flag` is true on one."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks: small plain data."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: Any) -> Iterator[Any]:
        """On rank 0 the values of all processes in the order of ranks, one at a time in memory; on the others nothing."""
        if not self.main:
            dist.send_object_list([value], dst=0)
            return
        yield value
        for rank in range(1, self.world_size):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=rank)
            yield received[0]

    def on_all(self, function: Callable[[], Result]) -> Result | None:
        """What `function` returns here, when it has returned on all. After an error of one process all raise it, instead of
        waiting for that process: of several errors that of the lowest rank. `function` must not call collectives."""
        result, failure, shown = None, None, None
        try:
            result = function()
        except Exception as error:  # of any kind: it is raised again
            failure = error
            # Not every error can be sent.
            shown = error if isinstance(error, (VLAError, OSError)) else TrainingError(f"rank {self.rank}: {first_line(error)}")
        for rank, theirs in enumerate(self.all_gather(shown)):
            if theirs is not None:
                raise failure if failure is not None and rank == self.rank else theirs
        return result

    def on_main(self, function: Callable[[], Result]) -> Result | None:
        """What `function` returns on rank 0, None on the others. Raises as `on_all`."""
        return self.on_all(lambda: function() if self.main else None)

    def broadcast(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on rank 0 (plain data), on every process. Raises as `on_main`."""
        values: list[Any] = [self.on_main(function)]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        result: Result = values[0]
        return result

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Run the block on the processes of each machine one after the other, so that they find the files of the first.

        After an error of one the others run it too. The block must not call collectives.
        """
        turns = max(self.all_gather(self.local_world_size))
        for _ in range(self.local_rank):
            self.barrier()
        try:
            yield
        finally:
            for _ in range(self.local_rank, turns):
                self.barrier()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group together: without the barrier some ranks abort when others are gone first."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def explain_communication() -> Iterator[None]:
    """Raise a `CommunicationError` for what torch raises when another process has gone, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not is_communication(error):
            raise
        if launcher_id() is not None:
            # The launcher reports the first process that ends: let that be the one that is gone.
            time.sleep(GRACE_SECONDS)
        raise CommunicationError(
            f"communication between processes failed ({first_line(error)}); {COMMUNICATION_REMEDY}"
        ) from error


def is_communication(error: BaseException) -> bool:
    """True if another process, or the way to it, has failed."""
    text = str(error).lower()
    # "Pair closure" is what gloo says when several exchanges were under way, and another of them met the fault.
    from_gloo = isinstance(error, RuntimeError) and ("gloo" in text or "pair closure" in text)
    return isinstance(error, dist.DistError) or from_gloo


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises `ConfigError` when it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise ConfigError(f"--device {name}: not available here; available: {', '.join(k for k, v in available.items() if v)}")
    return torch.device(name)


def join(device: str | None) -> Distributed:
    """Join the group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...), or stay alone.

    NCCL on GPUs, one process each, gloo on CPUs (S7.1). NCCL_TIMEOUT: seconds a collective may take (S10.2).
    """
    chosen = choose_device(device)
    if launcher_id() is not None:
        end_with(os.getppid())  # a launcher that is killed cannot stop its ranks, and others will take their place
    if (world_size := _environment_number("WORLD_SIZE", 1)) == 1:
        return Distributed(0, 1, chosen)
    rank, local_rank = _environment_number("RANK"), _environment_number("LOCAL_RANK")
    local_world_size = _environment_number("LOCAL_WORLD_SIZE", 1)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    try:
        store, *_ = next(rendezvous("env://", rank, world_size, timeout=_timeout()))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and local_world_size == world_size:
            # The launcher's store outlives its ranks: without a prefix those of a restart would find addresses of the dead.
            store = PrefixStore(f"attempt {_environment_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(_backend(chosen), store=store, rank=rank, world_size=world_size, timeout=_timeout())
    except (ValueError, RuntimeError) as error:
        raise CommunicationError(
            f"rank {rank}: the {world_size} processes did not find each other at MASTER_ADDR {os.environ.get('MASTER_ADDR')}, "
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} ({first_line(error)}); start all of them, with torchrun or "
            f"main_train_ddp.py, let them reach that address, and raise NCCL_TIMEOUT if they are slow; or unset WORLD_SIZE"
        ) from error
    return Distributed(rank, world_size, chosen, local_rank, local_world_size)


def init_single_process_group(distributed: Distributed) -> None:
    """A process group of this process alone, for code of torch that needs one."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(distributed.device), store=HashStore(), rank=0, world_size=1)


def with_new_group(distributed: Distributed) -> Distributed:
    """In a group for threads that write checkpoints: in the group of the run their collectives would mix with the trainer's."""
    if distributed.world_size == 1:
        return distributed
    return replace(distributed, group=dist.new_group(backend="gloo", timeout=_timeout()))


def _backend(device: torch.device) -> str:
    # Checkpoints, offloaded weights and plain data are exchanged from the machine's memory.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _timeout() -> timedelta:
    return timedelta(seconds=_environment_number("NCCL_TIMEOUT", 1800))


def _environment_number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: got '{os.environ.get(name, '')}' in the environment, expected a whole number; start with torchrun or "
            f"main_train_ddp.py, or unset WORLD_SIZE"
        )
    return int(text)


def launcher_id() -> str | None:
    """The name of the elastic launcher (torchrun, `launch`) that started this process; None without one.

    It is the same after a restart and another for another launch: the folder in which a launcher keeps the errors of its ranks,
    <run id>_<random>/attempt_<n>/<local rank>/error.json.
    """
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return path.parents[2].name if len(path.parents) > 2 else None


def launch(entry: Callable[..., int], args: Any, nproc: int, max_restarts: int = 0) -> None:
    """Run `entry(args)` in `nproc` processes of this machine through torch's elastic launcher.

    MASTER_PORT fixes the port of the rendezvous; otherwise a free one is taken. max_restarts: how often all of them are started
    again when one has failed. Raises `TrainingError` with the message of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # The launcher's own limit of 30 s would end a rank that saves after a signal.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    # In the store of the rendezvous the ranks of a restart would find addresses of the dead.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Their logs would show a traceback of what is raised below as one message.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    run_id = f"paligemma-vla-{socket.gethostname()}-{os.getpid()}"
    endpoint = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{_environment_number('MASTER_PORT', 0)}"
    config = LaunchConfig(1, 1, nproc, run_id=run_id, rdzv_backend="c10d", rdzv_endpoint=endpoint, max_restarts=max_restarts)
    try:
        elastic_launch(config, entry)(args)
    except SignalException as error:
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        message = message["message"] if isinstance(message, dict) else message
        kind, _, text = str(message).partition(": ")
        if kind == VLAError.__name__:  # it says what to do by itself
            raise TrainingError(text) from error
        remedy = f"\n  {COMMUNICATION_REMEDY}" if failure.exitcode < 0 else ""  # a signal: NCCL's watchdog aborts a rank too
        raise TrainingError(f"rank {rank} failed (exit {failure.exitcode}): {message}{remedy}") from error
