"""LeRobot's own loading, in an environment with lerobot 0.6.1: `benchmarks.lerobot` starts it; nothing of ours is imported.

Each line of standard input is a folder: the first batches of a shuffled pass over that data set are loaded as LeRobot's
training script does, images resized by torchvision, chunks of actions. The answer is a line with the seconds.
"""

from __future__ import annotations

import sys
import time
from functools import cache

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torchvision.transforms.v2 import Resize


@cache
def opened(root: str, size: int, horizon: int) -> LeRobotDataset:
    fps = LeRobotDataset("benchmark/set", root=root).fps
    chunk = {"action": [step / fps for step in range(horizon)]}
    return LeRobotDataset("benchmark/set", root=root, image_transforms=Resize((size, size)), delta_timestamps=chunk)


def load(root: str, workers: int, size: int, horizon: int, batch: int, steps: int) -> float:
    dataset = opened(root, size, horizon)
    began = time.perf_counter()
    batches = iter(torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers))
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - began


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = map(int, sys.argv[1:])
    arguments = dict(zip(("workers", "size", "horizon", "batch", "steps"), numbers, strict=True))
    for line in sys.stdin:
        print(load(line.rstrip("\n"), **arguments), flush=True)
