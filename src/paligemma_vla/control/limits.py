"""Limits on actions: of range and of rate, per dimension, in real units, after everything else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import CheckpointError


@dataclass(frozen=True)
class ActionLimits:
    """low, high: range (A,). rate: largest change from one action to the next (A,), inf: none. All in real units."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    rate: NDArray[np.float32]

    def apply(
        self, actions: NDArray[np.float32], previous: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], int]:
        """Actions (K, A) within the limits, and how many numbers were changed.

        previous: the action (A,) executed before the first of them; None where it is not known, as at the start.
        Raises `CheckpointError` for an action that is not finite: there is no safe value to put in its place.
        """
        if not np.isfinite(actions).all():
            raise CheckpointError("actions: not finite; nothing is sent")
        limited = np.clip(actions, self.low, self.high)
        if np.isfinite(self.rate).any():
            last = limited[0] if previous is None else previous
            for step in range(len(limited)):
                last = np.clip(limited[step], last - self.rate, last + self.rate)
                limited[step] = last
        return limited, int((limited != actions).sum())
