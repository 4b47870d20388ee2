"""What a run remembers of its losses: steps that were skipped, spikes, and which samples were in them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paligemma_vla.data.loader import VLADataset
from paligemma_vla.model.action_head.flow_matching import FlowOutput

REMEMBERED, NEEDED = 100, 20
SPIKE = 4.0
NAMED = 5


class LossWatch:
    """Counts steps whose loss or gradient is not finite, and tells a loss that stands out from the last hundred.

    limit: skipped steps in a row at which the run stops. Its state is part of a checkpoint, so a resumed run says the same.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=REMEMBERED)

    def spike(self, loss: float) -> float | None:
        """Take in a step's loss. How many times the median of the last ones it is, when that is a spike."""
        median = statistics.median(self.recent) if len(self.recent) >= NEEDED else None
        self.recent.append(loss)
        self.in_a_row = 0
        return loss / median if median and loss > SPIKE * median else None

    def skip(self) -> bool:
        """Count a skipped step; whether that is one too many in a row."""
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.limit

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
    broken = [sample for sample, loss in losses.items() if not abs(loss) < float("inf")]
    worst = broken or sorted(losses, key=lambda sample: -losses[sample])
    lines = [f"{data.where(sample)} (loss {losses[sample]:.4g})" for sample in worst[:NAMED]]
    if len(broken) > NAMED:
        lines.append(f"and {len(broken) - NAMED} more")
    return "\n  ".join(lines)
