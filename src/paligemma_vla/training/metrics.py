"""What a run says of itself: metrics.jsonl, Weights & Biases and TensorBoard when asked for, warnings about its losses."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import Batch, VLADataset
from paligemma_vla.errors import ConfigError, TrainingError, needs_extra
from paligemma_vla.model.action_head.base import FlowOutput
from paligemma_vla.storage import atomic_write
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.parallel import to_local
from paligemma_vla.training.preflight import Data

logger = logging.getLogger(__name__)
# A loss that is SPIKE times the median of the last LOSSES_KEPT (at least LOSSES_NEEDED) is reported.
LOSSES_KEPT, LOSSES_NEEDED, SPIKE = 100, 20, 4.0
SAMPLES_NAMED = 5


class Tracker:
    """Where the numbers of a run go; used by rank 0 alone."""

    def __init__(self, config: VLAConfig, start_step: int) -> None:
        self.lines = JsonLines(config.run_dir / "metrics.jsonl", start_step)
        self.tensorboard = open_tensorboard(config.run_dir / "tensorboard") if config.training.tensorboard else None
        self.wandb = start_wandb(config) if config.wandb.enabled else None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.lines.log(step, metrics)
        if self.tensorboard is not None:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        self.lines.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class JsonLines:
    """One object per line. A resume drops lines from after its checkpoint, so each step stands there once."""

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[bytes] = []
        if path.exists() and start_step > 0:
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= start_step]
        atomic_write(path, b"".join(line + b"\n" for line in kept))
        self.path = path
        self.file = path.open("ab", buffering=0)  # unbuffered: after a failed write nothing waits to fail again

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        text = json.dumps({"step": step, **metrics})
        line = json.dumps(json.loads(text, parse_constant=lambda _: None))  # JSON has no NaN or infinity: they become null
        end = self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(f"{line}\n".encode())
        except OSError as error:  # a full disk must not end the run before its checkpoint could
            self.file.truncate(end)
            logger.error("%s: step %d cannot be written (%s); training goes on", self.path, step, error.strerror)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that a kill, or a disk, has cut short or damaged."""
    try:
        return float(json.loads(line)["step"])
    except Exception:  # of any kind: it can hold anything
        return math.inf


def start_wandb(config: VLAConfig) -> Any:
    """A run of Weights & Biases (S10.1): named `<experiment>_ddp_<timestamp>`, with the whole configuration."""
    with needs_extra("--use_wandb", "wandb"):
        import wandb
    try:
        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=f"{config.training.experiment_name}_ddp_{time.strftime('%Y%m%d_%H%M%S')}",
            mode=config.wandb.mode,
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        raise ConfigError(f"--use_wandb: {error}; run `wandb login`, or stay offline with --set wandb.mode=offline") from error


def open_tensorboard(folder: Path) -> Any:
    with needs_extra("training.tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder))


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


@dataclass(frozen=True)
class Step:
    """One optimiser step: loss over the global batch, gradient norm, its learning rate.

    parts: this process's micro-batches and what the model said to them, to find the samples behind a number.
    """

    loss: float
    norm: float
    rate: float
    parts: list[tuple[Batch, FlowOutput]]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class LossMonitor:
    """Skipped steps (loss or gradient not finite) and losses that stand out from the last hundred, with their samples.

    Its state is part of a checkpoint, so a resumed run counts and warns as one that went through.
    """

    def __init__(self, config: VLAConfig, data: Data, distributed: Distributed) -> None:
        self.config, self.data, self.distributed = config, data, distributed
        self.skipped = self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=LOSSES_KEPT)

    def update(self, number: int, step: Step) -> None:
        """Take in optimiser step `number` (from 1). Raises `TrainingError` when too many in a row had to be skipped."""
        if not step.finite:
            self.skipped += 1
            self.in_a_row += 1
            self._warn(number, step, f"skipped, its loss is {step.loss:.4g}, its gradient's norm {step.norm:.4g}")
            if self.in_a_row >= self.config.training.max_skipped_steps:
                raise self.diverged(number)
            return
        self.in_a_row = 0
        median = statistics.median(self.recent) if len(self.recent) >= LOSSES_NEEDED else math.inf
        self.recent.append(step.loss)
        if step.loss > SPIKE * median > 0:
            self._warn(number, step, f"loss {step.loss:.4g} is {step.loss / median:.1f} times the median of the steps before")

    def diverged(self, number: int) -> TrainingError:
        """The error of a run in which no step is finite any more."""
        return TrainingError(
            f"step {number}: NaN or infinity in loss or gradient in {self.in_a_row} steps in a row (at most "
            f"training.max_skipped_steps = {self.config.training.max_skipped_steps}); they were skipped, and nothing was saved "
            f"since. Where the samples named above are the same ones again, look at their numbers, or leave them out "
            f"(data.exclude_episodes); else the run diverged: {self._remedy()}"
        )

    def check_weights(self, number: int, model: nn.Module) -> None:
        """Raise `TrainingError` rather than save weights that are not finite: a finite gradient can still overflow them."""
        finite = torch.stack([torch.isfinite(to_local(parameter)).all() for parameter in model.parameters()]).all()
        if self.distributed.any(not finite):
            raise TrainingError(
                f"step {number}: got NaN or infinity in the weights; the run diverged and was not saved: {self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            f"lower optimizer.lr ({self.config.optimizer.lr:g}) and vlm_lr, or lengthen lr_scheduler.warmup_steps "
            f"({self.config.lr_scheduler.warmup_steps})"
        )

    def _warn(self, number: int, step: Step, text: str) -> None:
        """Log what is wrong with a step, and its worst samples, on whichever process they were."""
        positions, samples = self.data.order.batch(number - 1)
        sample_at = dict(zip(positions.tolist(), samples.tolist(), strict=True))
        losses: dict[int, float] = {}
        for batch, output in step.parts:
            valid = batch["action_mask"].any(dim=(1, 2)).tolist()
            values = sample_losses(output, batch["action_mask"].to(output.velocity.device)).tolist()
            for position, counts, loss in zip(batch["position"].tolist(), valid, values, strict=True):
                if counts:  # a filler has the position of another sample
                    losses[sample_at[position]] = loss
        merged = {sample: loss for part in self.distributed.all_gather(losses) for sample, loss in part.items()}
        if self.distributed.main:
            logger.warning("step %d: %s, worst samples:\n  %s", number, text, name_samples(self.data.train, merged))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.recent = deque(state["recent"], maxlen=LOSSES_KEPT)


def sample_losses(output: FlowOutput, mask: Tensor) -> Tensor:
    """Mean squared error of each sample over its valid labels: (B,) from velocities (B, M, K, A) and mask (B, K, A)."""
    squares = (output.velocity.detach().float() - output.target.float()).square().mean(1)
    squares = torch.where(mask, squares, 0.0)  # not times the mask: infinity times 0 is NaN
    return squares.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def name_samples(data: VLADataset, losses: Mapping[int, float]) -> str:
    """The worst samples by file and row, from {sample: loss}: those that are not finite, else the largest."""
    broken = [sample for sample, loss in losses.items() if not math.isfinite(loss)]
    worst = broken or sorted(losses, key=lambda sample: -losses[sample])
    return "\n  ".join(f"{data.where(sample)} (loss {losses[sample]:.4g})" for sample in worst[:SAMPLES_NAMED])
