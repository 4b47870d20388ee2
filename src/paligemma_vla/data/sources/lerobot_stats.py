"""Statistics as LeRobot keeps them: per episode, and of all together.

Minimum, maximum, mean, standard deviation (of the population) and count. Images are sampled, and their values are in [0, 1] per
channel, of shape (3, 1, 1). LeRobot's optional quantiles are left out: it averages those of episodes, which is no quantile of
the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLED_IMAGES = 100  # per episode at least, where it has as many, as LeRobot does
LARGEST_SIDE = 150  # of a sampled image, about

Stats = dict[str, Any]


def number_stats(values: NDArray[Any]) -> Stats:
    """Of numbers (L, D) or (L,): each a list of D values."""
    table = values.reshape(len(values), -1)
    numbers = table.astype(np.float64)
    return {
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
        "mean": numbers.mean(axis=0).tolist(),
        "std": numbers.std(axis=0).tolist(),
        "count": [len(table)],
    }


def sampled_steps(length: int) -> NDArray[np.int64]:
    """Steps of an episode whose images are counted, spread evenly."""
    count = max(min(SAMPLED_IMAGES, length), min(int(length**0.75), 10_000))
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


class ImageStats:
    """Statistics of some images, added one by one."""

    def __init__(self) -> None:
        self.count = 0
        self.pixels = 0
        self.low, self.high = np.full(3, 255.0), np.zeros(3)
        self.sum, self.squares = np.zeros(3), np.zeros(3)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Count an RGB image (H, W, 3), thinned out when it is large."""
        step = max(1, max(image.shape) // LARGEST_SIDE)
        values = image[::step, ::step].reshape(-1, 3).astype(np.float64)
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        self.sum += values.sum(axis=0)
        self.squares += (values**2).sum(axis=0)
        self.pixels += len(values)
        self.count += 1

    def result(self) -> Stats:
        mean = self.sum / self.pixels
        std = np.sqrt(np.maximum(self.squares / self.pixels - mean**2, 0))
        values = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {**{name: (value / 255).reshape(3, 1, 1).tolist() for name, value in values.items()}, "count": [self.count]}


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several parts together."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    means, stds = (np.array([part[name] for part in parts], np.float64) for name in ("mean", "std"))
    weights = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weights * means).sum(axis=0)
    variance = (weights * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return {
        "min": np.array([part["min"] for part in parts]).min(axis=0).tolist(),
        "max": np.array([part["max"] for part in parts]).max(axis=0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }
