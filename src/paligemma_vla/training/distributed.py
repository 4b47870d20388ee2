"""Processes: how they start, who they are, the few collectives the trainer needs, and who is missing when one fails."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from paligemma_vla.errors import CommunicationError, ConfigError, Terminated, TrainingError, VLAError, first_line
from paligemma_vla.workers import end_with

Result = TypeVar("Result")
SAVING_SECONDS = "300"
ROLL_CALL_SECONDS = 4.0
COMMUNICATION_REMEDY = (
    "see the first error above (out of memory, killed); if a rank was only slow (first epoch, large checkpoints), set "
    "NCCL_TIMEOUT=1800 or more, in seconds"
)


@dataclass(frozen=True)
class Distributed:
    """This process among `world_size`; rank 0 writes files. One process alone has no process group.

    local_rank, local_world_size: the same on its machine. store: where processes leave word for each other; None for one alone.
    """

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    local_world_size: int = 1
    store: Store | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def all_gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks: plain data of no great size."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> Iterator[Any]:
        """On rank 0 what every process gives, in the order of ranks, one at a time in memory; on the others nothing."""
        if not self.main:
            dist.send_object_list([value], dst=0)
            return
        yield value
        for rank in range(1, self.world_size):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=rank)
            yield received[0]

    def on_main(self, act: Callable[[], Result]) -> Result | None:
        """What rank 0 gets from `act`, None on the others; a `VLAError` or `OSError` of it is raised by every process."""
        if self.world_size == 1:
            return act()
        result, error = None, None
        if self.main:
            try:
                result = act()
            except (VLAError, OSError) as met:
                error = met
        told = [error]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise told[0]
        return result

    def broadcast(self, decide: Callable[[], Result]) -> Result:
        """What rank 0 decides (plain data), on every process."""
        decided: list[Any] = [self.on_main(decide)]
        if self.world_size > 1:
            dist.broadcast_object_list(decided, src=0)
        result: Result = decided[0]
        return result

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The block runs on one process of each machine, then on the others of it, which find what it left on the disk.

        An error of the first does not keep the others: they meet it themselves.
        """
        if self.local_rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.local_rank:
                self.barrier()

    @contextlib.contextmanager
    def in_turn_here(self) -> Iterator[None]:
        """The block runs on the processes of each machine one after the other. It must not ask other processes for anything.

        Where one fails all end, as after `all_or_none`.
        """
        turns = max(self.all_gather(self.local_world_size))
        for _ in range(self.local_rank):
            self._refuse_failures(None)
        with self.all_or_none():
            yield
        for _ in range(self.local_rank + 1, turns):
            self._refuse_failures(None)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What one process fails with in the block ends the others too, which would only wait for it. The block must not ask
        other processes for anything."""
        failure = None
        try:
            yield
        except Exception as error:  # of any kind: it goes on
            failure = error
        self._refuse_failures(failure)

    def _refuse_failures(self, failure: Exception | None) -> None:
        """Raise this process's failure, or tell the first of the others'."""
        reasons = self.all_gather(None if failure is None else first_line(failure))
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise TrainingError(f"rank {rank}: {reason}")

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def last_words(self) -> Iterator[None]:
        """An error within the block is left as word for the other processes, which will only notice that this one is gone."""
        try:
            yield
        except Exception as error:  # of any kind: it goes on
            if is_communication(error):
                raise self.communication_error(error, "at the start or the end") from error
            if self.store is not None and not isinstance(error, CommunicationError):
                with contextlib.suppress(RuntimeError):  # the store may be what is gone
                    self.store.set(f"last words/{self.rank}", first_line(error))
            raise

    def communication_error(self, error: BaseException, when: str) -> CommunicationError:
        """What to tell of a failure between processes: who is missing, and why as far as it is known."""
        return CommunicationError(
            f"communication between processes failed {when}: {self.roll_call()} ({first_line(error)}); {COMMUNICATION_REMEDY}"
        )

    def roll_call(self) -> str:
        """Which processes are gone or do not answer, to be asked by all that are left when communication has failed."""
        if self.store is None:
            return "this process is alone"
        if self.device.type == "cpu" and "MASTER_PORT" in os.environ:
            _hang_up()
        try:
            self.store.set(f"here/{self.rank}", "")
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            missing = list(range(self.world_size))
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
                if any(self.store.check([f"last words/{rank}"]) for rank in missing):
                    break
                time.sleep(0.1)
            told = [self._fate(rank) for rank in missing]
            self.store.set(f"told/{self.rank}", "")
            others = [rank for rank in range(self.world_size) if rank not in missing]
            while self.main and others and time.monotonic() < deadline + ROLL_CALL_SECONDS:  # the list may end with rank 0
                others = [rank for rank in others if not self.store.check([f"told/{rank}"])]
                time.sleep(0.1)
        except RuntimeError as error:
            return f"rank 0, or what started it, is gone: it kept the list of processes ({first_line(error)})"
        return "; ".join(told) if told else "every process answers, so one was slower than NCCL_TIMEOUT, or the network failed"

    def _fate(self, rank: int) -> str:
        assert self.store is not None
        name = self.store.get(f"name/{rank}").decode()
        if self.store.check([f"last words/{rank}"]):
            return f"{name} ended: {self.store.get(f'last words/{rank}').decode()}"
        return f"{name} does not answer: it was killed, or hangs"

    def close(self) -> None:
        """Leave the group together: without the barrier some ranks abort when others are gone first."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


