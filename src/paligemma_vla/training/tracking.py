"""Where a run's numbers go: metrics.jsonl always, Weights & Biases and TensorBoard when asked for."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import ConfigError
from paligemma_vla.storage import atomic_write

logger = logging.getLogger(__name__)


class Sink(Protocol):
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One object per line. On a resume, lines from after the checkpoint are dropped, so each step stands there once."""

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[bytes] = []
        if path.exists() and start_step > 0:
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= start_step]
        atomic_write(path, b"".join(line + b"\n" for line in kept))
        self.path = path
        # Unbuffered: after a failed write nothing waits to fail again.
        self.file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        # JSON has no NaN: a figure that is none becomes null.
        line = json.dumps(_finite({"step": step, **metrics}), allow_nan=False)
        end = self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(f"{line}\n".encode())
        except OSError as error:  # a full disk must not end the run before its checkpoint could
            self.file.truncate(end)
            logger.error("%s: step %d cannot be written (%s); training goes on", self.path, step, error.strerror)

    def close(self) -> None:
        self.file.close()


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that a kill, or a disk, has cut short or damaged."""
    try:
        return float(json.loads(line)["step"])
    except Exception:  # of any kind: it can hold anything
        return math.inf


class Wandb:
    """Weights & Biases (S10.1): run name `<experiment>_ddp_<timestamp>`, the whole config."""

    def __init__(self, config: VLAConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError('--use_wandb: wandb is not installed; pip install "paligemma-vla[wandb]"') from error
        stamp = time.strftime("%Y%m%d_%H%M%S")
        try:
            self.run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                name=f"{config.training.experiment_name}_ddp_{stamp}",
                mode=config.wandb.mode,
                dir=str(config.run_dir),
                config=config.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--use_wandb: {error}; run `wandb login`, or stay offline with --set wandb.mode=offline"
            ) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                'training.tensorboard: tensorboard is not installed; pip install "paligemma-vla[tensorboard]"'
            ) from error
        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """All sinks of a run; used by rank 0 alone."""

    def __init__(self, config: VLAConfig, start_step: int) -> None:
        self.sinks: list[Sink] = [JsonLines(config.run_dir / "metrics.jsonl", start_step)]
        if config.training.tensorboard:
            self.sinks.append(TensorBoard(config.run_dir / "tensorboard"))
        if config.wandb.enabled:
            self.sinks.append(Wandb(config))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class Quiet(io.TextIOBase):
    """Standard error for a progress bar: when it leads to a full disk, or nowhere any more, training goes on without it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


class Meter:
    """Throughput and share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.began, self.wait, self.steps = time.perf_counter(), 0.0, 0

    def add(self, wait: float) -> None:
        self.wait += wait
        self.steps += 1

    def read(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began)
        values = {"train/samples_per_s": self.steps * self.batch_size / elapsed, "train/data_wait": self.wait / elapsed}
        self.restart()
        return values


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
