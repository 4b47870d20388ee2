"""Processes: how they start, who they are, and the two collectives the trainer needs."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paligemma_vla.errors import ConfigError, Terminated, TrainingError, VLAError

SAVING_SECONDS = "1800"
COMMUNICATION_REMEDY = (
    "a rank died (out of memory, killed) or hangs, see the first error above; if it was only slow (first epoch, large "
    "checkpoints), set NCCL_TIMEOUT=1800 or more, in seconds"
)


@dataclass(frozen=True)
class Distributed:
    """This process among `world_size`; rank 0 writes files. One process alone has no process group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks: plain data of no great size."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group together: without the barrier some ranks abort when others are gone first."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises `ConfigError` when it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise ConfigError(f"--device {name}: not available here; available: {', '.join(k for k, v in available.items() if v)}")
    return torch.device(name)


def _whole(name: str, default: int) -> int:
    """A whole number out of the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}: got '{text}' in the environment, expected a whole number")
    return int(text)


def join(device: str | None) -> Distributed:
    """Join the group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...), or stand alone.

    NCCL on GPUs, one process each, gloo on CPUs (S7.1). NCCL_TIMEOUT: seconds a collective may take (S10.2).
    """
    chosen = choose_device(device)
    world_size = _whole("WORLD_SIZE", 1)
    if world_size == 1:
        return Distributed(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _whole("LOCAL_RANK", 0))
        torch.cuda.set_device(chosen)
    timeout = timedelta(seconds=_whole("NCCL_TIMEOUT", 1800))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not set, but WORLD_SIZE is {world_size}; start with torchrun or main_train_ddp.py, or "
            f"unset WORLD_SIZE"
        )
    for name in ("RANK", "MASTER_PORT"):
        _whole(name, 0)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    return Distributed(dist.get_rank(), world_size, chosen)


def launch(entry: Callable[..., int], args: Any, nproc: int) -> int:
    """Run `entry(args)` in `nproc` processes of this machine through torch's elastic launcher.

    MASTER_PORT fixes the port of the rendezvous; otherwise a free one is taken. Raises `TrainingError` naming the first
    rank that failed and why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    address, port = os.environ.get("MASTER_ADDR", "localhost"), _whole("MASTER_PORT", 0)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # A rank that is told to stop finishes its step and saves: the launcher's own limit of 30 s would cut that short.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)
    # Its log would show a traceback of what is told below in one message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"paligemma-vla-{socket.gethostname()}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{address}:{port}",
        max_restarts=0,
    )
    try:
        codes: dict[int, int] = elastic_launch(config, entry)(args)
        return max(codes.values())
    except SignalException as error:
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        message = message.get("message", message) if isinstance(message, dict) else message
        kind, _, text = str(message).partition(": ")
        if kind in _names(VLAError):
            raise TrainingError(text) from error  # every rank met it, and it says by itself what to mend
        # A negative exit is a signal: the watchdog of NCCL aborts a rank that waited too long for another.
        remedy = f"\n  {COMMUNICATION_REMEDY}" if failure.exitcode < 0 else ""
        raise TrainingError(f"rank {rank} failed (exit {failure.exitcode}): {message}{remedy}") from error


def _names(kind: type[BaseException]) -> set[str]:
    """Names of an error's class and of all that are made from it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))