def _hang_up() -> None:
    """Shut this process's connections, but for those to the store.

    Another process may wait for this one alone, and would notice only when it has ended, and the store with it. Gloo's groups
    cannot be closed while an exchange is under way.
    """
    with contextlib.suppress(OSError):  # no /proc: the others notice later
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # closed, or not connected any more
                if not stat.S_ISSOCK(os.fstat(number).st_mode):
                    continue
                with socket.socket(fileno=os.dup(number)) as connection:
                    if connection.family not in (socket.AF_INET, socket.AF_INET6):
                        continue
                    ports = str(connection.getsockname()[1]), str(connection.getpeername()[1])
                    if os.environ["MASTER_PORT"] not in ports:
                        connection.shutdown(socket.SHUT_RDWR)


def is_communication(error: BaseException) -> bool:
    """Whether another process, or the way to it, is what failed."""
    words = str(error).lower()
    # The second is what gloo says where several exchanges were under way, and another of them met the fault.
    told = isinstance(error, RuntimeError) and ("gloo" in words or "pair closure" in words)
    return isinstance(error, dist.DistError) or told


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises `ConfigError` when it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise ConfigError(f"--device {name}: not available here; available: {', '.join(k for k, v in available.items() if v)}")
    return torch.device(name)


def _whole(name: str, default: int, least: int = 0, most: int = 2**31) -> int:
    """A whole number out of the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 12 or not least <= int(text) <= most:
        raise ConfigError(f"{name}: got '{text}' in the environment, expected a whole number from {least} to {most}")
    return int(text)


def join(device: str | None) -> Distributed:
    """Join the group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...), or stand alone.

    NCCL on GPUs, one process each, gloo on CPUs (S7.1). NCCL_TIMEOUT: seconds a collective may take (S10.2).
    """
    chosen = choose_device(device)
    if launched():
        end_with(os.getppid())  # an agent that is killed cannot stop its ranks, and others will take their place
    world_size = _whole("WORLD_SIZE", 1, least=1)
    if world_size == 1:
        return Distributed(0, 1, chosen)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not set, but WORLD_SIZE is {world_size}; start with torchrun or main_train_ddp.py, or "
            f"unset WORLD_SIZE"
        )
    rank, local_rank = _whole("RANK", 0, most=world_size - 1), _whole("LOCAL_RANK", 0, most=world_size - 1)
    local_world_size = _whole("LOCAL_WORLD_SIZE", 1, least=1, most=world_size)
    _whole("MASTER_PORT", 0, most=2**16 - 1)  # or torch would say so in a traceback
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    try:
        store, *_ = next(rendezvous("env://", rank, world_size, timeout=_timeout()))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and local_world_size == world_size:
            # The launcher's store outlives its ranks: without this those of a restart would find addresses of the dead.
            store = PrefixStore(f"attempt {_whole('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        notes = PrefixStore("paligemma_vla", store)
        notes.set(f"name/{rank}", f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")
        dist.init_process_group(_backend(chosen), store=store, rank=rank, world_size=world_size, timeout=_timeout())
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {rank}: the {world_size} processes did not find each other at MASTER_ADDR {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({first_line(error)}); start all of them, let them reach that address, and give them "
            f"more time with NCCL_TIMEOUT if they are slow"
        ) from error
    return Distributed(rank, world_size, chosen, local_rank, local_world_size, notes)


def init_single_process_group(distributed: Distributed) -> None:
    """Give one process alone a process group of its own, for what cannot do without."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(distributed.device), store=HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    # Checkpoints, offloaded weights and plain data are exchanged from the machine's memory.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def new_checkpoint_group(distributed: Distributed) -> dist.ProcessGroup | None:
    """A group of its own for threads that write checkpoints: in the trainers' they would get in the way of each other."""
    if distributed.world_size == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_timeout())
    return group


def _timeout() -> timedelta:
    return timedelta(seconds=_whole("NCCL_TIMEOUT", 1800, least=1, most=10**7))


def launched() -> bool:
    """Whether an elastic launcher (torchrun, `launch`) has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher() -> str | None:
    """What tells the launcher of this process from any other, None without one: machine, process, and when that began."""
    if not launched():
        return None
    process = os.getppid()
    try:
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not on Linux: two launchers with one number are unlikely enough
        began = ""
    return f"{socket.gethostname()} {process} {began}".strip()


def launch(entry: Callable[..., int], args: Any, nproc: int, max_restarts: int = 0) -> int:
    """Run `entry(args)` in `nproc` processes of this machine through torch's elastic launcher.

    MASTER_PORT fixes the port of the rendezvous; otherwise a free one is taken. max_restarts: how often all of them are started
    again when one has failed. Raises `TrainingError` naming the first rank that failed and why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    address, port = os.environ.get("MASTER_ADDR", "localhost"), _whole("MASTER_PORT", 0)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # A rank that is told to stop finishes its step and saves: the launcher's own limit of 30 s would cut that short.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)
    # Or the store of the rendezvous would be that of the ranks, where those of a restart find addresses of the dead.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Its log would show a traceback of what is told below in one message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"paligemma-vla-{socket.gethostname()}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{address}:{port}",
        max_restarts=max_restarts,
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
