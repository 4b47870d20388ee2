"""Loading: samples a second of one process in both ways of reading, two 224 px cameras, decoding, augmentation and tokens
included; and indexing."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row, best_seconds, demo_config, write_episodes
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import load_batches
from paligemma_vla.data.order import RunSampler
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.preflight import prepare

BATCH, STEPS = 32, 12
NAMES = {"random": "loader, 2 cameras at 224 px", "streamed": "loader, 2 cameras at 224 px, streamed"}


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=60, length=100, side=224, cameras=2, state_dim=14, action_dim=14)
        spec = TinySpec(image_size=224, patch_size=14, width=32, vision_layers=1, text_layers=1, heads=2)
        streams = {}
        for reading in ("random", "streamed"):
            config = demo_config(folder, spec, cameras=2, data__batch_size=BATCH, data__reading=reading)
            _, data, _ = prepare(config, Distributed(0, 1, torch.device("cpu")))
            sampler = RunSampler(data.order, 0, STEPS, 0, 1, 1)
            streams[reading] = partial(load_batches, data.train, sampler, config, pin_memory=False)

        def load(reading: str) -> None:
            for _ in streams[reading]():
                pass

        rows = len(data.train)
        return [
            *(
                Row(name, BATCH * STEPS / best_seconds(partial(load, reading), 3), "samples/s per process", "higher")
                for reading, name in NAMES.items()
            ),
            Row("index", rows / best_seconds(lambda: EpisodeIndex.build(str(folder / "episodes"))), "rows/s", "higher"),
            Row(
                "statistics, 14 + 14 dimensions",
                rows / best_seconds(lambda: compute_statistics(str(folder / "episodes"), "benchmark")),
                "rows/s",
                "higher",
            ),
        ]
