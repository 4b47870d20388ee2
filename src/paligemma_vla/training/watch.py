"""What a run remembers of its losses: steps that were skipped, spikes, and which samples were in them."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import Batch, VLADataset
from paligemma_vla.errors import TrainingError
from paligemma_vla.model.action_head.flow_matching import FlowOutput
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.parallel import to_local
from paligemma_vla.training.preflight import Data

logger = logging.getLogger(__name__)
REMEMBERED, NEEDED = 100, 20
SPIKE = 4.0
NAMED = 5


@dataclass(frozen=True)
class Step:
    """One optimiser step: loss over the global batch, gradient norm, its learning rate, seconds waited for data.

    parts: this process's micro-batches and what the model said to them, to find the samples behind a number.
    """

    loss: float
    norm: float
    rate: float
    wait: float
    parts: list[tuple[Batch, FlowOutput]]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class LossWatch:
    """Tells of steps whose loss or gradient is not finite, and of losses that stand out from the last hundred.

    Its state is part of a checkpoint, so a resumed run counts and says the same.
    """

    def __init__(self, config: VLAConfig, data: Data, distributed: Distributed) -> None:
        self.config, self.data, self.distributed = config, data, distributed
        self.skipped = self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=REMEMBERED)

    def look_at(self, number: int, step: Step) -> None:
        """Take in optimiser step `number` (from 1). Raises `TrainingError` when too many in a row had to be skipped."""
        if step.finite:
            self.in_a_row = 0
            median = statistics.median(self.recent) if len(self.recent) >= NEEDED else math.inf
            self.recent.append(step.loss)
            if step.loss > SPIKE * median > 0:
                told = "loss %.4g is %.1f times the median of the steps before, worst samples:\n  %s"
                self._warn(number, told, step.loss, step.loss / median, self._samples_of(number, step))
            return
        self.skipped += 1
        self.in_a_row += 1
        told = "skipped, its loss is %.4g, its gradient's norm %.4g, worst samples:\n  %s"
        self._warn(number, told, step.loss, step.norm, self._samples_of(number, step))
        if self.in_a_row >= self.config.training.max_skipped_steps:
            raise self.diverged(number)

    def diverged(self, number: int) -> TrainingError:
        """The error of a run whose numbers did not come back."""
        return TrainingError(
            f"step {number}: NaN or infinity in loss or gradient in {self.in_a_row} steps in a row (at most "
            f"training.max_skipped_steps = {self.config.training.max_skipped_steps}); they were skipped, and nothing was saved "
            f"since. Where the samples named above are the same ones again, look at their numbers, or leave them out "
            f"(data.exclude_episodes); else the run diverged: {self._remedy()}"
        )

    def refuse_lost_weights(self, number: int, model: nn.Module) -> None:
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

    def _warn(self, number: int, message: str, *values: Any) -> None:
        if self.distributed.main:
            logger.warning(f"step %d: {message}", number, *values)

    def _samples_of(self, number: int, step: Step) -> str:
        """The samples behind a step's loss, on whichever process they were."""
        positions, samples = self.data.order.batch(number - 1)
        sample_at = dict(zip(positions.tolist(), samples.tolist(), strict=True))
        losses: dict[int, float] = {}
        for batch, output in step.parts:
            valid = batch["action_mask"].any(dim=(1, 2)).tolist()
            values = sample_losses(output, batch["action_mask"].to(output.velocity.device)).tolist()
            for position, counts, loss in zip(batch["position"].tolist(), valid, values, strict=True):
                if counts:  # a filler stands at the position of another
                    losses[sample_at[position]] = loss
        merged = {sample: loss for part in self.distributed.all_gather(losses) for sample, loss in part.items()}
        return name_samples(self.data.train, merged)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.recent = deque(state["recent"], maxlen=REMEMBERED)


def sample_losses(output: FlowOutput, mask: Tensor) -> Tensor:
    """Mean squared error of each sample over its valid labels: (B,) from velocities (B, M, K, A) and mask (B, K, A)."""
    squares = (output.velocity.detach().float() - output.target.float()).square().mean(1)
    squares = torch.where(mask, squares, 0.0)  # not times the mask: infinity times 0 is NaN
    return squares.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def name_samples(data: VLADataset, losses: Mapping[int, float]) -> str:
    """The worst samples by file and row, from {sample: loss}: those that are not finite, else the largest."""
    broken = [sample for sample, loss in losses.items() if not math.isfinite(loss)]
    worst = broken or sorted(losses, key=lambda sample: -losses[sample])
    lines = [f"{data.where(sample)} (loss {losses[sample]:.4g})" for sample in worst[:NAMED]]
    if len(broken) > NAMED:
        lines.append(f"and {len(broken) - NAMED} more")
    return "\n  ".join(lines)
