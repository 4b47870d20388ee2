"""Machines of a job: torchrun agents that are started, killed and come back, and a run that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paligemma_vla.config import VLAConfig
from ranks import last
from support import identical, read_metrics

STEPS_PER_EPOCH = 4
ROOT = Path(__file__).parent.parent
SETTINGS = {
    "training.epochs": 12,
    "training.save_every_n_steps": 5,
    "training.keep_last": 3,
    "training.validate_every_n_steps": 100,
    "data.batch_size": 8,
}
LENGTHS = (9, 2, 14, 8, 7)
EXACT = ("state_dict", "optimizer", "ema", "lr_scheduler", "rng", "watch", "step")


@dataclass
class Node:
    """One machine of a job: a torchrun agent and what it starts, which end with the block. Its log is in `folder`.

    nodes: how many machines there are; None: one, started as most are, `torchrun --max-restarts N main_train_ddp.py ...`, with
    nothing said about where the ranks meet or what they go on from. host: whether this one keeps the rendezvous, at `meeting`.
    address: where the others reach this one. inside: the command that starts the agent in a network of its own.
    """

    config: VLAConfig
    folder: Path
    nodes: str | None = "1"
    ranks: int = 2
    port: int = 0
    host: bool = True
    address: str = "127.0.0.1"
    meeting: str = "127.0.0.1"
    inside: tuple[str, ...] = ()

    def __enter__(self) -> Node:
        path = self.folder / f"{self.config.training.experiment_name}.yaml"
        path.write_text(self.config.to_yaml(), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), "--max-restarts", "100"]
        train = [str(ROOT / "main_train_ddp.py"), "--config_path", str(path), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.nodes is None:
            command = [*launcher, "--master-port", str(self.port), *train]
        else:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            command = [
                *launcher,
                *("--nnodes", self.nodes, "--rdzv-backend", "c10d", "--rdzv-id", "test"),
                *("--rdzv-endpoint", f"{self.meeting}:{self.port}", "--local-addr", self.address),
                f"--rdzv-conf=is_host={int(self.host)},join_timeout=120,last_call_timeout=1",
                *(*train, "--resume_checkpoint", "auto"),
            ]
        with open(path.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(
                [*self.inside, *command], env=environment, stderr=log, stdout=log, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.processes(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    @property
    def log(self) -> str:
        """What this machine, and others of its run, have printed."""
        return (self.folder / f"{self.config.training.experiment_name}.log").read_text()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def processes(self) -> list[int]:
        """The ranks that run just now."""
        return children(self.process.pid)

    def wait_for_ranks(self) -> None:
        wait_for(lambda: self.ended or len(self.processes()) == self.ranks)

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint of that step or a later one is there, or the run is over."""
        wait_for(lambda: self.ended or saved_step(self.config) >= step)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def saved_step(config: VLAConfig) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = {path.name.partition(".")[0] for path in (config.run_dir / "checkpoints").glob("checkpoint_*")}
    steps = [int(name.rpartition("_")[2]) * (STEPS_PER_EPOCH if "epoch" in name else 1) for name in names]
    return max(steps, default=0)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same(config: VLAConfig, expected: VLAConfig) -> None:
    """To the last bit."""
    got, want = last(config), last(expected)
    for key in EXACT:
        assert identical(got[key], want[key]), key
    assert read_metrics(config.run_dir) == read_metrics(expected.run_dir)
